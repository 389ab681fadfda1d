"""torchao: weights in tensors of its own, with activations quantised or not, and models that transformers loads with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import igulora
from igulora import FusedSVDLinear
from igulora.bases import is_plain_product
from igulora.bases.torchao import TorchAOBase

from .cases import assert_near, torchao

quantization = pytest.importorskip("torchao.quantization")


def wrapped(base: nn.Module, r: int = 4) -> FusedSVDLinear:
    layer = FusedSVDLinear(base, r=r, init="orthonormal", generator=torch.Generator().manual_seed(0))
    nn.init.normal_(layer.lora_E, generator=torch.Generator().manual_seed(1))
    return layer


@pytest.mark.parametrize("kind", ["int8", "int8-whole", "int4", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_gets_its_gradient(kind: str, dtype: torch.dtype) -> None:
    """torchao's own forward loses it without a word where activations are quantised."""
    base = torchao(kind, dtype)
    assert not is_plain_product(base)
    layer = wrapped(base)
    assert layer.base.kind == "torchao"
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    W = layer.base.dense().float() + layer.delta_weight().detach()
    rounding = 1e-5 if dtype == torch.float32 else 0.01
    assert_near(x.grad.float(), torch.ones(2, 5, 48) @ W, rounding)
    activations = 0.02 if kind == "dynamic" else rounding
    assert_near(y.float(), nn.functional.linear(x.detach().float(), W, base.bias.float()), activations)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("kind", ["int8", "int8-whole", "int4", "dynamic"])
def test_peft_959_a_merged_weight_is_of_the_same_kind(kind: str) -> None:
    layer, x = wrapped(torchao(kind)), torch.randn(3, 64)
    weight, dense = layer.weight, layer.base.dense()
    y, update = layer(x).detach(), layer.delta_weight().detach()
    error = layer.merge()
    assert error == layer.merge_error > 0
    assert type(layer.weight) is type(weight)
    for name in ("block_size", "scale", "qdata", "target_dtype", "act_quant_kwargs", "dtype"):
        one, other = getattr(layer.weight, name, None), getattr(weight, name, None)
        if isinstance(one, torch.Tensor):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        else:
            assert one == other
    assert float((layer.base.dense() - (dense + update)).norm() / update.norm()) == pytest.approx(error)
    assert_near(layer(x), y, 0.03 + 2 * error)
    assert not layer.weight.requires_grad
    layer.unmerge()
    assert torch.equal(layer.base.dense(), dense)
    assert torch.equal(layer(x), y)


def test_an_update_of_zero_changes_nothing() -> None:
    """With an update of zero the sum is what the weight already holds."""
    for kind in ("int8", "int4"):
        layer = FusedSVDLinear(torchao(kind), r=2)
        assert layer.merge() < 1e-6, kind


class Unknown(nn.Parameter):
    """Stands for torchao's formats without a way back to numbers; its name must come from torchao."""


Unknown.__module__ = "torchao.quantization"


def test_weights_that_cannot_be_unpacked_are_refused_by_name() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.data = layer.weight.data.clone()
    object.__setattr__(layer.weight, "__class__", Unknown)
    assert TorchAOBase.matches(layer)
    model = nn.Sequential(layer)
    with pytest.raises(
        ValueError, match=r"got '0' \(torchao\): torchao cannot unpack its Unknown, .*IntxWeightOnlyConfig"
    ):
        igulora.adapt(model, igulora.IGUConfig(r=2, target_rank=1, total_steps=99))


def test_a_format_that_igulora_cannot_make_is_not_merged_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(igulora.bases.torchao._QUANTISE, "Int8Tensor")
    layer = wrapped(torchao("int8"))
    before = layer.base.dense()
    with pytest.raises(
        ValueError, match="does not know how torchao made its Int8Tensor; merge into the unquantised model"
    ):
        layer.merge()
    assert torch.equal(layer.base.dense(), before)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_model_that_transformers_loads(kind: str, tiny_llama, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    from torchao.quantization.granularity import PerGroup

    chosen = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }[kind]()

    def load() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tiny_llama, quantization_config=transformers.TorchAoConfig(chosen), dtype=torch.bfloat16
        )

    model = igulora.adapt(load(), igulora.IGUConfig(r=4, target_rank=2, total_steps=30, t_init=6, t_final=4, window=2))
    bank = igulora.find_bank(model)
    assert {layer.base.kind for layer in bank.layers} == {"torchao"}
    assert len(bank.layers) == 14
    ctl, opt = igulora.Controller(model), torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        losses.append(float(ctl.backward(lambda b: model(**b).loss, {"input_ids": ids, "labels": ids})))
        opt.step()
        ctl.step()
        opt.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    igulora.save_adapter(model, tmp_path)
    other = igulora.load_adapter(load(), tmp_path)
    model.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
