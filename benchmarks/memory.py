"""Peak memory of one training step of a method beyond the frozen model."""

from __future__ import annotations

import gc
from collections.abc import Callable

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
        ``held``: what lives between steps; ``peak``: that and the high-water mark of a step; ``saved``: what its forward leaves for
        its backward (:class:`igulora.measure.memory.Water`).
    """
    cuda = next(model.parameters()).device.type == "cuda"
    gc.collect()
    before = torch.cuda.memory_allocated() if cuda else live_storages()
    method = make(model)
    method.prepare(small)
    dearest = max(method.kinds(), key=lambda kind: ("path" in kind, "score" in kind))
    if cuda:
        method.seek(dearest, small)
        gc.collect()
        held = torch.cuda.memory_allocated() - before
        water = water_of_cuda(lambda: method.step(batch))
    else:
        held = sum(size for address, size in live_storages().items() if address not in before)

        def cheap() -> None:
            method.step(small)
            method.seek(dearest, small)

        water = water_of(lambda: method.step(batch), cheap)
    return {"peak": held + water.peak, "held": held, "saved": water.kept}
