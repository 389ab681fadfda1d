"""Peak memory of one training step of a method beyond the frozen model, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

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
    before = live_storages()
    method = make(model)
    method.prepare(small)
    dearest = max(method.kinds(), key=lambda kind: ("path" in kind, "score" in kind))
    held = sum(size for address, size in live_storages().items() if address not in before)

    def cheap() -> None:
        method.step(small)
        method.seek(dearest, small)

    peak = held + high_water(lambda: method.step(batch), cheap)
    method.seek(dearest, small)
    # The last pass: it is never stepped.
    return {"peak": peak, "held": held, "saved": saved_bytes(lambda: method.backward(batch), method.model)}
