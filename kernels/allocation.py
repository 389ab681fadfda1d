"""Exact top-b over the triplets of the whole model, masks written on the device (ALGORITHMS 2.4).

Contract. Exactly b triplets are kept (fewer only when fewer are eligible), ties broken by the lower triplet index; NaN scores lose
against everything. With ``costs``, triplets are taken in the order of their scores while the running cost stays within the budget.
``min_rank`` keeps the best triplets of every layer first. The budget is a device scalar: no synchronisation, no shape depends on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import as_given, runs_fused


def _reference(
    scores: Tensor, budget: Tensor, layer: Tensor, eligible: Tensor | None, costs: Tensor | None, min_rank: int
) -> Tensor:
    """Returns the live mask, float32 (n,) of 0 and 1."""
    n = scores.shape[0]
    nan = torch.isnan(scores)
    order = torch.argsort(torch.where(nan, torch.full_like(scores, -torch.inf), scores), descending=True, stable=True)
    # Behind the rest, also behind a score of -inf: first the NaN, then what may not be chosen.
    last = nan.to(torch.int8) if eligible is None else torch.where(eligible, nan.to(torch.int8), 2)
    order = order[torch.argsort(last[order], stable=True)]
    if min_rank > 0 and n:
        # Position of each triplet within its layer, best first: sort the score order by layer, keeping it stable.
        by_layer = order[torch.argsort(layer[order], stable=True)]
        position = torch.arange(n, device=scores.device)
        sorted_layer = layer[by_layer]
        is_start = torch.ones_like(sorted_layer, dtype=torch.bool)
        is_start[1:] = sorted_layer[1:] != sorted_layer[:-1]
        start = torch.cummax(torch.where(is_start, position, torch.zeros_like(position)), 0).values
        within = torch.empty_like(position).scatter_(0, by_layer, position - start)
        turn = (within >= min_rank).to(torch.int8)
        turn = turn if eligible is None else torch.where(eligible, turn, 2)
        order = order[torch.argsort(turn[order], stable=True)]
    if costs is None:
        kept = torch.arange(n, device=scores.device) < budget
    else:
        kept = torch.cumsum(costs[order], 0) <= budget
    if eligible is not None:
        kept = kept & eligible[order]
    return torch.zeros_like(scores).scatter_(0, order, kept.to(scores.dtype))


_allocate_triplets = torch.library.custom_op("igulora::allocate_triplets", mutates_args=())(_reference)


@_allocate_triplets.register_fake
def _(scores, budget, layer, eligible, costs, min_rank):
    return torch.empty_like(scores)


@_allocate_triplets.register_kernel(("cpu", "cuda"))
def _dispatch(scores, budget, layer, eligible, costs, min_rank):
    if not runs_fused(scores):
        return _reference(scores, budget, layer, eligible, costs, min_rank)
    from .fused.allocation import launch_allocation  # Triton takes half a second to import

    with as_given(scores):
        return launch_allocation(scores, budget, layer, eligible, costs, min_rank)


def allocate_triplets(
    scores: Tensor,
    budget: Tensor,
    layer: Tensor,
    *,
    eligible: Tensor | None = None,
    costs: Tensor | None = None,
    min_rank: int = 0,
) -> Tensor:
    """Choose the triplets that live.

    Args:
        scores: float32 (n,), one score per triplet, triplets numbered by layer and row.
        budget: int64 (), how many triplets (or how much cost) may live.
        layer: int64 (n,), non-decreasing layer index of each triplet.
        eligible: bool (n,), triplets that may be chosen at all (``prune="hard"``); all by default.
        costs: int64 (n,), what a triplet is charged (``in + out`` for ``budget_unit="parameters"``); 1 each by default.
        min_rank: triplets kept in every layer before the rest competes; part of the budget.

    Returns:
        float32 (n,) mask of 0 and 1.

    Raises:
        ValueError: shapes differ.
    """
    if scores.ndim != 1 or layer.shape != scores.shape:
        raise ValueError(
            f"expected scores and layer of one shape (n,), got {tuple(scores.shape)}, {tuple(layer.shape)}"
        )
    for name, tensor in (("eligible", eligible), ("costs", costs)):
        if tensor is not None and tensor.shape != scores.shape:
            raise ValueError(f"expected {name} of shape {tuple(scores.shape)} like scores, got {tuple(tensor.shape)}")
    return _allocate_triplets(scores, budget, layer, eligible, costs, min_rank)
