"""Complaints of other libraries' users that are about cost or arithmetic: one test each, named after the thread (docs/threads.md)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import igulora
from igulora.measure.counting import Counting


class Block(nn.Module):
    """Two wide layers and a non-linearity in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


ROWS = 96


def kept_for_backward(run: Callable[[], Any]) -> list[Tensor]:
    """Tensors with a row per token that a forward keeps."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.ndim >= 2 and t.shape[:-1].numel() == ROWS:
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return kept


def test_agilerl_623_no_float32_copies_of_inputs() -> None:
    model = igulora.adapt(Block(), igulora.IGUConfig(r=4, total_steps=200)).train()
    x = torch.randn(ROWS, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = kept_for_backward(lambda: model(x))
    assert {t.shape[-1] for t in kept} >= {64, 128, 4}  # both inputs and S
    assert all(t.dtype == torch.bfloat16 for t in kept)
    # What adapters add to the frozen layers' own is their inputs, not copies of them, and S.
    storages = {t.untyped_storage().data_ptr() for t in kept if t.shape[-1] == 64}
    assert storages == {x.untyped_storage().data_ptr()}


def test_peft_960_an_adapted_step_computes_less_than_full_training() -> None:
    adapted = igulora.adapt(Block(), igulora.IGUConfig(r=4, total_steps=200, estimator="instantaneous")).train()
    controller = igulora.Controller(adapted)
    x = torch.randn(ROWS, 64, dtype=torch.bfloat16)

    def flops(step: Callable[[], Any]) -> float:
        with Counting() as counter:
            step()
        return counter.total.flops

    with igulora.adapters_disabled(adapted):
        forward = flops(lambda: adapted(x))
    full = Block()
    whole = flops(lambda: full(x).float().square().mean().backward())
    ours = flops(lambda: controller.backward(lambda b: adapted(b).float().square().mean(), x))
    # Forward and weight gradients of all layers, and the input gradient of the second.
    assert whole == 5 * forward // 2
    assert forward < ours < whole


def test_unsloth_1385_adalora_is_a_setting() -> None:
    options = igulora.IGUConfig(method="adalora", r=4, target_rank=2, total_steps=30, t_init=5, t_final=5, delta_t=1)
    model = igulora.adapt(Block().float(), options).train()
    controller = igulora.Controller(model)
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))
    for _ in range(30):
        controller.backward(lambda x: model(x).square().mean(), torch.randn(8, 64))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert sum(controller.live_ranks().values()) == controller.budget == 4


def test_axolotl_3800_a_graph_may_be_run_backward_twice() -> None:
    model = igulora.adapt(Block().float(), igulora.IGUConfig(method="lora", r=4)).train()
    nn.init.normal_(model.up.lora_P, std=0.1)
    x = torch.randn(8, 64, requires_grad=True)
    loss = model(x).square().mean()
    wanted = [x, model.up.lora_P, model.up.lora_Q, model.down.lora_Q]
    once = torch.autograd.grad(loss, wanted, retain_graph=True)
    twice = torch.autograd.grad(loss, wanted)
    assert all(g.abs().max() > 0 for g in once[:3])
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)


def test_axolotl_3800_gradients_that_others_hold_are_not_overwritten() -> None:
    """The in-place update and the accumulators write into nothing but what is theirs."""
    model = igulora.adapt(Block().float(), igulora.IGUConfig(method="lora", r=4)).train()
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(_module: nn.Module, _inputs: Any, gradients: tuple[Tensor, ...]) -> None:
        seen.append((gradients[0], gradients[0].clone()))

    for layer in (model.up, model.down):
        layer.register_full_backward_hook(watch)
    x = torch.randn(8, 64, requires_grad=True)
    before = x.detach().clone()
    model(x).square().mean().backward()
    assert len(seen) == 2
    assert all(torch.equal(now, then) for now, then in seen)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_peft_541_and_581_everything_follows_the_model_to_its_device(kind: str) -> None:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = igulora.adapt(Block(), igulora.IGUConfig(r=4, total_steps=200))
    there = copy.deepcopy(model).to(kind)
    controller = igulora.Controller(there)
    controller.backward(
        lambda b: there(b).float().square().mean(), torch.randn(4, 64, dtype=torch.bfloat16, device=kind)
    )
    state = controller.state_dict()
    assert {t.device.type for t in (*there.parameters(), *there.buffers())} == {kind}
    bank = controller.bank
    assert {t.device.type for t in (bank.weight, bank.mask, bank.live, bank.path, controller.importance.mean)} == {kind}
    assert {t.device.type for t in state["tensors"].values()} == {"cpu"}
