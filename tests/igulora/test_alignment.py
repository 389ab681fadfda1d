"""align: the gradients it measures are autograd's, its blocks and ranks are RaLoRA's, and the model is afterwards what it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import igulora
from igulora.alignment import align, blocks_for
from igulora.spectra import effective_rank


@pytest.fixture
def loss(loss_of: Any) -> Any:
    return loss_of


def gradients(model: nn.Module, loss: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    """By autograd, the mean over the batches."""
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    for batch in batches:
        (loss(twin)(batch) / len(batches)).backward()
    return {n: m.weight.grad for n, m in twin.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("memory", [None, 0, 500.0])
def test_what_is_measured_is_autograds_gradient(memory: float | None, net: Any, batches: Any, loss: Any) -> None:
    model, data = net().train(), batches(3)
    found = align(model, data, loss(model), r=2, memory=memory)
    expected = gradients(model, loss, data)
    assert list(found.layers) == list(expected)
    for name, gradient in expected.items():
        layer = found.layers[name]
        assert layer.dimensionality == pytest.approx(effective_rank(gradient), rel=1e-4)
        weight = model.get_parameter(name + ".weight").detach()
        assert layer.sensitivity == pytest.approx(float((weight * gradient).abs().mean()), rel=1e-4)
        assert (layer.out_features, layer.in_features) == tuple(gradient.shape)


def test_the_model_is_afterwards_what_it_was(net: Any, batches: Any, loss: Any) -> None:
    model = nn.Sequential(net(), nn.Dropout(0.5), nn.Linear(3, 3)).train()
    model[2].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    torch.manual_seed(7)
    align(model, batches(2), loss(model), r=2)
    assert torch.initial_seed() == 7
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.requires_grad == q.requires_grad
        assert p.grad is None
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("erank", "rank", "sides", "most", "blocks"),
    [
        (100.0, 8, (512, 512), 16, 8),  # 2^floor(log2 12.5)
        (128.0, 8, (512, 512), 16, 16),
        (1000.0, 8, (512, 512), 16, 16),
        (8.0, 8, (512, 512), 16, 1),
        (15.9, 8, (512, 512), 16, 1),
        (16.0, 8, (512, 512), 16, 2),
        (3.0, 8, (512, 512), 16, 1),
        (100.0, 8, (516, 512), 16, 4),  # 516 = 4 * 129
        (100.0, 8, (512, 511), 16, 1),  # no power of two divides
        (0.0, 8, (512, 512), 16, 1),
    ],
)
def test_blocks(erank: float, rank: int, sides: tuple[int, int], most: int, blocks: int) -> None:
    assert blocks_for(erank, rank, *sides, most) == blocks


def test_pro_shares_the_budget_out_by_sensitivity(net: Any, batches: Any, loss: Any) -> None:
    model, data = net(), batches(3)
    found = align(model, data, loss(model), r=8, pro=True, r_max=30)
    smooth = {n: math.sqrt(m.in_features + m.out_features) for n, m in found.layers.items()}
    total, everything = sum(smooth.values()) * 8, sum(m.sensitivity for m in found.layers.values())
    for name, layer in found.layers.items():
        assert layer.rank == min(max(int(total * layer.sensitivity / everything / smooth[name]), 1), 30)
    assert len(set(found.ranks.values())) > 1
    bounded = align(model, data, loss(model), r=8, pro=True, r_min=6, r_max=9)
    assert all(6 <= rank <= 9 for rank in bounded.ranks.values())


def test_a_language_model_by_its_own_loss() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(shape)
    ids = torch.randint(40, (4, 9))
    found = align(model, [{"input_ids": ids, "labels": ids}], r=2, max_blocks=4)
    assert len(found.layers) == 14
    assert {layer.blocks for layer in found.layers.values()} <= {1, 2, 4}
    assert all(1 < layer.dimensionality <= 16 for layer in found.layers.values())
    expected = copy.deepcopy(model).eval()
    expected(input_ids=ids, labels=ids).loss.backward()
    weight = expected.model.layers[1].mlp.up_proj.weight.grad
    assert found.layers["model.layers.1.mlp.up_proj"].dimensionality == pytest.approx(effective_rank(weight), rel=1e-3)
    assert found.to_dict()["model.layers.0.mlp.up_proj"]["rank"] == 2


def broken(kind: str, model: nn.Module, loss: Any) -> Any:
    def call(batch: Any) -> torch.Tensor:
        value = loss(model)(batch)
        if kind == "no gradient":
            return value.detach()
        if kind == "zeros":
            return value * 0.0
        return value * float("nan")

    return call


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no gradient", "expected a loss that depends on the layers to align"),
        ("zeros", "expected a gradient for 'first', got zeros; do these batches have labels"),
        ("nan", "expected finite gradients, got NaN or infinity for 'first'"),
    ],
)
def test_batches_that_say_nothing(kind: str, words: str, net: Any, batches: Any, loss: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match=words):
        align(model, batches(1), broken(kind, model, loss))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_the_loss_does_not_pass(net: Any, batches: Any, loss: Any) -> None:
    model = net()
    model.spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="expected a gradient for 'spare', got none"):
        align(model, batches(1), loss(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "expected r to be an int >= 1, got 0"),
        ({"max_blocks": 12}, "expected max_blocks to be a power of two, got 12"),
        ({"r": 8, "r_max": 4}, "expected r_min <= r <= r_max, got 1, 8, 4"),
        ({"r": 8, "r_min": 9}, "expected r_min <= r <= r_max, got 9, 8"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], words: str, net: Any, batches: Any, loss: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match=words):
        align(model, batches(1), loss(model), **options)


def test_modules_to_save_are_left_out_with_what_is_in_them(net: Any, batches: Any, loss: Any) -> None:
    model = net()
    found = align(model, batches(1), loss(model), r=2, modules_to_save=["body"])
    assert list(found.layers) == ["first", "head"]
    igulora.adapt(model, igulora.IGUConfig(method="ralora", r=2, block_pattern=found.blocks, modules_to_save=["body"]))


def test_no_batches_and_no_plain_model(net: Any, batches: Any, loss: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match="expected batches to measure gradients on, got none"):
        align(model, [], loss(model))
    igulora.adapt(model, igulora.IGUConfig(method="lora", r=2))
    with pytest.raises(ValueError, match="expected a model without igulora adapters"):
        align(model, batches(1), loss(model))


class ByName(nn.Module):
    """A layer that is called by the name of its argument."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(**{self.name: x})


def test_a_layer_that_is_called_by_name() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    models = ByName(layer, "input"), nn.Sequential(layer)
    found, expected = (align(m, [x], lambda b, m=m: m(b).square().mean(), r=1) for m in models)
    assert list(found.layers.values()) == list(expected.layers.values())


def test_a_layer_that_is_called_by_a_name_of_its_own() -> None:
    layer = nn.Linear(6, 5)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    model = ByName(layer, "x")
    with pytest.raises(ValueError, match=r"expected 'layer' to be called with its input alone, or by the name 'input'"):
        align(model, [torch.ones(4, 6)], lambda b: model(b).square().mean(), r=1)
