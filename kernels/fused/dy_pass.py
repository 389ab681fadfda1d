"""One pass over dy for everything the adapter needs of it: the gradient of S, dP and dlambda.

Contract. dy (M, N) and S (M, padded rank) in one dtype of bfloat16, float16, float32; masters float32; accumulation in float32.
Of a block-diagonal adapter (n blocks) P is (n r, N / n) and S (n, M, padded rank): its blocks are worked on as layers of their own.
A program owns a block of columns and a split of rows: its columns of P stay on the chip, its share of ``dP = c (f S)^T dy`` in registers;
of ``dy P^T`` it leaves a partial sum for each row. A second, small launch adds those up: G = c (dy P^T), rounded once, and the partial
sums of ``dlambda = s m sum f S (dy P^T)``. f is alpha for training rows and the path weight for path rows. The partial sums of dy P^T
(M x rank x 4 bytes for each block of columns) are written and read at once: they are meant to stay in the L2 cache. Where they are too many
for that (wide ranks, very wide layers), dy P^T takes a pass of its own.
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
    padded_rank,
    processors,
)
from .launch import Plan, launch, planned
from .segments import FACTOR_ARGUMENTS, SEGMENT_ARGUMENTS, Segments, factor_pointers, row_factors, split_rows
from .sums import sum_of_parts
from .tiles import coefficients, group_factor


@cache
def config(family: str, itemsize: int, BLOCK_R: int) -> Tile:
    """As many columns as registers allow: each block of columns leaves one set of partial sums."""
    if itemsize == 4:
        BLOCK_M, BLOCK_N = (32, 64 if BLOCK_R <= 32 else 32) if BLOCK_R <= 128 else (16, 32)
        return Tile(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4 if BLOCK_R <= 16 else 8, num_stages=1)
    BLOCK_N = 256 if BLOCK_R <= 32 else 128 if BLOCK_R <= 64 else 64 if BLOCK_R <= 128 else 32
    stages = 2 if family in ("sm_86", "sm_120") else 3
    if family == "sm_90" and BLOCK_R == 64:
        BLOCK_N = 256
    return Tile(BLOCK_M=64 if BLOCK_R <= 128 else 32, BLOCK_N=BLOCK_N, num_warps=8, num_stages=stages)


# Bytes of the parts of dy P^T up to which one pass over dy is taken to cost least: they still stay in the L2 cache.
PARTS_LIMIT = 32 << 20


def in_one_pass(M: int, N: int, columns: int, tile: Tile, windows: int = 1) -> bool:
    """Whether dP and the parts of dy P^T come from one pass over dy; else ``project`` makes the parts in a pass of its own."""
    return 4 * cdiv(N, tile.BLOCK_N) * M * columns * windows <= PARTS_LIMIT


_UNSPECIALISED = ["M", "R", "rows_per_group", *FACTOR_ARGUMENTS, *SEGMENT_ARGUMENTS]


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=NARROW)
def _dy_pass_kernel(
    dy_ptr,
    s_ptr,
    p_ptr,
    e_ptr,
    mask_ptr,
    alpha_ptr,
    weight_ptr,
    part_ds_ptr,
    part_dp_ptr,
    M,
    N,
    R,
    S_COLS,
    stride_dym,
    rows_per_group,
    has_alpha,
    has_weight,
    end0,
    start1,
    end1,
    splits0,
    per_split,
    scale,
    WANT_DS: tl.constexpr,
    WANT_DP: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    block_n, split = tl.program_id(0), tl.program_id(1)
    block, blocks = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    s_ptr += block * M * S_COLS
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    dtype = dy_ptr.dtype.element_ty
    first, end = split_rows(split, end0, start1, end1, splits0, per_split)
    at_p = r.to(tl.int64)[None, :] * N + columns[:, None]
    inside_p = (columns[:, None] < N) & (r[None, :] < R)
    p = tl.load(p_ptr + block * R * N + at_p, mask=inside_p, other=0.0).to(dtype)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(first, end, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        at = dy_ptr + block * N + rows.to(tl.int64)[:, None] * stride_dym + columns[None, :]
        dy = tl.load(at, mask=(rows[:, None] < end) & (columns[None, :] < N), other=0.0)
        inside_s = (rows[:, None] < end) & (r[None, :] < S_COLS)
        if WANT_DS:
            ds = tl.dot(dy, p, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N) @ (BLOCK_N, BLOCK_R)
            part = part_ds_ptr + ((block_n * blocks + block) * M + rows)[:, None] * S_COLS + r[None, :]
            tl.store(part, ds, mask=inside_s)
        if WANT_DP:
            s = tl.load(s_ptr + rows.to(tl.int64)[:, None] * S_COLS + r[None, :], mask=inside_s, other=0.0)
            if SCALED:
                in_first = split < splits0
                factor = row_factors(alpha_ptr, weight_ptr, has_alpha, has_weight, rows, end, rows_per_group, in_first)
                s = (s * factor[:, None]).to(dtype)
            acc = tl.dot(tl.trans(dy), s, acc, input_precision=PRECISION)  # (BLOCK_N, BLOCK_M) @ (BLOCK_M, BLOCK_R)
    if WANT_DP:
        acc = acc * coefficients(e_ptr + block * R, mask_ptr + block * R, 0, R, scale, BLOCK_R)[None, :]
        tl.store(part_dp_ptr + (split * blocks + block) * R * N + at_p, acc, mask=inside_p)


@planned
def _plan(
    M: int,
    N: int,
    R: int,
    columns: int,
    stride: int,
    rows_per_group: int,
    segments: Segments,
    windows: int,
    scale: float,
    wanted: tuple[bool, bool],
    factors: tuple[bool, bool],
    dtype: torch.dtype,
    tile: Tile,
) -> Plan:
    constants = {
        "WANT_DS": wanted[0],
        "WANT_DP": wanted[1],
        "SCALED": any(factors),
        "PRECISION": dot_precision(dtype),
        "BLOCK_R": block_rank(R),
        **tile.blocks("BLOCK_M", "BLOCK_N"),
    }
    numbers = (M, N, R, columns, stride, rows_per_group, *map(int, factors), *segments.numbers, scale)
    return Plan(_dy_pass_kernel, (cdiv(N, tile.BLOCK_N), segments.splits, windows), numbers, constants)


def launch_dy_pass(
    dy2: Tensor,
    S: Tensor,
    P: Tensor,
    coef: tuple[Tensor, Tensor, float],
    alpha: Tensor | None,
    path_weight: Tensor | None,
    rows_per_group: int,
    segments: Segments,
    part_ds: Tensor | None,
    part_dp: Tensor | None,
    tile: Tile,
) -> None:
    """Fill partial sums that are given: ``part_ds`` (blocks of columns, n, M, padded rank), ``part_dp`` (splits, n r, N / n)."""
    windows = dy2.shape[1] // P.shape[1]
    wanted = (part_ds is not None, part_dp is not None)
    factors = (wanted[1] and alpha is not None, wanted[1] and path_weight is not None)  # they are for dP
    plan = _plan(
        dy2.shape[0],
        P.shape[1],
        P.shape[0] // windows,
        S.shape[-1],
        dy2.stride(0),
        rows_per_group,
        segments,
        windows,
        coef[2],
        wanted,
        factors,
        dy2.dtype,
        tile,
    )
    pointers = factor_pointers(any(factors), alpha, path_weight, coef[0])
    launch(plan, dy2, S, P, coef[0], coef[1], *pointers, part_ds, part_dp)


@cache
def dy_segments(end0: int, start1: int, end1: int, N: int, tile: Tile, device: Where, windows: int = 1) -> Segments:
    """Splits of the rows of dy: one program for each processor."""
    wanted = processors(device) // (cdiv(N, tile.BLOCK_N) * windows)
    return Segments.of(end0, start1, end1, tile.BLOCK_M, wanted)


def _vector_loads(segments: Segments, tile: Tile, *, alpha: bool, weight: bool, groups: int) -> tuple[int, int]:
    """(distinct, requested) bytes of the group factors in one block of columns."""
    rows0, rows1 = segments.end0, segments.end1 - segments.start1
    requested = 4 * (rows0 * alpha + rows1 * weight)
    per_group = segments.end1 // groups if groups else 1
    distinct = 4 * (cdiv(rows0, per_group) * alpha + cdiv(rows1, per_group) * weight)
    return distinct, requested


def traffic_dy_pass(
    M: int,
    N: int,
    R: int,
    itemsize: int,
    segments: Segments,
    tile: Tile,
    *,
    want_ds: bool = True,
    want_dp: bool = True,
    alpha: bool = False,
    weight: bool = False,
    groups: int = 1,
    windows: int = 1,
) -> Traffic:
    """Of one :func:`launch_dy_pass`; N columns and R triplets in each of the windows."""
    blocks, columns = cdiv(N, tile.BLOCK_N), padded_rank(R)
    rows = segments.end0 + segments.end1 - segments.start1
    distinct, requested = _vector_loads(segments, tile, alpha=alpha, weight=weight, groups=groups)
    vectors = 8 * R * want_dp
    stored = 4 * (blocks * rows * columns * want_ds + segments.splits * R * N * want_dp)
    return Traffic(
        read=rows * N * itemsize + 4 * R * N + vectors + (rows * columns * itemsize + distinct) * want_dp,
        written=stored,
        loaded=rows * N * itemsize
        + segments.splits * (4 * R * N + blocks * vectors)
        + blocks * (rows * columns * itemsize + requested) * want_dp,
        stored=stored,
        flops=2 * rows * N * R * (want_ds + want_dp),
    ).in_windows(windows, shared=distinct * want_dp)


@triton.jit(
    do_not_specialize=["M", "R", "blocks", "rows_per_group", "train_end", "path_start"],
    do_not_specialize_on_alignment=NARROW,
)
def _ds_sum_kernel(
    part_ptr,
    s_ptr,
    e_ptr,
    mask_ptr,
    alpha_ptr,
    weight_ptr,
    g_ptr,
    part_de_ptr,
    M,
    R,
    S_COLS,
    DE_COLS,
    blocks,
    rows_per_group,
    train_end,
    path_start,
    scale,
    WANT_DE: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    window, windows = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    inside = (rows[:, None] < M) & (r[None, :] < S_COLS)
    at = (window * M + rows)[:, None] * S_COLS + r[None, :]
    total = sum_of_parts(part_ptr, at, inside, tl.cast(M, tl.int64) * windows * S_COLS, 0, blocks)
    c = coefficients(e_ptr + window * R, mask_ptr + window * R, 0, R, scale, BLOCK_R)
    tl.store(g_ptr + at, (total * c[None, :]).to(g_ptr.dtype.element_ty), mask=inside)
    if WANT_DE:
        product = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32) * total
        live = scale * tl.load(mask_ptr + window * R + r, mask=r < R, other=0.0)
        part = part_de_ptr + tl.program_id(0) * DE_COLS + window * R + r
        train = tl.where(rows < train_end, 1.0, 0.0)
        if HAS_ALPHA:
            train *= group_factor(alpha_ptr, rows, M, rows_per_group)
        tl.store(part, tl.sum(product * train[:, None], axis=0) * live, mask=r < R)
        if HAS_WEIGHT:
            weight = tl.where(rows >= path_start, group_factor(weight_ptr, rows, M, rows_per_group), 0.0)
            part += tl.num_programs(0) * DE_COLS
            tl.store(part, tl.sum(product * weight[:, None], axis=0) * live, mask=r < R)


@cache
def ds_tile(BLOCK_R: int, itemsize: int) -> Tile:
    """Tile of the small second launch: 512 numbers, so that many programs wait for memory at once."""
    return Tile(BLOCK_M=max(512 // BLOCK_R, 8), num_warps=2, num_stages=2)


@planned
def _sum_plan(
    M: int,
    columns: int,
    R: int,
    windows: int,
    blocks: int,
    ranges: tuple[int, int, int],
    scale: float,
    flags: tuple[bool, bool, bool],
    itemsize: int,
) -> Plan:
    BLOCK_R = block_rank(R)
    tile = ds_tile(BLOCK_R, itemsize)
    constants = {
        "WANT_DE": flags[0],
        "HAS_ALPHA": flags[1],
        "HAS_WEIGHT": flags[2],
        "BLOCK_R": BLOCK_R,
        **tile.blocks("BLOCK_M"),
    }
    numbers = (M, R, columns, padded_rank(R * windows), blocks, *ranges, scale)
    return Plan(_ds_sum_kernel, (cdiv(M, tile.BLOCK_M), 1, windows), numbers, constants)


def launch_ds_sum(
    part_ds: Tensor,
    S: Tensor,
    R: int,
    coef: tuple[Tensor, Tensor, float],
    alpha: Tensor | None,
    path_weight: Tensor | None,
    rows_per_group: int,
    train_end: int,
    path_start: int,
    G: Tensor,
    part_de: Tensor | None,
) -> None:
    """Fill G, like S, and, if given, ``part_de`` (1 or 2, blocks of rows, padded number of triplets): training rows, then path rows."""
    windows = S.shape[0] if S.ndim == 3 else 1
    flags = (part_de is not None, alpha is not None, path_weight is not None)
    ranges = (rows_per_group, train_end, path_start)
    parts, size = part_ds.shape[0], S.element_size()
    plan = _sum_plan(S.shape[-2], S.shape[-1], R // windows, windows, parts, ranges, coef[2], flags, size)
    launch(plan, part_ds, S, coef[0], coef[1], alpha, path_weight, G, part_de)


def traffic_ds_sum(
    M: int,
    R: int,
    itemsize: int,
    blocks: int,
    *,
    want_de: bool = True,
    alpha: bool = False,
    weight: bool = False,
    groups: int = 1,
    windows: int = 1,
) -> Traffic:
    """Of one :func:`launch_ds_sum`; ``blocks`` of columns of dy and R triplets in each of the windows."""
    columns, programs = padded_rank(R), cdiv(M, ds_tile(block_rank(R), itemsize).BLOCK_M)
    factors = want_de * (alpha + weight)
    read = 4 * blocks * M * columns + want_de * M * columns * itemsize
    stored = M * columns * itemsize + want_de * (1 + weight) * programs * R * 4
    return Traffic(
        read=read + 8 * R + 4 * groups * factors,
        written=stored,
        loaded=read + programs * (8 * R + 4 * R * want_de) + 4 * M * factors,
        stored=stored,
    ).in_windows(windows, shared=4 * groups * factors)


def specimens(family: str) -> list[Specimen]:
    """Every configuration of both launches on a family: each of the two products or both, rows with factors or without."""
    found = []
    for dtype in SCALING_DTYPES:
        name = TYPE_NAMES[dtype]
        masters = dict.fromkeys(("e_ptr", "mask_ptr", "alpha_ptr", "weight_ptr"), "*fp32")
        types = {"dy_ptr": f"*{name}", "s_ptr": f"*{name}", "p_ptr": "*fp32", **masters}
        types |= {"part_ds_ptr": "*fp32", "part_dp_ptr": "*fp32", "scale": "fp32"}
        types |= dict.fromkeys(_UNSPECIALISED, "i32") | dict.fromkeys(("N", "S_COLS", "stride_dym"), "i32")
        sums = {"part_ptr": "*fp32", "s_ptr": f"*{name}", "g_ptr": f"*{name}", "part_de_ptr": "*fp32", **masters}
        sums |= dict.fromkeys(
            ("M", "R", "S_COLS", "DE_COLS", "blocks", "rows_per_group", "train_end", "path_start"), "i32"
        )
        sums |= {"scale": "fp32"}
        for BLOCK_R in (16, 32, 64, 128, 256):
            tile = config(family, dtype.itemsize, BLOCK_R)
            for ds, dp, scaled in ((1, 1, 0), (1, 1, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0)):
                if dtype not in SPECIMEN_DTYPES and not scaled:
                    continue
                constants = {
                    "WANT_DS": bool(ds),
                    "WANT_DP": bool(dp),
                    "SCALED": bool(scaled),
                    "PRECISION": dot_precision(dtype),
                    "BLOCK_R": BLOCK_R,
                }
                kind = " scaled" * scaled + ("" if ds else " of dP") + ("" if dp else " of dS")
                found.append(tile.specimen(f"dy pass {name} r{BLOCK_R}{kind}", _dy_pass_kernel, types, constants))
            if dtype not in SPECIMEN_DTYPES:
                continue
            options = {"WANT_DE": True, "HAS_ALPHA": True, "HAS_WEIGHT": True, "BLOCK_R": BLOCK_R}
            tile = ds_tile(BLOCK_R, dtype.itemsize)
            found.append(tile.specimen(f"ds sum {name} r{BLOCK_R}", _ds_sum_kernel, sums, options, dots=False))
    return found
