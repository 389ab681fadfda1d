"""adapt and remove: which modules become adapters, what stays, and that an error changes nothing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import igulora
from igulora.adapt import saved_modules
from igulora.layers import FusedSVDLinear
from igulora.saved import SavedModule


def state_of(model: nn.Module) -> list[Any]:
    """Everything adapt may touch: modules, parameters, their flags and values, attributes."""
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    params = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    return [modules, [p[:3] for p in params], [p[3] for p in params], sorted(model.__dict__)]


def assert_unchanged(model: nn.Module, before: list[Any]) -> None:
    now = state_of(model)
    assert now[:2] == before[:2]
    assert all(torch.equal(a, b) for a, b in zip(now[2], before[2], strict=True))
    assert now[3] == before[3]


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("all-linear", [], ["first", "body.up", "body.down", "head"]),
        ("all-linear", ["head", "body.up"], ["first", "body.down"]),
        (r"body\..*", [], ["body.up", "body.down"]),
        (r".*(up|head)", ["head"], ["body.up"]),
        (["up", "head"], [], ["body.up", "head"]),
        (["body.down"], [], ["body.down"]),
        (("first",), [], ["first"]),
    ],
)
def test_targets(net, config, targets, exclude, expected) -> None:
    model = net()
    x = torch.randn(3, 8)
    y = model(x)
    assert igulora.adapt(model, config(target_modules=targets, exclude_modules=exclude)) is model
    assert model.igulora_bank.names == expected
    assert [n for n, m in model.named_modules() if isinstance(m, FusedSVDLinear)] == expected
    torch.testing.assert_close(model(x), y)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora_{k}" for n in expected for k in "PEQ"}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"target_modules": "nothing"}, ValueError, "linear layers: first, body.up, body.down, head"),
        ({"target_modules": ["upp"]}, ValueError, "got 'upp', which matches none. Did you mean 'up'"),
        ({"target_modules": ["up", "zzz"]}, ValueError, "Linear layers end in: down, first, head, up"),
        ({"target_modules": []}, ValueError, "at least one linear layer"),
        ({"target_modules": 3}, TypeError, "target_modules"),
        ({"target_modules": [3]}, TypeError, "target_modules"),
        ({"target_modules": "body"}, ValueError, r"got 'body' \(ModuleDict\)"),
        ({"target_modules": "bo(dy"}, ValueError, "regular expression"),
        ({"modules_to_save": ["heat"]}, ValueError, "got 'heat', which matches none. Did you mean 'head'"),
        ({"rank_pattern": {"heat": 2}}, ValueError, "rank_pattern.*'heat'.*Did you mean 'head'"),
    ],
)
def test_wrong_targets_change_nothing(net, config, change, error, match) -> None:
    model = net()
    before = state_of(model)
    with pytest.raises(error, match=match):
        igulora.adapt(model, config(**change))
    assert_unchanged(model, before)


def test_wrong_arguments(net, config) -> None:
    with pytest.raises(TypeError, match="expected an nn.Module, got dict"):
        igulora.adapt({}, config())
    with pytest.raises(TypeError, match="expected an IGUConfig, got dict"):
        igulora.adapt(net(), {"r": 4})
    with pytest.raises(ValueError, match="at least one linear layer"):
        igulora.adapt(nn.Linear(3, 3), config())
    for function in (igulora.merge, igulora.unmerge, igulora.remove, igulora.compact, igulora.Controller):
        with pytest.raises(ValueError, match="got a plain Net"):
            function(net())


def test_adapting_twice_changes_nothing(net, config) -> None:
    model = igulora.adapt(net(), config())
    before = state_of(model)
    with pytest.raises(ValueError, match="got one adapted already"):
        igulora.adapt(model, config())
    assert_unchanged(model, before)


def test_layers_on_several_devices_change_nothing(net, config) -> None:
    model = net()
    model.head.to("meta")
    before = [(n, id(m)) for n, m in model.named_modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        igulora.adapt(model, config())
    assert before == ([(n, id(m)) for n, m in model.named_modules()], [p.requires_grad for p in model.parameters()])


def test_a_failure_half_way_changes_nothing(net, config, monkeypatch) -> None:
    model = net()
    model.body["up"].weight.requires_grad_(False)
    before = state_of(model)

    def fail(*_args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(sys.modules["igulora.adapt"], "Bank", fail)
    with pytest.raises(MemoryError):
        igulora.adapt(model, config(modules_to_save=["head"]))
    assert_unchanged(model, before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mid = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.mid(self.embed(x)))


def test_tied_weights_are_left_alone(config) -> None:
    model = Tied()
    before = state_of(model)
    with pytest.raises(ValueError, match="'out', whose weight is tied"):
        igulora.adapt(model, config(target_modules=["out"]))
    assert_unchanged(model, before)
    igulora.adapt(model, config())
    assert model.igulora_bank.names == ["mid"]
    assert model.out.weight is model.embed.weight


class Shared(nn.Module):
    """One layer under two names, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.b = self.a
        self.c = nn.ModuleList([nn.Linear(5, 2), self.a])

    def forward(self, x):
        return self.c[0](self.b(torch.tanh(self.a(x))))


def test_shared_module_becomes_one_adapter_everywhere(config) -> None:
    model = igulora.adapt(Shared(), config(rank_pattern={"a": 2}))
    assert model.igulora_bank.names == ["a", "c.0"]
    assert model.a is model.b is model.c[1]
    assert isinstance(model.a, FusedSVDLinear)
    nn.init.normal_(model.a.lora_E)
    x = torch.randn(3, 5)
    y = model(x)
    y.sum().backward()
    assert torch.count_nonzero(model.a.lora_E.grad) == 2
    igulora.remove(igulora.merge(model))
    assert model.a is model.b is model.c[1]
    torch.testing.assert_close(model(x), y)


def test_ranks_by_pattern_and_rank_zero(net, config) -> None:
    model = igulora.adapt(net(), config(rank_pattern={"up": 0, "head": 1}))
    assert [layer.r for layer in model.igulora_bank.layers] == [4, 0, 4, 1]
    assert model(torch.randn(2, 8)).shape == (2, 3)


def test_scale_is_the_configs_for_every_rank(net, config) -> None:
    model = igulora.adapt(net(), config(lora_alpha=2, rank_pattern={"up": 1}))
    assert {layer.scale for layer in model.igulora_bank.layers} == {0.5}


# -- modules to save --------------------------------------------------------------------------------------------------


def test_saved_modules_are_trained_copies(net, config) -> None:
    model = net()
    head, x = model.head, torch.randn(2, 8)
    y = model(x)
    igulora.adapt(model, config(modules_to_save=["head"]))
    assert model.igulora_bank.names == ["first", "body.up", "body.down"]
    saved = saved_modules(model)["head"]
    assert isinstance(model.head, SavedModule)
    assert saved.original is head
    torch.testing.assert_close(model(x), y)
    saved.module.bias.data += 1
    torch.testing.assert_close(model(x), y + 1)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n} == {
        "head.module.weight",
        "head.module.bias",
    }
    igulora.remove(model)
    assert model.head is head
    torch.testing.assert_close(model(x), y)


def test_a_module_inside_a_saved_one_is_part_of_it(config) -> None:
    model = nn.Sequential()
    model.add_module("mid", nn.Linear(3, 4))
    model.add_module("top", nn.Sequential(nn.Linear(4, 4)))
    model.top.add_module("dense", nn.Linear(4, 4))
    igulora.adapt(model, config(modules_to_save=["top", "dense"]))
    assert list(saved_modules(model)) == ["top"]
    assert model.igulora_bank.names == ["mid"]


# -- layers that their parents bypass -------------------------------------------------------------------------------


def test_transformer_layers_of_pytorch_use_their_adapters_in_evaluation(config) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True))
    with pytest.raises(ValueError, match="MultiheadAttention reads its weight directly"):
        igulora.adapt(model, config(target_modules=["out_proj"]))
    igulora.adapt(model, config())
    assert model.igulora_bank.names == ["0.linear1", "0.linear2"]
    for layer in model.igulora_bank.layers:
        nn.init.ones_(layer.lora_E)
    x = torch.randn(2, 3, 16)
    trained = model(x)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained)
        with igulora.adapters_disabled(model):
            assert float((model(x) - trained).abs().max()) > 0.01


# -- removal and switching off ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_remove_puts_the_plain_modules_back(net, config, merged) -> None:
    model = net()
    plain, x = [id(m) for m in model.modules()], torch.randn(2, 8)
    base = model(x)
    igulora.adapt(model, config(modules_to_save=["head"]))
    for layer in model.igulora_bank.layers:
        nn.init.normal_(layer.lora_E)
    adapted = model(x)
    if merged:
        igulora.merge(model)
    igulora.remove(model)
    assert [id(m) for m in model.modules()][:-1] == plain[:-1]
    torch.testing.assert_close(model(x), adapted if merged else base)
    assert not hasattr(model, "igulora_bank")
    assert not hasattr(model, "igulora_config")
    igulora.adapt(model, config())  # and again


def test_adapters_disabled_is_the_base_and_nests(net, config) -> None:
    model, x = net(), torch.randn(2, 8)
    base = model(x)
    igulora.adapt(model, config())
    for layer in model.igulora_bank.layers:
        nn.init.normal_(layer.lora_E)
    adapted = model(x)
    with igulora.adapters_disabled(model):
        with igulora.adapters_disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
        with pytest.raises(KeyError), igulora.adapters_disabled(model):
            raise KeyError
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), adapted)


def test_a_misspelt_exclusion_is_named(net, config) -> None:
    with pytest.raises(ValueError, match="expected exclude_modules to name modules of the model, got 'haed'.*'head'"):
        igulora.adapt(net(), config(exclude_modules=["haed"]))
