"""merge, unmerge, and compact: the rows that go, the states that follow, the training that does not notice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import igulora
from igulora import find_bank


def test_merged_outputs(net, config) -> None:
    model, x = igulora.adapt(net(), config()), torch.randn(4, 8)
    for layer in model.igulora_bank.layers:
        nn.init.normal_(layer.lora_E)
    y, base = model(x), [layer.weight.detach().clone() for layer in model.igulora_bank.layers]
    assert igulora.merge(model) is model
    torch.testing.assert_close(model(x), y)
    with pytest.raises(ValueError, match="got a merged one"):
        igulora.merge(model)
    with pytest.raises(ValueError, match="unmerge"):
        igulora.compact(model)
    assert igulora.unmerge(model) is model
    torch.testing.assert_close([layer.weight.detach() for layer in model.igulora_bank.layers], base)
    with pytest.raises(ValueError, match="got an unmerged one"):
        igulora.unmerge(model)


def test_training_a_merged_model_is_an_error(net, config, trainer, batches, loss_of) -> None:
    model, controller, _ = trainer(net(), config())
    igulora.merge(model)
    with pytest.raises(ValueError, match="unmerged model to train"):
        controller.backward(loss_of(model), batches(1)[0])


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize(("prune", "at"), [("soft", 16), ("hard", 16), ("hard", 11)])
@pytest.mark.parametrize("zeroed", [True, False])
def test_training_after_compaction_does_not_notice(net, config, run, batches, loss_of, name, prune, at, zeroed) -> None:
    """With orthogonality off, which is taken over stored rows. ``zeroed``: compacted after or before zero_grad."""
    runs = []
    for compacted in (False, True):
        model = igulora.adapt(net(), config(prune=prune, modules_to_save=["head"]))
        optimizer = OPTIMIZERS[name](igulora.param_groups(model, lr=1e-2, lambda_lr_ratio=10.0))
        controller, data = igulora.Controller(model), batches(21)
        losses = run(model, controller, optimizer, data[: at - 1])
        controller.backward(loss_of(model), data[at - 1])
        optimizer.step()
        controller.step()
        if zeroed:
            optimizer.zero_grad()
        bank, x = find_bank(model), data[0][0]
        if compacted:
            before, live, size = model(x).detach(), bank.ranks(), bank.weight.numel()
            rows = {n: layer.mask > 0 for n, layer in zip(bank.names, bank.layers, strict=True)}
            wanted = {
                n: layer.lora_P.detach()[rows[n]].clone() for n, layer in zip(bank.names, bank.layers, strict=True)
            }
            moments = {
                n: {k: v[rows[n]].clone() for k, v in optimizer.state[layer.lora_Q].items() if v.ndim == 2}
                for n, layer in zip(bank.names, bank.layers, strict=True)
            }
            means = {k: v.clone() for k, v in bank.matrix_views(controller.importance.mean).items()}
            params = [id(p) for p in model.parameters()]
            assert igulora.compact(model, optimizer, controller) is model
            torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-7)
            assert [id(p) for p in model.parameters()] == params
            assert bank.triplets == sum(live.values()) == controller.history[-1]["budget"]
            assert bank.ranks() == live
            assert bank.weight.numel() < size
            for n, layer in zip(bank.names, bank.layers, strict=True):
                assert layer.r == live[n]
                assert torch.equal(layer.lora_P, wanted[n])
                for key, value in moments[n].items():
                    assert torch.equal(optimizer.state[layer.lora_Q][key], value)
            for (n, part), view in bank.matrix_views(controller.importance.mean).items():
                assert torch.equal(view, means[n, part][rows[n]])
            for p in (p for layer in bank.layers for p in (layer.lora_P, layer.lora_E, layer.lora_Q)):
                assert p.grad is None or not zeroed or torch.count_nonzero(p.grad) == 0
        optimizer.zero_grad()
        losses += run(model, controller, optimizer, data[at:])
        runs.append((losses, bank.ranks(), controller.history, model(x).detach()))
    assert (
        runs[0][0][: at - 1] == runs[1][0][: at - 1]
    )  # the next is the first of fewer rows, and may be rounded otherwise
    torch.testing.assert_close(torch.tensor(runs[0][0]), torch.tensor(runs[1][0]), rtol=1e-5, atol=1e-7)
    assert runs[0][1:3] == runs[1][1:3]
    torch.testing.assert_close(runs[0][3], runs[1][3], rtol=1e-4, atol=1e-6)


def test_every_rank_zero(net, config, trainer, run, batches) -> None:
    model, controller, optimizer = trainer(net(), config(target_rank=0))
    run(model, controller, optimizer, batches(16))
    assert set(controller.live_ranks().values()) == {0}
    igulora.compact(model, optimizer, controller)
    x = batches(1)[0][0]
    with igulora.adapters_disabled(model):
        base = model(x)
    assert torch.equal(model(x), base)
    assert find_bank(model).weight.numel() == 0


def test_twice_is_once(net, config, trainer, run, batches) -> None:
    model, controller, optimizer = trainer(net(), config())
    run(model, controller, optimizer, batches(16))
    igulora.compact(model, optimizer, controller)
    held = find_bank(model).weight.clone()
    igulora.compact(model, optimizer, controller)
    assert torch.equal(find_bank(model).weight, held)


def test_without_optimizer_and_controller(net, config, trainer, run, batches) -> None:
    model, controller, optimizer = trainer(net(), config())
    run(model, controller, optimizer, batches(16))
    twin, x = copy.deepcopy(model), torch.randn(3, 8)
    igulora.compact(twin)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-6, atol=1e-7)


def test_ranks_that_may_grow_back_are_refused(net, config, trainer, run, batches) -> None:
    model, controller, optimizer = trainer(net(), config())
    run(model, controller, optimizer, batches(10))
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match=r"pruned triplets that may still grow back.*after step"):
        igulora.compact(model, optimizer, controller)
    assert [p.shape for p in model.parameters()] == shapes
    other = igulora.Controller(igulora.adapt(net(), config()))
    run(model, controller, optimizer, batches(6))
    with pytest.raises(ValueError, match="one of another model"):
        igulora.compact(model, optimizer, other)
    assert [p.shape for p in model.parameters()] == shapes


def test_chance_keeps_its_choice_through_compaction(net, config, trainer, run, batches) -> None:
    """method="random" draws once for all triplets of the start; dropping rows in between must not draw again."""
    ends = []
    for compacted in (False, True):
        model, controller, optimizer = trainer(net(), config(method="random", prune="hard"))
        run(model, controller, optimizer, batches(10))
        if compacted:
            igulora.compact(model, optimizer, controller)
        run(model, controller, optimizer, batches(8))
        ends.append(controller.live_ranks())
    assert ends[0] == ends[1]
