"""Peak memory of one training step of a method beyond the frozen model."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from igulora.measure.memory import high_water, live_storages, saved_bytes

from .methods import Method


def peak_memory(
    make: Callable[[nn.Module], Method], model: nn.Module, batch: dict[str, Tensor], small: dict[str, Tensor]
) -> dict[str, int]:
    """Bytes beyond ``model``, which exists already, that one method needs for its most expensive kind of step.

    Args:
        make: builds the method on the model. Everything that lives from then on counts: adapters, gradients, optimizer
            and score states, activations, and temporaries inside operators.

    Returns:
        ``held``: what lives between steps; ``peak``: that and the high-water mark of a step; ``saved``: what its forward keeps for
        its backward (:func:`igulora.measure.memory.saved_bytes`).
    """
    if next(model.parameters()).device.type == "cuda":
        return _on_cuda(make, model, batch, small)
    before = live_storages()
    method = make(model)
    method.prepare(small)
    dearest = _dearest(method)
    held = sum(size for address, size in live_storages().items() if address not in before)

    def cheap() -> None:
        method.step(small)
        method.seek(dearest, small)

    peak = held + high_water(lambda: method.step(batch), cheap)
    method.seek(dearest, small)
    # The last pass: it is never stepped.
    return {"peak": peak, "held": held, "saved": saved_bytes(lambda: method.backward(batch), method.model)}


def _dearest(method: Method) -> str:
    return max(method.kinds(), key=lambda kind: ("path" in kind, "score" in kind))


def _on_cuda(
    make: Callable[[nn.Module], Method], model: nn.Module, batch: dict[str, Tensor], small: dict[str, Tensor]
) -> dict[str, int]:
    """The same from the statistics of CUDA's allocator."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    method = make(model)
    method.prepare(small)
    dearest = _dearest(method)
    method.seek(dearest, small)
    gc.collect()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    method.step(batch)
    peak = torch.cuda.max_memory_allocated() - before
    method.seek(dearest, small)
    return {"peak": peak, "held": held, "saved": saved_bytes(lambda: method.backward(batch), method.model)}
