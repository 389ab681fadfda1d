"""Pieces of kernels that several families share: the tile of kept entries, the triplets' coefficients, the rank term.

Axis 2 of the grids of the passes over x, y and dy counts a block-diagonal adapter's blocks (RaLoRA; ``windows.py``); an ordinary one is
one block. A program works on its block's windows as on a layer of their size: the window's columns of x and y, the block's own triplets,
and its own rows of S, which is (blocks, M, padded rank).

Plans, specimens and traffic functions of the kernels that add the rank term take their common share from here, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..traffic import Traffic
from .common import Tile, cdiv, dot_precision, keep_arguments, padded_rank, rank_step


@triton.jit
def keep_tile(seed_ptr, rows, first, K, threshold, BLOCK_K: tl.constexpr):
    """(rows, BLOCK_K) bool: which entries of the columns from ``first`` (a multiple of 4) on dropout keeps; see ``philox.py``."""
    counter = rows.to(tl.int64)[:, None] * ((K + 3) // 4) + first // 4 + tl.arange(0, BLOCK_K // 4)[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # one counter, four neighbouring columns
    return words >= threshold.to(tl.uint32)


@triton.jit
def coefficients(e_ptr, mask_ptr, first, R, scale, BLOCK_R: tl.constexpr):
    """(BLOCK_R,) float32: s * m * lambda of the triplets from ``first`` on, 0 beyond the rank."""
    r = first + tl.arange(0, BLOCK_R)
    e = tl.load(e_ptr + r, mask=r < R, other=0.0)
    return scale * e * tl.load(mask_ptr + r, mask=r < R, other=0.0)


@triton.jit
def group_factor(factor_ptr, rows, M, rows_per_group):
    """(rows,) float32: the factor of each row's group, 0 beyond the last row."""
    return tl.load(factor_ptr + rows // rows_per_group, mask=rows < M, other=0.0)


@triton.jit
def rank_rows(
    s_ptr,
    alpha_ptr,
    rows,
    first,
    M,
    R,
    S_COLS,
    rows_per_group,
    HAS_ALPHA: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """(rows, BLOCK_R) of S or of its gradient from triplet ``first`` on, times alpha of the row's group, in their dtype.

    ``first`` and S_COLS are multiples of 16.
    """
    r = first + tl.arange(0, BLOCK_R)
    inside = (rows[:, None] < M) & (r[None, :] < S_COLS)
    t = tl.load(s_ptr + rows.to(tl.int64)[:, None] * S_COLS + r[None, :], mask=inside, other=0.0)
    t = tl.where(r[None, :] < R, t, 0.0).to(t.dtype)  # what lies in the padding is not ours to know
    if HAS_ALPHA:
        t = (t * group_factor(alpha_ptr, rows, M, rows_per_group)[:, None]).to(t.dtype)
    return t


@triton.jit
def rank_columns(
    f_ptr,
    e_ptr,
    mask_ptr,
    columns,
    first,
    N,
    R,
    scale,
    HAS_COEF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(BLOCK_R, columns) of the float32 masters P or Q from triplet ``first`` on, times s m lambda where HAS_COEF, in the compute dtype."""
    r = first + tl.arange(0, BLOCK_R)
    inside = (r[:, None] < R) & (columns[None, :] < N)
    f = tl.load(f_ptr + r.to(tl.int64)[:, None] * N + columns[None, :], mask=inside, other=0.0)
    if HAS_COEF:
        f = f * coefficients(e_ptr, mask_ptr, first, R, scale, BLOCK_R)[:, None]
    return f.to(DTYPE)


@triton.jit
def add_rank_term(
    acc,
    s_ptr,
    f_ptr,
    e_ptr,
    mask_ptr,
    alpha_ptr,
    bias_ptr,
    seed_ptr,
    rows,
    first_column,
    first_kept,
    KEPT,
    M,
    N,
    R,
    S_COLS,
    rows_per_group,
    scale,
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    HAS_COEF: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc (rows, BLOCK_N) plus bias and the rank term, columns from ``first_column`` on; dropout cuts the rank term.

    For dropout these columns are those from ``first_kept`` (a multiple of 4) on among ``KEPT``.
    """
    columns = first_column + tl.arange(0, BLOCK_N)
    term = tl.zeros_like(acc) if DROPOUT else acc
    for first in tl.range(0, R, BLOCK_R, num_stages=1):
        t = rank_rows(s_ptr, alpha_ptr, rows, first, M, R, S_COLS, rows_per_group, HAS_ALPHA, BLOCK_R)
        f = rank_columns(f_ptr, e_ptr, mask_ptr, columns, first, N, R, scale, HAS_COEF, BLOCK_R, DTYPE)
        term = tl.dot(t, f, term, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R) @ (BLOCK_R, BLOCK_N)
    if DROPOUT:
        keep = keep_tile(seed_ptr, rows, first_kept, KEPT, threshold, BLOCK_N)
        term = acc + tl.where(keep, term * keep_scale, 0.0)
    if HAS_BIAS:
        term += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    return term


class RankTerm(NamedTuple):
    """What a launch's plan depends on for its rank term; ``groups`` counts alphas, 0 without; R is the rank of each of the blocks."""

    R: int
    columns: int
    groups: int
    scale: float
    threshold: int
    keep_scale: float
    bias: bool
    coef: bool
    blocks: int

    @classmethod
    def of(
        cls,
        S: Tensor,
        F: Tensor,
        coef: tuple[Tensor, Tensor, float] | None,
        alpha: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
    ) -> RankTerm:
        """From a launcher's arguments."""
        groups, scale = 0 if alpha is None else alpha.numel(), 1.0 if coef is None else coef[2]
        drop = keep_arguments(seed, dropout_p)
        blocks = S.shape[0] if S.ndim == 3 else 1
        return cls(F.shape[0] // blocks, S.shape[-1], groups, scale, *drop, bias is not None, coef is not None, blocks)

    def sizes(self, M: int) -> tuple[int, int, int]:
        """R, S_COLS, rows_per_group."""
        return self.R, self.columns, M // max(self.groups, 1)

    @property
    def factors(self) -> tuple[float, int, float]:
        """scale, threshold, keep_scale."""
        return self.scale, self.threshold, self.keep_scale

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """The constexpr arguments of :func:`add_rank_term` but for BLOCK_N."""
        return {
            "HAS_BIAS": self.bias,
            "HAS_COEF": self.coef,
            "HAS_ALPHA": self.groups > 0,
            "DROPOUT": self.threshold != 0,
            "PRECISION": dot_precision(dtype),
            "BLOCK_R": rank_step(self.R),
        }


def rank_term_types(name: str) -> dict[str, str]:
    """Types of what :func:`add_rank_term` takes from a kernel's arguments, in specimens; ``name`` is that of the compute dtype."""
    types = dict.fromkeys(("s_ptr", "bias_ptr"), f"*{name}") | {"seed_ptr": "*i64"}
    types |= dict.fromkeys(("f_ptr", "e_ptr", "mask_ptr", "alpha_ptr"), "*fp32")
    types |= dict.fromkeys(("M", "N", "R", "S_COLS", "rows_per_group", "threshold"), "i32")
    return types | dict.fromkeys(("scale", "keep_scale"), "fp32")


def traffic_rank_tile(
    M: int,
    N: int,
    R: int,
    itemsize: int,
    tile: Tile,
    *,
    groups: int = 0,
    coef: bool = False,
    bias: bool = False,
    seeded: bool = False,
) -> Traffic:
    """Of :func:`add_rank_term` in all tiles of an (M, N) result; ``groups`` counts alphas, 0 without."""
    blocks_m, blocks_n = cdiv(M, tile.BLOCK_M), cdiv(N, tile.BLOCK_N)
    s_bytes, f_bytes, bias_bytes = M * padded_rank(R) * itemsize, 4 * R * N, N * itemsize if bias else 0
    vectors, seed_bytes, steps = 8 * R if coef else 0, 8 if seeded else 0, cdiv(R, rank_step(R))
    return Traffic(
        read=s_bytes + f_bytes + vectors + 4 * groups + bias_bytes + seed_bytes,
        loaded=blocks_n * s_bytes
        + blocks_m * (f_bytes + bias_bytes)
        + blocks_m * blocks_n * (vectors + seed_bytes)
        + (4 * blocks_n * M * steps if groups else 0),
        flops=2 * M * N * R,
    )
