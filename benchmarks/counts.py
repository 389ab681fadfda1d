"""Launches and host syncs of one step of a method, and how many of them are bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from igulora.measure.counting import Counting

from .methods import Method


def _count(run: Callable[[], object]) -> Counting:
    with Counting() as counting:
        run()
    return counting


def count_step(method: Method, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Counts of one step of a prepared method, which is not to be used afterwards: its last pass is never stepped.

    Returns:
        ``bookkeeping``: launches for orthogonality, scores, schedule and masks, that is those of the step beyond the
            model's own
        forward and backward and the optimizer; ``syncs`` of the same; ``step``: launches of the whole step; and both by
        operator.
    """
    step = _count(lambda: method.step(batch))
    method.make_gradients()
    backward = _count(lambda: method.backward(batch))
    if method.optimizer is not None:
        method.optimizer.step()
    book = _count(method.book)
    method.make_gradients()
    bare = _count(lambda: method.bare(batch))
    launches = backward.launches - bare.launches + book.launches
    syncs = backward.syncs - bare.syncs + book.syncs
    return {
        "step": sum(step.launches.values()),
        "bookkeeping": sum(launches.values()),
        "bookkeeping_by_operator": dict(launches.most_common(16)),
        "syncs": sum(syncs.values()),
        "syncs_by_operator": dict(syncs.most_common(8)),
    }
