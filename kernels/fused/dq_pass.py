"""One pass over x for dQ of one to three layers that read it.

Contract. x (M, K) and G_i (M, padded rank), the gradient of S_i without any group's factor, in one dtype of bfloat16, float16, float32;
``dQ_i = (f G_i)^T dropout(x)`` with f alpha for training rows and the path weight for path rows; float32 accumulation and partial sums,
one for each split of the rows, to be added up in order by ``sums.py``. Of block-diagonal adapters (n blocks) G_i is (n, M, padded rank) and
dQ_i (n r_i, K / n). One launch.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..traffic import Traffic
from .common import (
    NARROW,
    SCALING_DTYPES,
    SPECIMEN_DTYPES,
    TYPE_NAMES,
    Specimen,
    Tile,
    Where,
    block_rank,
    cdiv,
    dot_precision,
    keep_arguments,
    padded_rank,
    processors,
)
from .launch import Plan, launch, planned
from .project import each, members
from .segments import FACTOR_ARGUMENTS, SEGMENT_ARGUMENTS, Segments, factor_pointers, row_factors, split_rows
from .tiles import keep_tile


@cache
def config(family: str, itemsize: int, BLOCK_R: int, count: int, dropout: bool = False) -> Tile:
    """Columns of x per program: the float32 accumulators of all members stay within 64 registers a thread."""
    width = BLOCK_R * count
    if itemsize == 4:
        return Tile(BLOCK_M=32, BLOCK_K=64 if width <= 64 else 32, num_warps=8 if width > 64 else 4, num_stages=1)
    BLOCK_K = 128 if width <= 128 else 64 if width <= 256 else 32
    stages = 2 if family in ("sm_86", "sm_120") or width > 384 else 3
    if family == "sm_100" and dropout and count > 1:
        stages = 1  # Triton 3.6 fails to pipeline several products with an operand that was changed in registers
    return Tile(
        BLOCK_M=64 if 16 < width <= 384 else 32, BLOCK_K=BLOCK_K, num_warps=8 if width > 32 else 4, num_stages=stages
    )


_UNSPECIALISED = ["M", "R0", "R1", "R2", "rows_per_group", "threshold", *FACTOR_ARGUMENTS, *SEGMENT_ARGUMENTS]


@triton.jit
def _member_product(
    x,
    g_ptr,
    rows,
    end,
    first,
    factor,
    acc,
    G_COLS,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    r = tl.arange(0, BLOCK_R)
    inside = (rows[:, None] < end) & (r[None, :] < G_COLS)
    g = tl.load(g_ptr + (first + rows)[:, None] * G_COLS + r[None, :], mask=inside, other=0.0)
    if SCALED:
        g = (g * factor[:, None]).to(g.dtype)
    return tl.dot(tl.trans(x), g, acc, input_precision=PRECISION)  # (BLOCK_K, BLOCK_M) @ (BLOCK_M, BLOCK_R)


@triton.jit
def _store_member(part_ptr, at, columns, R, K, acc, keep_scale, DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr):
    r = tl.arange(0, BLOCK_R)
    if DROPOUT:
        acc *= keep_scale
    part = part_ptr + (at * R + r)[None, :] * K + columns[:, None]
    tl.store(part, acc, mask=(columns[:, None] < K) & (r[None, :] < R))


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=NARROW)
def _dq_pass_kernel(
    x_ptr,
    g0_ptr,
    g1_ptr,
    g2_ptr,
    part0_ptr,
    part1_ptr,
    part2_ptr,
    alpha_ptr,
    weight_ptr,
    seed_ptr,
    M,
    K,
    R0,
    R1,
    R2,
    G0_COLS,
    G1_COLS,
    G2_COLS,
    stride_xm,
    rows_per_group,
    has_alpha,
    has_weight,
    end0,
    start1,
    end1,
    splits0,
    per_split,
    threshold,
    keep_scale,
    MEMBERS: tl.constexpr,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first_column, split = tl.program_id(0) * BLOCK_K, tl.program_id(1)
    block, blocks = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    of_block = block * M  # the block's first row of G
    columns = first_column + tl.arange(0, BLOCK_K)
    first, end = split_rows(split, end0, start1, end1, splits0, per_split)
    in_first = split < splits0
    acc0 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    acc1 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    acc2 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for m in range(first, end, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        at = x_ptr + block * K + rows.to(tl.int64)[:, None] * stride_xm + columns[None, :]
        x = tl.load(at, mask=(rows[:, None] < end) & (columns[None, :] < K), other=0.0)
        if DROPOUT:
            keep = keep_tile(seed_ptr, rows, block * K + first_column, K * blocks, threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        if SCALED:
            factor = row_factors(alpha_ptr, weight_ptr, has_alpha, has_weight, rows, end, rows_per_group, in_first)
        else:
            factor = None
        acc0 = _member_product(x, g0_ptr, rows, end, of_block, factor, acc0, G0_COLS, SCALED, PRECISION, BLOCK_R)
        if MEMBERS > 1:
            acc1 = _member_product(x, g1_ptr, rows, end, of_block, factor, acc1, G1_COLS, SCALED, PRECISION, BLOCK_R)
        if MEMBERS > 2:
            acc2 = _member_product(x, g2_ptr, rows, end, of_block, factor, acc2, G2_COLS, SCALED, PRECISION, BLOCK_R)
    _store_member(part0_ptr, split * blocks + block, columns, R0, K, acc0, keep_scale, DROPOUT, BLOCK_R)
    if MEMBERS > 1:
        _store_member(part1_ptr, split * blocks + block, columns, R1, K, acc1, keep_scale, DROPOUT, BLOCK_R)
    if MEMBERS > 2:
        _store_member(part2_ptr, split * blocks + block, columns, R2, K, acc2, keep_scale, DROPOUT, BLOCK_R)


@cache
def dq_segments(end0: int, start1: int, end1: int, K: int, tile: Tile, device: Where, windows: int = 1) -> Segments:
    """Splits of the rows of x: about two programs for each processor."""
    wanted = 2 * processors(device) // (cdiv(K, tile.BLOCK_K) * windows)
    return Segments.of(end0, start1, end1, tile.BLOCK_M, wanted)


@planned
def _plan(
    M: int,
    K: int,
    ranks: tuple[int, ...],
    columns: tuple[int, ...],
    stride: int,
    rows_per_group: int,
    segments: Segments,
    windows: int,
    keep: tuple[int, float],
    factors: tuple[bool, bool],
    dtype: torch.dtype,
    tile: Tile,
) -> Plan:
    constants = {
        "MEMBERS": len(ranks),
        # With dropout G is taken to be scaled, be it by 1: a kernel fewer for what is lost beside drawing the words.
        "SCALED": any(factors) or keep[0] != 0,
        "DROPOUT": keep[0] != 0,
        "PRECISION": dot_precision(dtype),
        "BLOCK_R": block_rank(max(ranks)),
        **tile.blocks("BLOCK_M", "BLOCK_K"),
    }
    numbers = (M, K, *each(ranks), *each(columns), stride, rows_per_group, *map(int, factors), *segments.numbers, *keep)
    return Plan(_dq_pass_kernel, (cdiv(K, tile.BLOCK_K), segments.splits, windows), numbers, constants)


def launch_dq_pass(
    x2: Tensor,
    Gs: list[Tensor],
    ranks: list[int],
    parts: list[Tensor],
    alpha: Tensor | None,
    path_weight: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    rows_per_group: int,
    segments: Segments,
    tile: Tile,
) -> None:
    """Fill ``parts``: (splits, n r_i, K / n) float32 partial sums of dQ_i, those of the first segment first; ``ranks`` are n r_i."""
    windows = x2.shape[1] // parts[0].shape[2]
    keep, factors = keep_arguments(seed, dropout_p), (alpha is not None, path_weight is not None)
    plan = _plan(
        x2.shape[0],
        parts[0].shape[2],
        tuple([r // windows for r in ranks]),
        tuple([G.shape[-1] for G in Gs]),
        x2.stride(0),
        rows_per_group,
        segments,
        windows,
        keep,
        factors,
        x2.dtype,
        tile,
    )
    pointers = factor_pointers(plan.constants["SCALED"], alpha, path_weight, parts[0])
    launch(plan, x2, *each(Gs), *each(parts), *pointers, seed)


def traffic_dq_pass(
    K: int,
    ranks: list[int],
    itemsize: int,
    segments: Segments,
    tile: Tile,
    *,
    alpha: bool = False,
    weight: bool = False,
    groups: int = 1,
    seeded: bool = False,
    windows: int = 1,
) -> Traffic:
    """Of one :func:`launch_dq_pass`; K columns and the ranks in each of the windows."""
    blocks, columns = cdiv(K, tile.BLOCK_K), sum(padded_rank(r) for r in ranks)
    rows0, rows1 = segments.end0, segments.end1 - segments.start1
    rows = rows0 + rows1
    per_group = segments.end1 // groups
    # Programs read the seed once for every block of rows.
    in_blocks = sum(
        cdiv(min(segments.per_split, count - i * segments.per_split), tile.BLOCK_M)
        for count, splits in ((rows0, segments.splits0), (rows1, segments.splits1))
        for i in range(splits)
    )
    stored = 4 * segments.splits * sum(ranks) * K
    distinct = 4 * (cdiv(rows0, per_group) * alpha + cdiv(rows1, per_group) * weight)
    return Traffic(
        read=rows * (K + columns) * itemsize + distinct + 8 * seeded,
        written=stored,
        loaded=rows * (K + blocks * columns) * itemsize
        + 4 * blocks * (rows0 * alpha + rows1 * weight)
        + 8 * seeded * blocks * in_blocks,
        stored=stored,
        flops=2 * rows * K * sum(ranks),
    ).in_windows(windows, shared=distinct + 8 * seeded)


def specimens(family: str) -> list[Specimen]:
    """Every configuration of :func:`launch_dq_pass` on a family: rows with factors or without, dropout."""
    found = []
    for dtype in SCALING_DTYPES:
        name = TYPE_NAMES[dtype]
        types = {"x_ptr": f"*{name}", "alpha_ptr": "*fp32", "weight_ptr": "*fp32", "seed_ptr": "*i64"}
        types |= {f"g{i}_ptr": f"*{name}" for i in range(3)} | {f"part{i}_ptr": "*fp32" for i in range(3)}
        types |= {f"G{i}_COLS": "i32" for i in range(3)}
        types |= dict.fromkeys(("K", "stride_xm", *_UNSPECIALISED), "i32")
        types |= {"keep_scale": "fp32"}
        for BLOCK_R in (16, 32, 64, 128, 256):
            for count in range(1, members(BLOCK_R) + 1):
                for scaled, dropout in ((False, False), (True, False), (True, True)):
                    if dtype not in SPECIMEN_DTYPES and not scaled:
                        continue
                    constants = {
                        "MEMBERS": count,
                        "SCALED": scaled,
                        "DROPOUT": dropout,
                        "PRECISION": dot_precision(dtype),
                        "BLOCK_R": BLOCK_R,
                    }
                    tile = config(family, dtype.itemsize, BLOCK_R, count, dropout)
                    kind = " dropout" if dropout else " scaled" * scaled
                    label = f"dq pass {name} r{BLOCK_R} x{count}{kind}"
                    found.append(tile.specimen(label, _dq_pass_kernel, types, constants))
    return found
