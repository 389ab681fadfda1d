"""The rank term alone, in one pass: written as the addend of a cuBLAS product, or added to what a base's own forward returned.

Contract. ``out = [base +] bias + (alpha S) (c F)`` with the product's columns kept or dropped; operands and rounding as in ``gemm.py``.
``base`` may be ``out`` itself. Of a block-diagonal adapter (n blocks) S is (n, M, padded rank), F (n r, N / n), and each block adds its
term to its own columns. Moves one write of out, and one read of base where there is one. One launch.
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
    TYPE_NAMES,
    Specimen,
    Tile,
    cdiv,
    dot_precision,
)
from .launch import Plan, launch, planned
from .tiles import RankTerm, add_rank_term, rank_term_types, traffic_rank_tile


@cache
def config(family: str, itemsize: int) -> Tile:
    """Small tiles: the kernel waits for memory, so that many programs in flight count."""
    return Tile(BLOCK_M=64, BLOCK_N=64 if itemsize == 4 else 128, num_warps=8 if itemsize == 4 else 4, num_stages=1)


@triton.jit(do_not_specialize=["M", "R", "rows_per_group", "threshold"], do_not_specialize_on_alignment=NARROW)
def _rank_term_kernel(
    base_ptr,
    out_ptr,
    s_ptr,
    f_ptr,
    e_ptr,
    mask_ptr,
    alpha_ptr,
    bias_ptr,
    seed_ptr,
    M,
    N,
    R,
    S_COLS,
    rows_per_group,
    scale,
    threshold,
    keep_scale,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COEF: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    block, blocks = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    s_ptr += block * M * S_COLS
    f_ptr += block * R * N
    if HAS_COEF:
        e_ptr += block * R
        mask_ptr += block * R
    if HAS_BIAS:
        bias_ptr += block * N
    at = (rows.to(tl.int64)[:, None] * blocks + block) * N + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BASE:
        acc = tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    acc = add_rank_term(
        acc,
        s_ptr,
        f_ptr,
        e_ptr,
        mask_ptr,
        alpha_ptr,
        bias_ptr,
        seed_ptr,
        rows,
        tl.program_id(1) * BLOCK_N,
        block * N + tl.program_id(1) * BLOCK_N,
        N * blocks,
        M,
        N,
        R,
        S_COLS,
        rows_per_group,
        scale,
        threshold,
        keep_scale,
        HAS_BIAS,
        HAS_COEF,
        HAS_ALPHA,
        DROPOUT,
        PRECISION,
        dtype,
        BLOCK_N,
        BLOCK_R,
    )
    tl.store(out_ptr + at, acc.to(dtype), mask=inside)


@planned
def _plan(M: int, N: int, rank: RankTerm, base: bool, dtype: torch.dtype, tile: Tile) -> Plan:
    constants = {"HAS_BASE": base, **rank.constants(dtype), **tile.blocks("BLOCK_M", "BLOCK_N")}
    window = N // rank.blocks
    grid = (cdiv(M, tile.BLOCK_M), cdiv(window, tile.BLOCK_N), rank.blocks)
    return Plan(_rank_term_kernel, grid, (M, window, *rank.sizes(M), *rank.factors), constants)


def launch_rank_term(
    out: Tensor,
    base: Tensor | None,
    S: Tensor,
    F: Tensor,
    coef: tuple[Tensor, Tensor, float] | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    tile: Tile,
) -> None:
    """Fill ``out`` (M, N), contiguous; arguments as in ``launch_gemm_rank``."""
    e, mask = coef[:2] if coef is not None else (None, None)
    rank = RankTerm.of(S, F, coef, alpha, bias, seed, dropout_p)
    plan = _plan(out.shape[0], out.shape[1], rank, base is not None, out.dtype, tile)
    launch(plan, base, out, S, F, e, mask, alpha, bias, seed)


def traffic_rank_term(
    M: int,
    N: int,
    R: int,
    itemsize: int,
    tile: Tile,
    *,
    groups: int = 0,
    base: bool = False,
    coef: bool = False,
    bias: bool = False,
    seeded: bool = False,
    windows: int = 1,
) -> Traffic:
    """Of one :func:`launch_rank_term`; N columns and R triplets in each of the windows."""
    whole = M * N * itemsize
    own = whole if base else 0
    options = {"coef": coef, "bias": bias, "seeded": seeded}
    term = Traffic(own, whole, own, whole) + traffic_rank_tile(M, N, R, itemsize, tile, groups=groups, **options)
    return term.in_windows(windows, shared=4 * groups + 8 * seeded)


def specimens(family: str) -> list[Specimen]:
    """Every configuration :func:`launch_rank_term` may use on a family: the addend of y, that of dx, and an update."""
    found = []
    for dtype in SCALING_DTYPES:
        name = TYPE_NAMES[dtype]
        types = {"base_ptr": f"*{name}", "out_ptr": f"*{name}", **rank_term_types(name)}
        tile = config(family, dtype.itemsize)
        for BLOCK_R in (16, 32):
            for kind in ("forward", "backward", "backward dropout", "update"):
                constants = {
                    "HAS_BASE": kind == "update",
                    "HAS_BIAS": kind == "forward",
                    "HAS_COEF": kind in ("forward", "update"),
                    "HAS_ALPHA": True,
                    "DROPOUT": kind == "backward dropout",
                    "PRECISION": dot_precision(dtype),
                    "BLOCK_R": BLOCK_R,
                }
                found.append(tile.specimen(f"rank term {name} r{BLOCK_R} {kind}", _rank_term_kernel, types, constants))
    return found
