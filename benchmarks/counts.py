"""Launches and host syncs of one step of a method, and how many of them are bookkeeping."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from igulora.measure.counting import Counting
from igulora.measure.parts import PartTracker

from .methods import Method

BOOKKEEPING = ("orthogonality", "scores", "allocation")


def count_step(method: Method, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Counts of a prepared method's steps, kinds of steps averaged by their shares.

    Returns:
        ``step``: kernels launched, as a GPU would see them; ``bookkeeping``: those of orthogonality, scores and allocation;
        ``syncs``: waits for the device; ``kinds``: the same for each kind of step. Whole numbers where there is one kind.
    """
    kinds = {}
    for kind in method.kinds():
        method.seek(kind, batch)
        device = next(method.model.parameters()).device
        with PartTracker(method.model, method.optimizer) as tracker, Counting(tracker.current, device) as counting:
            method.step(batch)
        kinds[kind] = {
            "step": counting.total.launches,
            "bookkeeping": sum(counting.costs[part].launches for part in BOOKKEEPING if part in counting.costs),
            "syncs": counting.syncs.total(),
        }
    shares = method.kinds()
    mean = {
        key: sum(share * kinds[kind][key] for kind, share in shares.items()) if len(kinds) > 1 else found
        for key, found in next(iter(kinds.values())).items()
    }
    return {**mean, "kinds": kinds}
