"""Layers, models and runs with block-diagonal adapters (RaLoRA; ALGORITHMS 5), and adaptive ranks in blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import igulora
from igulora import FusedSVDLinear
from igulora.kernels.windows import widened


def dense_twin(layer: FusedSVDLinear) -> FusedSVDLinear:
    """The same update as an ordinary adapter of the rank of all blocks together."""
    twin = FusedSVDLinear(copy.deepcopy(layer.base_layer), r=layer.r)
    with torch.no_grad():
        for name in ("lora_P", "lora_Q"):
            getattr(twin, name).copy_(widened(getattr(layer, name), layer.blocks))
        twin.lora_E.copy_(layer.lora_E)
        twin.mask.copy_(layer.mask)
    twin.scale = layer.scale
    return twin


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("init", ["orthonormal", "gaussian", "zero", "lora"])
def test_parameters_stay_and_the_rank_grows(blocks: int, init: str) -> None:
    r, base = 2, nn.Linear(16, 24)
    layer = FusedSVDLinear(base, r=r * blocks, blocks=blocks, init=init)
    assert layer.lora_P.numel() + layer.lora_Q.numel() == r * (16 + 24)
    assert layer.r == r * blocks
    with torch.no_grad():
        layer.lora_E.fill_(1.0)
        if init in ("zero", "lora"):
            layer.lora_P.normal_()
    assert int(torch.linalg.matrix_rank(layer.delta_weight())) == min(r * blocks, 16)
    if init == "orthonormal":
        for matrix in (layer.lora_P, layer.lora_Q):
            for block in matrix.split(r):
                torch.testing.assert_close(block @ block.t(), torch.eye(r), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_layer_equals_its_dense_twin(dropout: float) -> None:
    torch.manual_seed(0)
    layer = FusedSVDLinear(nn.Linear(16, 24), r=12, blocks=4, dropout=dropout, init="gaussian", init_lambda=0.7)
    layer.mask[5] = 0.0
    twin = dense_twin(layer)
    twin.dropout = dropout
    x, found = torch.randn(5, 3, 16), []
    for each in (layer, twin):
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        y = each(given)
        y.square().sum().backward()
        assert each.lora_Q.grad is not None
        found.append((y, given.grad, each.lora_E.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_merging_gives_one_dense_weight() -> None:
    layer = FusedSVDLinear(nn.Linear(8, 8), r=4, blocks=2, init="gaussian", init_lambda=3.0)
    x, before = torch.randn(6, 8), layer.weight.clone()
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    changed = (layer.weight - before).abs() > 1e-7
    assert changed[:4, :4].any()
    assert not changed[:4, 4:].any()
    assert not changed[4:, :4].any()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


BLOCKS = {"0": 4, "2": 2}
OPTIONS: dict[str, Any] = {
    "r": 4, "target_rank": 2, "total_steps": 24, "t_init": 7, "t_final": 6, "delta_t": 2, "window": 2, "ig_every": 1,
    "block_pattern": BLOCKS,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "igu": {"estimator": "gauss"},
    "separate": {"estimator": "trapezoid", "nodes": 5, "path_pass": "separate", "include_f0": True},
    "on-path": {"estimator": "on-path"},
    "adalora": {"method": "adalora"},
    "parameters": {"budget_unit": "parameters"},
    "hard": {"prune": "hard", "min_rank": 1},
}


def trained(model: nn.Module, steps: int = 24, **options: Any) -> igulora.Controller:
    igulora.adapt(model, igulora.IGUConfig(**{**OPTIONS, **options}))
    opt = torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))
    ctl = igulora.Controller(model)
    go(model, ctl, opt, steps)
    ctl.optimizer = opt
    return ctl


def go(model: nn.Module, ctl: igulora.Controller, opt: torch.optim.Optimizer, steps: int, seed: int = 3) -> list[float]:
    g, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x = torch.randn(6, 8, generator=g)
        losses.append(float(ctl.backward(lambda b: (model(b) - b.sum(1, keepdim=True).tanh()).square().mean(), x)))
        opt.step()
        ctl.step()
        opt.zero_grad()
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_every_scored_method_prunes_blocks_to_the_budget(name: str, model: nn.Module) -> None:
    ctl = trained(model, **METHODS[name])
    bank = ctl.bank
    assert [layer.r for layer in bank.layers] == [16, 8, 4]
    assert [layer.blocks for layer in bank.layers] == [4, 2, 1]
    live = sum(ctl.live_ranks().values())
    if name == "parameters":
        assert float((bank.cost * bank.live).sum()) <= ctl.budget == 2 * (24 + 28 + 16)
    else:
        assert live == ctl.budget == 2 * (4 + 2 + 1)
    if name == "hard":
        assert min(ctl.live_ranks().values()) >= 1


@pytest.mark.parametrize("estimator", ["gauss", "on-path"])
def test_a_run_in_blocks_is_that_of_autograd(estimator: str, model: nn.Module) -> None:
    """Completeness: lambda times its path gradient equals P's and Q's sums, triplet by triplet (ALGORITHMS 2.1)."""
    ctl = trained(model, steps=4, estimator=estimator, init_lambda=0.5)
    ctl.backward(lambda b: model(b).square().mean(), torch.randn(6, 8))
    assert ctl.bank.path.abs().max() > 1e-4
    views = ctl.bank.matrix_views(ctl.bank.path)
    for layer, name in zip(ctl.bank.layers, ctl.bank.names, strict=True):
        by = {part: (getattr(layer, part).detach() * views[name, part]) for part in ("lora_P", "lora_E", "lora_Q")}
        torch.testing.assert_close(by["lora_P"].sum(1), by["lora_E"], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(by["lora_Q"].sum(1), by["lora_E"], rtol=1e-4, atol=1e-7)


def test_the_penalty_is_taken_block_by_block(model: nn.Module) -> None:
    ctl = trained(model, steps=3, orthogonality=0.1, init="gaussian")
    norms = []
    for layer in ctl.bank.layers:
        for matrix in (layer.lora_P, layer.lora_Q):
            for block in matrix.detach().split(layer.r // layer.blocks):
                norms.append((block @ block.t() - torch.eye(block.shape[0])).norm())
    ctl.backward(lambda b: model(b).square().mean(), torch.randn(4, 8))
    assert ctl.penalty is not None
    torch.testing.assert_close(ctl.penalty, torch.stack(norms).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [5, 13, 21])
def test_folders_checkpoints_copies(stop: int, model: nn.Module, tmp_path: Any) -> None:
    whole, part, again = (copy.deepcopy(model) for _ in range(3))
    expected = trained(whole)
    ctl = trained(part, steps=stop)
    twin, twin_ctl = copy.deepcopy((part, ctl))
    igulora.save_checkpoint(tmp_path / "run", part, ctl.optimizer, ctl)
    igulora.adapt(again, igulora.IGUConfig(**OPTIONS))
    opt = torch.optim.AdamW(igulora.param_groups(again, lr=1e-2))
    resumed = igulora.Controller(again)
    igulora.load_checkpoint(tmp_path / "run", again, opt, resumed)
    g = torch.Generator().manual_seed(3)
    skipped = [torch.randn(6, 8, generator=g) for _ in range(stop)]
    assert len(skipped) == stop
    for each, controller, optimizer in ((again, resumed, opt), (twin, twin_ctl, twin_ctl.optimizer)):
        state = g.get_state()
        for _ in range(24 - stop):
            x = torch.randn(6, 8, generator=g)
            controller.backward(lambda b, m=each: (m(b) - b.sum(1, keepdim=True).tanh()).square().mean(), x)
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
        g.set_state(state)
        assert torch.equal(controller.bank.weight, expected.bank.weight)
        assert torch.equal(controller.bank.mask, expected.bank.mask)
    igulora.save_adapter(again, tmp_path / "adapter", resumed)
    x = torch.randn(5, 8)
    assert torch.equal(igulora.load_adapter(model, tmp_path / "adapter")(x), again(x))


def test_compaction_keeps_equal_blocks(model: nn.Module) -> None:
    ctl = trained(model)
    x = torch.randn(5, 8)
    expected, live = model(x).detach(), sum(ctl.live_ranks().values())
    igulora.compact(model, ctl.optimizer, ctl)
    torch.testing.assert_close(model(x), expected)
    assert sum(ctl.live_ranks().values()) == live
    assert all(layer.r % layer.blocks == 0 for layer in ctl.bank.layers)
    assert sum(layer.r for layer in ctl.bank.layers) < 28
    go(model, ctl, ctl.optimizer, 3)


def test_export_is_a_plain_lora_of_the_rank_of_all_blocks(model: nn.Module, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(model)
    ctl = trained(model)
    x = torch.randn(5, 8)
    igulora.save_adapter(model, tmp_path / "ours", ctl)
    for source in (model, tmp_path / "ours"):
        igulora.export_peft(source, tmp_path / "theirs")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)


def test_blocks_of_layers_that_read_one_input() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    llama = transformers.LlamaForCausalLM(shape)
    ids = torch.randint(40, (4, 9))
    found = igulora.align(llama, [{"input_ids": ids, "labels": ids}], r=1, max_blocks=4)
    assert max(found.blocks.values()) > 1
    options = igulora.IGUConfig(method="ralora", r=1, block_pattern=found.blocks)
    before = llama(ids).logits
    igulora.adapt(llama, options)
    assert torch.equal(llama(ids).logits, before)
    opt = torch.optim.AdamW(igulora.param_groups(llama, lr=5e-2))
    losses = []
    for _ in range(30):
        loss = llama(input_ids=ids, labels=ids).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_pattern": {"0": 3}}, "expected blocks that divide both sides of '0' .8 in, 16 out., got 3"),
        ({"blocks": 8, "block_pattern": {}}, "expected blocks that divide both sides of '2' .16 in, 12 out., got 8"),
        ({"block_pattern": {"nope": 2}}, "expected block_pattern to name adapted layers, got 'nope'"),
    ],
)
def test_blocks_that_do_not_fit_the_model(options: dict[str, Any], words: str, model: nn.Module) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=words):
        igulora.adapt(model, igulora.IGUConfig(**{**OPTIONS, **options}))
    assert all(type(a) is type(b) for a, b in zip(model, before, strict=True))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": 0}, "expected blocks of at least 1, got 0"),
        ({"blocks": 2.0}, "expected blocks of at least 1, got 2.0"),
        ({"block_pattern": {"q": True}}, "expected block_pattern to give blocks for 'q' of at least 1, got True"),
        ({"method": "flexlora", "blocks": 2}, "expected blocks=1 for method='flexlora'"),
    ],
)
def test_blocks_that_are_no_numbers_of_blocks(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        igulora.IGUConfig(**{"r": 4, "total_steps": 100, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"method": "ralora"},
            "expected blocks that were measured for method='ralora', got none: found = igulora.align",
        ),
        ({"method": "ralora-pro", "blocks": 2}, "expected ranks that were measured for method='ralora-pro'"),
    ],
)
def test_ralora_without_a_measurement_is_not_plain_lora(options: dict[str, Any], words: str, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=words):
        igulora.adapt(model, igulora.IGUConfig(r=2, **options))


def test_a_full_name_goes_before_an_ending() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    config = igulora.IGUConfig(method="lora", r=1, block_pattern={"0": 4, "1.0": 2}, rank_pattern={"1": 3, "1.1": 2})
    igulora.adapt(model, config)
    bank = igulora.find_bank(model)
    assert {name: layer.blocks for name, layer in zip(bank.names, bank.layers, strict=True)} == {
        "0": 4,
        "1.0": 2,
        "1.1": 1,
    }
    assert bank.ranks() == {"0": 4, "1.0": 2, "1.1": 2}


def test_other_layers_have_no_blocks() -> None:
    with pytest.raises(ValueError, match="expected blocks=1 for a layer that is not linear, got 2"):
        igulora.FusedSVDConv2d(nn.Conv2d(4, 4, 3), r=4, blocks=2)
    with pytest.raises(ValueError, match="expected blocks that divide the layer's 3 triplets, got 2"):
        FusedSVDLinear(8, 8, r=3, blocks=2)


def test_one_row_through_a_block_layer_leaves_the_base_alone() -> None:
    """As when a model generates, or pools one sequence."""
    options = {"method": "ralora", "r": 2, "blocks": 4, "init_lambda": 0.5, "init": "gaussian"}
    model = igulora.adapt(nn.Sequential(nn.Linear(16, 32)), igulora.IGUConfig(**options))
    layer, x = model[0], torch.randn(1, 16)
    weight, bias = layer.base_layer.weight.clone(), layer.base_layer.bias.clone()
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(y, x @ (weight + layer.delta_weight()).t() + bias)
    assert torch.equal(layer.base_layer.bias, bias)
    assert torch.equal(layer.base_layer.weight, weight)
