"""Exact top-b without a sort (ALGORITHMS 2.4); what it computes is said in ``kernels/allocation.py``.

Contract. A triplet lives when fewer than b come before it in the total order of the reference (level, score downwards, index upwards), or
with costs when its own and theirs sum to at most b: every triplet counts for itself, so nothing is sorted, no step waits for another, and
the mask is the reference's bit for bit. Integer arithmetic throughout; no atomics. Quadratic in the number of triplets, of which even a
large model has few: 10^4 take 10^8 comparisons, about one launch's latency.

The order is that of one int64 per triplet, larger first: bits 60-62 level, 28-59 score as an order-preserving unsigned integer, 0-27 index
from the end. Levels: 4 within ``min_rank`` of its layer, 3 the same but NaN, 2 and 1 the rest, 0 not eligible.

1. ``_turn_kernel``, only with ``min_rank``: which triplets are among the first of their layer.
2. ``_keep_kernel``: the mask.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..traffic import Traffic
from .common import Specimen, cdiv

# Triplets per program, and others that they are compared with at a time: enough programs for small models, and what registers hold.
_BLOCK_I, _BLOCK_J = 16, 256
_WARPS = 4
_MOST = 1 << 28  # triplets, by the bits of a key that hold the index


@triton.jit
def _keys(scores_ptr, eligible_ptr, turn_ptr, i, N):
    """Sort keys of some triplets; -1, which comes after all others, beyond the last."""
    mask = i < N
    score = tl.load(scores_ptr + i, mask=mask, other=0.0).to(tl.float32)
    nan = score != score
    score = tl.where(nan, float("-inf"), score)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True).to(tl.int64)  # -0 ties with 0
    # A negative number has its sign bit set and grows as the rest of its bits falls.
    upward = tl.where(bits >= 0, bits + 2147483648, -1 - bits)
    level = tl.where(nan, 1, 2)
    if turn_ptr is not None:
        level += 2 * tl.load(turn_ptr + i, mask=mask, other=0).to(tl.int32)
    if eligible_ptr is not None:
        level = tl.where(tl.load(eligible_ptr + i, mask=mask, other=0) != 0, level, 0)
    key = (level.to(tl.int64) << 60) | (upward << 28) | (268435455 - i).to(tl.int64)
    return tl.where(mask, key, -1)


@triton.jit(do_not_specialize=["min_rank"])
def _turn_kernel(
    scores_ptr, eligible_ptr, layer_ptr, turn_ptr, N, min_rank, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    key = _keys(scores_ptr, eligible_ptr, None, i, N)
    layer = tl.load(layer_ptr + i, mask=i < N, other=-1).to(tl.int32)
    before = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    for start in range(0, N, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other_key = _keys(scores_ptr, eligible_ptr, None, j, N)
        other_layer = tl.load(layer_ptr + j, mask=j < N, other=-1).to(tl.int32)
        first = (other_key[None, :] > key[:, None]) & (other_layer[None, :] == layer[:, None])
        before += first.to(tl.int32)
    turn = tl.sum(before, 1) < min_rank
    tl.store(turn_ptr + i, turn.to(tl.int8), mask=i < N)


@triton.jit
def _keep_kernel(
    scores_ptr,
    eligible_ptr,
    turn_ptr,
    costs_ptr,
    budget_ptr,
    mask_ptr,
    N,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    key = _keys(scores_ptr, eligible_ptr, turn_ptr, i, N)
    budget = tl.load(budget_ptr).to(tl.int64)
    spent = tl.zeros((BLOCK_I, BLOCK_J), tl.int32 if costs_ptr is None else tl.int64)
    for start in range(0, N, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        # Keys differ: these are the triplets before i, and i.
        until = _keys(scores_ptr, eligible_ptr, turn_ptr, j, N)[None, :] >= key[:, None]
        if costs_ptr is None:
            spent += until.to(tl.int32)
        else:
            cost = tl.load(costs_ptr + j, mask=j < N, other=0).to(tl.int64)
            spent += tl.where(until, cost[None, :], 0)
    live = tl.sum(spent, 1).to(tl.int64) <= budget
    if eligible_ptr is not None:
        live = live & (tl.load(eligible_ptr + i, mask=i < N, other=0) != 0)
    tl.store(mask_ptr + i, live.to(tl.float32), mask=i < N)


def launch_allocation(
    scores: Tensor, budget: Tensor, layer: Tensor, eligible: Tensor | None, costs: Tensor | None, min_rank: int
) -> Tensor:
    """The live mask (n,), in the dtype of the scores.

    Raises:
        ValueError: more triplets than a key can number.
    """
    n = scores.shape[0]
    if n > _MOST:
        raise ValueError(f"expected at most {_MOST} triplets, got {n}")
    mask = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if n == 0:
        return mask
    scores, layer, budget = scores.contiguous(), layer.contiguous(), budget.to(scores.device)
    eligible = None if eligible is None else eligible.contiguous()
    costs = None if costs is None else costs.contiguous()
    turn = torch.empty(n, dtype=torch.int8, device=scores.device) if min_rank > 0 else None
    grid = (cdiv(n, _BLOCK_I),)
    blocks = {"BLOCK_I": _BLOCK_I, "BLOCK_J": _BLOCK_J, "num_warps": _WARPS}
    if turn is not None:
        _turn_kernel[grid](scores, eligible, layer, turn, n, min_rank, **blocks)
    _keep_kernel[grid](scores, eligible, turn, costs, budget, mask, n, **blocks)
    return mask


def traffic_allocation(n: int, *, eligible: bool = False, costs: bool = False, min_rank: int = 0) -> Traffic:
    """Of ``n`` triplets: one launch, or two with ``min_rank``. All but the first read of anything comes from the caches."""
    if n == 0:
        return Traffic()
    programs = cdiv(n, _BLOCK_I)
    key = 4 + (1 if eligible else 0)  # bytes per triplet
    total = Traffic()
    if min_rank > 0:
        total += Traffic(read=n * (key + 8), loaded=(programs + 1) * n * (key + 8), written=n, stored=n)
        key += 1
    others = key + (8 if costs else 0)
    own = key + (1 if eligible else 0)
    loaded = programs * n * others + n * own + programs * 8
    return total + Traffic(read=n * others + 8, loaded=loaded, written=4 * n, stored=4 * n)


def specimens(family: str) -> list[Specimen]:
    """Every kernel as it is launched; the same on all families."""
    found = []

    def add(label: str, kernel: Any, types: dict[str, str], optional: dict[str, str], given: tuple[str, ...]) -> None:
        types = {**types, **{f"{name}_ptr": optional[name] for name in given}}
        absent = {f"{name}_ptr": None for name in optional if name not in given}
        constants: dict[str, Any] = {"BLOCK_I": _BLOCK_I, "BLOCK_J": _BLOCK_J, **absent}
        found.append(
            Specimen(
                label,
                kernel,
                types,
                constants,
                num_warps=_WARPS,
                dots=False,
                narrow_loads="flags of a byte",
                narrow_stores="a program has 16 triplets of its own",
            )
        )

    turn = {"scores_ptr": "*fp32", "layer_ptr": "*i64", "turn_ptr": "*i8", "N": "i32", "min_rank": "i32"}
    add("turn", _turn_kernel, turn, {"eligible": "*u1"}, ())
    add("turn of some", _turn_kernel, turn, {"eligible": "*u1"}, ("eligible",))
    keep = {"scores_ptr": "*fp32", "budget_ptr": "*i64", "mask_ptr": "*fp32", "N": "i32"}
    optional = {"eligible": "*u1", "turn": "*i8", "costs": "*i64"}
    add("keep", _keep_kernel, keep, optional, ())
    add("keep of some", _keep_kernel, keep, optional, ("eligible",))
    add("keep after turns", _keep_kernel, keep, optional, ("turn",))
    add("keep by costs", _keep_kernel, keep, optional, ("costs",))
    add("keep of some by costs after turns", _keep_kernel, keep, optional, ("eligible", "turn", "costs"))
    return found
