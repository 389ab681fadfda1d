"""FusedSVDLinear and SavedModule on their own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from igulora import FusedSVDLinear
from igulora.context import PathContext
from igulora.saved import SavedModule


def layer(r: int = 3, **options) -> FusedSVDLinear:
    torch.manual_seed(0)  # the base layer's start
    g = torch.Generator().manual_seed(1)
    built = FusedSVDLinear(6, 5, r, generator=g, **{"init": "orthonormal", **options})
    nn.init.normal_(built.lora_E, generator=g)
    return built


@pytest.mark.parametrize("init", ["orthonormal", "gaussian", "zero", "lora"])
@pytest.mark.parametrize("r", [0, 1, 4, 9])
def test_starts_as_the_base(init: str, r: int) -> None:
    base = nn.Linear(6, 5)
    x = torch.randn(4, 6)
    adapted = FusedSVDLinear(base, r=r, init=init, generator=torch.Generator().manual_seed(0))
    assert torch.equal(adapted(x), base(x)) or torch.allclose(adapted(x), base(x), atol=1e-7, rtol=0)
    assert adapted.weight is base.weight
    assert not base.weight.requires_grad
    assert torch.count_nonzero(adapted.delta_weight()) == 0
    assert adapted.lora_E.requires_grad == (init != "lora")


def test_from_zero_lambda_is_trained_from_one() -> None:
    assert torch.count_nonzero(FusedSVDLinear(6, 5, 3).lora_P) == 0  # as adapt does by default
    zero, lora = (
        FusedSVDLinear(6, 5, 3, init=init, generator=torch.Generator().manual_seed(0)) for init in ("zero", "lora")
    )
    assert torch.equal(zero.lora_Q, lora.lora_Q)
    assert zero.lora_E.tolist() == lora.lora_E.tolist() == [1.0] * 3
    assert torch.count_nonzero(zero.lora_P) == 0
    assert FusedSVDLinear(6, 5, 3, init="zero", init_lambda=0.5).lora_E.tolist() == [0.5] * 3
    with pytest.raises(ValueError, match="expected init_lambda other than 0 with init='zero'"):
        FusedSVDLinear(6, 5, 3, init="zero", init_lambda=0.0)


@pytest.mark.parametrize(("r", "wide"), [(3, True), (5, True), (9, False)])
def test_orthonormal_rows(r: int, wide: bool) -> None:
    built = FusedSVDLinear(8, 5, r, init="orthonormal")
    gram = built.lora_P.detach() @ built.lora_P.detach().t()
    if wide:
        torch.testing.assert_close(gram, torch.eye(r))
    else:  # more rows than columns: blocks of orthonormal rows
        torch.testing.assert_close(gram.diagonal(), torch.ones(r))
        torch.testing.assert_close(gram[:5, :5], torch.eye(5))


def test_one_generator_one_start() -> None:
    one, two = (
        FusedSVDLinear(6, 5, 3, init="orthonormal", generator=torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert torch.equal(one.lora_P, two.lora_P)
    assert torch.equal(one.lora_Q, two.lora_Q)
    torch.manual_seed(0)
    three = FusedSVDLinear(6, 5, 3, init="orthonormal")
    assert not torch.equal(one.lora_P, three.lora_P)
    assert not torch.equal(one.lora_Q, three.lora_Q)


def test_forward_is_the_formula_and_merging_is_exact() -> None:
    built = layer(lora_alpha=6.0)
    assert built.scale == 2.0
    built.mask[1] = 0.0
    x = torch.randn(2, 3, 6)
    y = built(x)
    torch.testing.assert_close(y, linear(x, built.weight + built.delta_weight(), built.bias))
    before = built.weight.detach().clone()
    built.merge()
    torch.testing.assert_close(built(x), y)
    with pytest.raises(ValueError, match="got a merged one"):
        built.merge()
    assert "merged" in repr(built)
    built.unmerge()
    torch.testing.assert_close(built.weight, before)
    with pytest.raises(ValueError, match="nothing to undo"):
        built.unmerge()


def test_merging_inside_autocast_stays_float32() -> None:
    one, two = layer(), layer()
    two.base_layer.load_state_dict(one.base_layer.state_dict())
    one.merge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        two.merge()
    assert torch.equal(one.weight, two.weight)


def test_dropout_acts_in_training_only_and_follows_pytorchs_seed() -> None:
    built, x = layer(dropout=0.5), torch.randn(20, 6)
    torch.manual_seed(3)
    one = built(x)
    torch.manual_seed(3)
    assert torch.equal(built(x), one)
    assert not torch.equal(built(x), one)
    built.eval()
    torch.testing.assert_close(built(x), linear(x, built.weight + built.delta_weight(), built.bias))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_with_dropout(reentrant: bool) -> None:
    grads = []
    for recompute in (False, True):
        built = layer(dropout=0.4)
        x = torch.randn(9, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
        torch.manual_seed(8)
        y = checkpoint(built, x, use_reentrant=reentrant) if recompute else built(x)
        y.square().sum().backward()
        grads.append([x.grad, built.lora_P.grad, built.lora_E.grad, built.lora_Q.grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_masters_keep_their_bits_through_16_bit_casts(dtype: torch.dtype) -> None:
    built = layer()
    held = {k: v.detach().clone() for k, v in built.named_parameters() if k.startswith("lora")}
    built.to(dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert built.weight.dtype == dtype
    for name, value in held.items():
        assert getattr(built, name).dtype == wanted
        assert torch.equal(getattr(built, name).to(torch.float32), value)
    assert built.mask.dtype == wanted
    assert built(torch.randn(2, 6, dtype=dtype)).dtype == dtype


def test_copies_share_nothing_and_pickles_are_equal() -> None:
    built, x = layer(), torch.randn(4, 6)
    for twin in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert torch.equal(twin(x), built(x))
        twin.lora_P.data.zero_()
        twin.base_layer.weight.data.zero_()
        assert torch.count_nonzero(built.lora_P) > 0
        assert torch.count_nonzero(built.weight) > 0


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        (("linear", 5), {}, TypeError, "expected an nn.Linear or a number"),
        ((nn.Conv1d(2, 2, 1),), {}, TypeError, "got Conv1d"),
        ((True, 5), {}, TypeError, "got bool"),
        ((6,), {}, ValueError, "out_features"),
        ((nn.Linear(6, 5), 5), {}, ValueError, "got both"),
        ((6, 5), {"r": -1}, ValueError, "rank r >= 0"),
        ((6, 5), {"r": 2.0}, ValueError, "rank r >= 0"),
        ((6, 5), {"dropout": 1.0}, ValueError, "0 <= dropout < 1"),
        ((6, 5), {"init": "ortho"}, ValueError, "orthonormal"),
    ],
)
def test_bad_arguments(args, options, error, match) -> None:
    with pytest.raises(error, match=match):
        FusedSVDLinear(*args, **options)


def test_meta_device_holds_shapes_only() -> None:
    built = FusedSVDLinear(6, 5, 3, device="meta")
    assert built.lora_P.is_meta
    y = built(torch.empty(4, 6, device="meta"))
    assert y.shape == (4, 5)
    y.sum().backward()
    assert built.lora_Q.grad.shape == (3, 6)


# -- modules to save --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "split"), [(5, 3), (5, 0), (5, 5)])
def test_only_training_rows_train_a_saved_module(n: int, split: int) -> None:
    context = PathContext()
    module = nn.Linear(6, 2)
    saved = SavedModule(module, context)
    x = torch.randn(n, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with context.at(torch.linspace(0, 1, n), train_groups=split):
        y = saved(x)
    torch.testing.assert_close(y, linear(x, module.weight, module.bias))
    y.sum().backward()
    got = saved.module.weight.grad
    expected = x.detach()[:split].sum((0, 1)).expand(2, -1)
    torch.testing.assert_close(torch.zeros_like(expected) if got is None else got, expected)
    assert module.weight.grad is None
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand_as(x))


def test_saved_module_forwards_attributes_and_can_be_switched_off() -> None:
    context, module = PathContext(), nn.Linear(6, 2)
    saved = SavedModule(module, context)
    assert saved.out_features == 2
    with pytest.raises(AttributeError):
        _ = saved.nothing_of_the_kind
    saved.module.weight.data.zero_()
    x = torch.randn(3, 6)
    context.enabled = False
    assert torch.equal(saved(x), module(x))


def test_saved_module_with_several_outputs_asks_for_separate_passes() -> None:
    context = PathContext()

    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with context.at(torch.ones(4), train_groups=2), pytest.raises(TypeError, match='path_pass="separate"'):
        SavedModule(Two(), context)(torch.ones(4, 2))
