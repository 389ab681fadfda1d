"""Peak memory of one training step of a method beyond the frozen model."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from igulora.measure.memory import live_storages, water_of, water_of_cuda

from .methods import Method


def peak_memory(
    make: Callable[[nn.Module], Method], model: nn.Module, batch: dict[str, Tensor], small: dict[str, Tensor]
) -> dict[str, int]:
    """Bytes beyond ``model``, which exists already, that one method needs for its most expensive kind of step.

    Args:
        make: builds the method on the model. Everything that lives from then on counts: adapters, gradients, optimizer
            and score states, activations, and temporaries inside operators.

    Returns:
        ``held``: what lives between steps, of which ``optimizer`` is the optimizer's state and ``scores`` that of the scores and
        path samples; ``peak``: what is held and the high-water mark of a step; ``saved``: what its forward leaves for its backward
        (:class:`igulora.measure.memory.Water`).
    """
    device = next(model.parameters()).device
    gc.collect()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else live_storages()
    method = make(model)
    method.prepare(small)
    dearest = method.dearest()
    if device.type == "cuda":
        method.seek(dearest, small)
        gc.collect()
        held = torch.cuda.memory_allocated(device) - before
        water = water_of_cuda(lambda: method.step(batch), device)
    else:
        held = sum(size for address, size in live_storages().items() if address not in before)

        def cheap() -> None:
            method.step(small)
            method.seek(dearest, small)

        water = water_of(lambda: method.step(batch), cheap)
    states = [] if method.optimizer is None else [t for s in method.optimizer.state.values() for t in s.values()]
    return {
        "peak": held + water.peak,
        "held": held,
        "optimizer": _bytes(states),
        "scores": _bytes(method.score_state()),
        "saved": water.kept,
    }


def _bytes(values: Iterable[Any]) -> int:
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
