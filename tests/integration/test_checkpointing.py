"""Activation checkpointing, accumulation, loss scaling, clipping: the numbers of a plain loop, to the bit where the arithmetic is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import igulora

from .tiny import Block, End, block_batches, block_loss, llama, token_batches, token_loss, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ESTIMATORS: list[dict[str, Any]] = [
    {"estimator": "gauss"},
    {"estimator": "gauss", "path_pass": "separate"},
    {"estimator": "stratified", "aggregate": "absolute"},
    {"estimator": "trapezoid", "include_f0": True},
    {"estimator": "trapezoid", "path_pass": "separate"},
    {"estimator": "on-path", "path": "factors"},
    {"estimator": "on-path-stratified"},
    {"estimator": "instantaneous", "window": 1},
]


def named(options: Any) -> str:
    return "-".join(map(str, options.values())) if isinstance(options, dict) else str(options)


# -- activation checkpointing -----------------------------------------------------------------------------------------------


class Recomputed(Block):
    """Its body runs again in the backward; q, k, v and gate, up read one input each."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", ESTIMATORS, ids=named)
def test_recomputation_changes_no_bit(config, options, reentrant) -> None:
    options = {"dropout": 0.3, "init_lambda": 0.3, "orthogonality": 0.1, "ig_fraction": 0.5, **options}
    batches = block_batches(16)
    plain = train(Block(), config(**options), batches, block_loss)
    train(Recomputed(reentrant), config(**options), batches, block_loss).assert_same_bits(plain)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("path_pass", ["mixed", "separate"])
@pytest.mark.parametrize("again", [False, True], ids=["inputs kept", "inputs recomputed"])
def test_peft_663_a_language_model_with_gradient_checkpointing(config, reentrant, path_pass, again) -> None:
    """And #1745. Dropout, both variants, with inputs of the layers outside checkpoints made again or kept."""

    def run(model: nn.Module, recompute: bool) -> End:
        options = config(
            dropout=0.2, orthogonality=0.1, ig_fraction=0.5, path_pass=path_pass, recompute_inputs=recompute
        )
        return train(model, options, token_batches(16), token_loss)

    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    run(model, again).assert_same_bits(run(llama(), False))


# -- accumulation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"estimator": "instantaneous", "window": 1}, {"estimator": "on-path", "nodes": 2}], ids=named
)
def test_micro_batches_add_up_to_one_batch(config, options) -> None:
    """Four micro-batches of equal counts, one optimizer step. (Estimators that draw nodes for each micro-batch draw others then.)"""
    options = {"orthogonality": 0.1, "init_lambda": 0.3, **options}
    if options["estimator"] == "on-path":
        options |= {"window": 1, "nodes": 1}  # one node: alpha is 1, the sample is the training gradient
    batches = block_batches(12, sizes=(8,))
    whole = train(Block(), config(**options), batches, block_loss)
    if options["estimator"] == "on-path":
        options["window"] = 4
    model = igulora.adapt(Block(), config(**options))
    optimizer = torch.optim.SGD(igulora.param_groups(model, lr=1e-2), momentum=0.9)
    controller = igulora.Controller(model, accumulation_steps=4)
    losses = []
    for x, y in batches:
        parts = [
            controller.backward(lambda b: block_loss(model, b), p) for p in zip(x.split(2), y.split(2), strict=True)
        ]
        losses.append(float(torch.stack(parts).mean()))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert controller.global_step == 12
    End.of(losses, controller).assert_close(whole, rtol=1e-4)


# -- loss scaling -----------------------------------------------------------------------------------------------------------


def scaled(config: Any, options: dict[str, Any], overflow: int | None, skip: bool = False) -> End:
    """Training with a GradScaler of S = 2^10; in step ``overflow`` the loss is infinite (``skip``: that step is left out instead)."""
    model = igulora.adapt(Block(), config(orthogonality=0.1, init_lambda=0.3, **options))
    optimizer = torch.optim.SGD(igulora.param_groups(model, lr=1e-2), momentum=0.9)
    controller = igulora.Controller(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, backoff_factor=0.5, growth_interval=5)
    losses = []
    for step, batch in enumerate(block_batches(16)):
        factor = float("inf") if step == overflow else 1.0
        before = End.of([], controller)
        loss = controller.backward(lambda b, f=factor: block_loss(model, b) * f, batch, scale=scaler.get_scale())
        # GradScaler scales by `scale(loss)`, which ctl.backward has done; it has to be told that there is a scale.
        scaler.scale(loss)
        scaler.step(optimizer)
        scaler.update()
        controller.step()
        optimizer.zero_grad()
        if step == overflow:
            after = End.of([], controller)
            assert torch.equal(after.weight, before.weight)
            assert torch.equal(after.mean, before.mean)
            assert torch.equal(after.deviation, before.deviation)
            assert torch.equal(after.live, before.live)
            assert scaler.get_scale() < 2048.0
        losses.append(float(loss))
    return End.of(losses, controller)


@pytest.mark.parametrize("options", ESTIMATORS[:-1], ids=named)
def test_a_loss_scaler_changes_no_bit(config, options) -> None:
    """Its scales are powers of two, path samples are free of them: single precision gives the same bits."""
    options = {"ig_fraction": 0.5, **options}
    plain = train(Block(), config(orthogonality=0.1, init_lambda=0.3, **options), block_batches(16), block_loss)
    scaled(config, options, None).assert_same_bits(plain)


@pytest.mark.parametrize("options", ESTIMATORS[:-1], ids=named)
@pytest.mark.parametrize("overflow", [2, 3])
def test_an_overflow_skips_its_step_and_leaves_no_trace(config, options, overflow) -> None:
    """In the first and in the second half of a window."""
    end = scaled(config, {"ig_fraction": 0.5, **options}, overflow)
    for t in (end.weight, end.mean, end.deviation):
        assert t.isfinite().all()
    assert end.mean.any()
    assert end.live.sum() == 16


# -- the rest of a loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [True, False])
def test_clipping_sees_the_flat_gradient(config, foreach) -> None:
    model = igulora.adapt(Block(), config(orthogonality=0.1, init_lambda=0.3))
    controller, bank = igulora.Controller(model), model.igulora_bank
    controller.backward(lambda b: block_loss(model, b), block_batches(1)[0])
    before = bank.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=foreach)
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(bank.grad, before * (1e-3 / norm), rtol=1e-3, atol=0)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-5)
    assert bank.grad.abs().max() <= 1e-5


def loops() -> dict[str, Callable[[torch.optim.Optimizer, nn.Module], None]]:
    return {
        "set to none": lambda o, m: o.zero_grad(set_to_none=True),
        "set to zero": lambda o, m: o.zero_grad(set_to_none=False),
        "by the model": lambda o, m: m.zero_grad(),
        "by hand": lambda o, m: [setattr(p, "grad", None) for p in m.parameters()] and None,
    }


def test_every_way_of_zeroing_gradients_trains_the_same(config) -> None:
    ends = []
    for zero in loops().values():
        model = igulora.adapt(Block(), config(orthogonality=0.1, init_lambda=0.3, ig_fraction=0.5))
        optimizer = torch.optim.SGD(igulora.param_groups(model, lr=1e-2), momentum=0.9)
        controller, losses = igulora.Controller(model), []
        for batch in block_batches(16):
            losses.append(float(controller.backward(lambda b, m=model: block_loss(m, b), batch)))
            optimizer.step()
            controller.step()
            zero(optimizer, model)
        ends.append(End.of(losses, controller))
    for end in ends[1:]:
        end.assert_same_bits(ends[0])
