"""S = dropout(x) Q^T of one to three layers that read one x, in one pass over x.

Contract. x (M, K) bfloat16, float16 or float32; Q_i (r_i, K) float32 masters, converted in the kernel; accumulation in float32, S_i rounded
once to x's dtype. A layer may be block-diagonal with n blocks: its Q is (n r, K / n), its S (n, M, padded rank), each block with its window
of x. Few rows leave processors idle, so that K is split then, the parts summed in their order. Dropout is drawn where x is
read. One launch, two where K is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..traffic import Traffic
from .common import (
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
from .tiles import keep_tile

MEMBERS = 3  # layers one launch can serve


@cache
def members(BLOCK_R: int) -> int:
    """Layers of a rank bucket that one launch serves: the widest ranks fill the registers alone."""
    return MEMBERS if BLOCK_R <= 128 else 1


@cache
def config(family: str, itemsize: int, BLOCK_R: int, count: int, dropout: bool = False) -> Tile:
    """Tile sizes: the float32 accumulators of all members stay within 64 registers a thread."""
    width = BLOCK_R * count
    if family in ("sm_90", "sm_100") and itemsize == 2 and width <= 96 and not dropout:
        if count > 1:
            return Tile(BLOCK_M=128, BLOCK_K=64, num_warps=8, num_stages=4)
        if width <= 64:
            rows, stages = (64, 4) if width <= 32 else (128, 3)
            return Tile(BLOCK_M=rows, BLOCK_K=128, num_warps=4, num_stages=stages)
    # Factors of mma.sync lie in registers; those of float32 in three TF32 terms, beside dropout's words.
    few = 64 if family in ("sm_80", "sm_86", "sm_120") and not (dropout and itemsize == 4) else 48
    warps = 4 if width <= few else 8
    BLOCK_M = 64 if width <= (128 if itemsize == 2 else 32) else 32 if itemsize == 2 or width <= 256 else 16
    BLOCK_K = 32 if itemsize == 4 or width > 256 or dropout else 64
    small = family in ("sm_86", "sm_120")
    stages = 4 if width <= 128 else 3
    return Tile(BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, num_warps=warps, num_stages=stages - 1 if small else stages)


_UNSPECIALISED = ["M", "R0", "R1", "R2", "tiles_per_split", "threshold"]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _project_kernel(
    x_ptr,
    q0_ptr,
    q1_ptr,
    q2_ptr,
    s0_ptr,
    s1_ptr,
    s2_ptr,
    seed_ptr,
    M,
    K,
    R0,
    R1,
    R2,
    S0_COLS,
    S1_COLS,
    S2_COLS,
    stride_xm,
    tiles_per_split,
    threshold,
    keep_scale,
    MEMBERS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    block, blocks = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    r = tl.arange(0, BLOCK_R)
    x_rows = x_ptr + block * K + rows.to(tl.int64)[:, None] * stride_xm
    acc0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(K, BLOCK_K))):
        k = tile * BLOCK_K
        columns = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + columns[None, :], mask=(rows[:, None] < M) & (columns[None, :] < K), other=0.0)
        if DROPOUT:
            keep = keep_tile(seed_ptr, rows, block * K + k, K * blocks, threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        at = r.to(tl.int64)[None, :] * K + columns[:, None]
        inside = columns[:, None] < K
        q = tl.load(q0_ptr + block * R0 * K + at, mask=inside & (r[None, :] < R0), other=0.0).to(x.dtype)
        acc0 = tl.dot(x, q, acc0, input_precision=PRECISION)  # (BLOCK_M, BLOCK_K) @ (BLOCK_K, BLOCK_R)
        if MEMBERS > 1:
            q = tl.load(q1_ptr + block * R1 * K + at, mask=inside & (r[None, :] < R1), other=0.0).to(x.dtype)
            acc1 = tl.dot(x, q, acc1, input_precision=PRECISION)
        if MEMBERS > 2:
            q = tl.load(q2_ptr + block * R2 * K + at, mask=inside & (r[None, :] < R2), other=0.0).to(x.dtype)
            acc2 = tl.dot(x, q, acc2, input_precision=PRECISION)
    out = ((split * blocks + block) * M + rows)[:, None]
    live = rows[:, None] < M
    dtype = s0_ptr.dtype.element_ty
    if DROPOUT:
        acc0, acc1, acc2 = acc0 * keep_scale, acc1 * keep_scale, acc2 * keep_scale
    tl.store(s0_ptr + out * S0_COLS + r[None, :], acc0.to(dtype), mask=live & (r[None, :] < S0_COLS))
    if MEMBERS > 1:
        tl.store(s1_ptr + out * S1_COLS + r[None, :], acc1.to(dtype), mask=live & (r[None, :] < S1_COLS))
    if MEMBERS > 2:
        tl.store(s2_ptr + out * S2_COLS + r[None, :], acc2.to(dtype), mask=live & (r[None, :] < S2_COLS))


@triton.jit
def _sum_splits_into(part_ptr, s_ptr, at, numel, splits):
    total = tl.zeros(at.shape, tl.float32)
    for split in range(splits):
        total += tl.load(part_ptr + split * numel + at, mask=at < numel, other=0.0)
    tl.store(s_ptr + at, total.to(s_ptr.dtype.element_ty), mask=at < numel)


@triton.jit(do_not_specialize=["M", "splits"])
def _sum_splits_kernel(
    part0_ptr,
    part1_ptr,
    part2_ptr,
    s0_ptr,
    s1_ptr,
    s2_ptr,
    M,
    S0_COLS,
    S1_COLS,
    S2_COLS,
    splits,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    member = tl.program_id(1)
    if member == 0:
        _sum_splits_into(part0_ptr, s0_ptr, at, M.to(tl.int64) * S0_COLS, splits)
    if member == 1:
        _sum_splits_into(part1_ptr, s1_ptr, at, M.to(tl.int64) * S1_COLS, splits)
    if member == 2:
        _sum_splits_into(part2_ptr, s2_ptr, at, M.to(tl.int64) * S2_COLS, splits)


_SUM_BLOCK = 1024


@cache
def k_splits(M: int, K: int, tile: Tile, device: Where, blocks: int = 1) -> tuple[int, int]:
    """(splits, tiles of K in each): as many as keep all processors busy, none below 8 tiles. K columns in each of the blocks' windows."""
    wanted = max(processors(device) // (cdiv(M, tile.BLOCK_M) * blocks), 1)
    tiles = cdiv(K, tile.BLOCK_K)
    per_split = max(cdiv(tiles, wanted), min(8, tiles))
    return cdiv(tiles, per_split), per_split


def each(values: Sequence[Any]) -> list[Any]:
    """Arguments of all members; those of layers that are not there repeat the first."""
    return [*values, *([values[0]] * (MEMBERS - len(values)))]


@planned
def _plan(
    M: int,
    K: int,
    ranks: tuple[int, ...],
    columns: tuple[int, ...],
    stride: int,
    splits: tuple[int, int],
    blocks: int,
    keep: tuple[int, float],
    dtype: torch.dtype,
    tile: Tile,
) -> Plan:
    constants = {
        "MEMBERS": len(ranks),
        "DROPOUT": keep[0] != 0,
        "PRECISION": dot_precision(dtype),
        "BLOCK_R": block_rank(max(ranks)),
        **tile.blocks("BLOCK_M", "BLOCK_K"),
    }
    numbers = (M, K, *each(ranks), *each(columns), stride, splits[1], *keep)
    return Plan(_project_kernel, (cdiv(M, tile.BLOCK_M), splits[0], blocks), numbers, constants)


@planned
def _sum_plan(M: int, columns: tuple[int, ...], splits: int) -> Plan:
    grid = (cdiv(M * max(columns), _SUM_BLOCK), len(columns))
    return Plan(_sum_splits_kernel, grid, (M, *each(columns), splits), {"BLOCK": _SUM_BLOCK})


def _blocks(x2: Tensor, Q: Tensor) -> int:
    return x2.shape[1] // Q.shape[1]


def _launch(
    x2: Tensor,
    Qs: list[Tensor],
    parts: list[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    tile: Tile,
    splits: tuple[int, int],
) -> None:
    blocks = _blocks(x2, Qs[0])
    plan = _plan(
        x2.shape[0],
        Qs[0].shape[1],
        tuple([Q.shape[0] // blocks for Q in Qs]),
        tuple([part.shape[-1] for part in parts]),
        x2.stride(0),
        splits,
        blocks,
        keep_arguments(seed, dropout_p),
        x2.dtype,
        tile,
    )
    launch(plan, x2, *each(Qs), *each(parts), seed)


def launch_project(
    x2: Tensor, Qs: list[Tensor], out: list[Tensor], seed: Tensor | None, dropout_p: float, tile: Tile
) -> None:
    """Fill ``out``: S buffers in x's dtype, one for each of up to three Qs of one number of blocks; columns beyond a rank become 0."""
    M, blocks = x2.shape[0], _blocks(x2, Qs[0])
    splits = k_splits(M, Qs[0].shape[1], tile, x2.device, blocks)
    parts = out
    if splits[0] > 1:
        parts = [s.new_empty((splits[0], *s.shape), dtype=torch.float32) for s in out]
    _launch(x2, Qs, parts, seed, dropout_p, tile, splits)
    if splits[0] > 1:
        columns = tuple([s.shape[-1] for s in out])
        launch(_sum_plan(M * blocks, columns, splits[0]), *each(parts), *each(out))


def launch_project_parts(x2: Tensor, Q: Tensor, tile: Tile) -> Tensor:
    """The float32 parts of x Q^T, (splits, blocks, M, padded rank), not added up yet: for dy P^T, whose sum has more to do."""
    M, blocks = x2.shape[0], _blocks(x2, Q)
    splits = k_splits(M, Q.shape[1], tile, x2.device, blocks)
    parts = x2.new_empty((splits[0], blocks, M, padded_rank(Q.shape[0] // blocks)), dtype=torch.float32)
    _launch(x2, [Q], [parts], None, 0.0, tile, splits)
    return parts


def traffic_project(
    M: int,
    K: int,
    ranks: list[int],
    itemsize: int,
    tile: Tile,
    device: Where,
    seeded: bool = False,
    parts: bool = False,
    windows: int = 1,
) -> Traffic:
    """Of one :func:`launch_project`; with ``parts``, of one :func:`launch_project_parts`. K and the ranks are those of one window."""
    splits, _ = k_splits(M, K, tile, device, windows)
    blocks = cdiv(M, tile.BLOCK_M)
    columns = sum(padded_rank(r) for r in ranks)
    q_bytes = 4 * sum(ranks) * K
    stored = M * columns * (itemsize if splits == 1 and not parts else 4 * splits)
    tiles = blocks * cdiv(K, tile.BLOCK_K)
    seed_bytes = 8 if seeded else 0
    traffic = Traffic(
        read=M * K * itemsize + q_bytes + seed_bytes,
        written=stored,
        loaded=M * K * itemsize + blocks * q_bytes + tiles * seed_bytes,
        stored=stored,
        flops=2 * M * K * sum(ranks),
    )
    if splits > 1 and not parts:
        final = M * columns * itemsize
        traffic += Traffic(read=stored, written=final, loaded=stored, stored=final)
    return traffic.in_windows(windows, shared=seed_bytes)


def specimens(family: str) -> list[Specimen]:
    """Every configuration :func:`launch_project` may use on a family: whole sums and float32 parts, with and without dropout."""
    found = []
    for dtype in SPECIMEN_DTYPES:
        name = TYPE_NAMES[dtype]
        for BLOCK_R in (16, 32, 64, 128, 256):
            for count in range(1, members(BLOCK_R) + 1):
                types = {"x_ptr": f"*{name}", "seed_ptr": "*i64", "keep_scale": "fp32"}
                types |= {f"q{i}_ptr": "*fp32" for i in range(3)}
                types |= {f"R{i}": "i32" for i in range(3)} | {f"S{i}_COLS": "i32" for i in range(3)}
                types |= dict.fromkeys(("M", "K", "stride_xm", "tiles_per_split", "threshold"), "i32")
                constants = {"MEMBERS": count, "PRECISION": dot_precision(dtype), "BLOCK_R": BLOCK_R}
                for dropout in (False, True):
                    tile = config(family, dtype.itemsize, BLOCK_R, count, dropout)
                    for out in dict.fromkeys((name, "fp32")):
                        parts = "" if out == name else " parts"
                        label = f"project {name} r{BLOCK_R} x{count}{parts}{' dropout' if dropout else ''}"
                        outs = {f"s{i}_ptr": f"*{out}" for i in range(3)}
                        options = {**constants, "DROPOUT": dropout}
                        found.append(tile.specimen(label, _project_kernel, types | outs, options))
    for name in ("bf16", "fp32"):
        types = {f"part{i}_ptr": "*fp32" for i in range(3)} | {f"s{i}_ptr": f"*{name}" for i in range(3)}
        types |= {f"S{i}_COLS": "i32" for i in range(3)} | {"M": "i32", "splits": "i32"}
        label = f"sum splits {name}"
        found.append(Specimen(label, _sum_splits_kernel, types, {"BLOCK": _SUM_BLOCK}, num_warps=4, dots=False))
    return found
