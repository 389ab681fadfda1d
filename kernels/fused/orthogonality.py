"""Orthogonality penalty of all matrices in three launches (ALGORITHMS 2.4); what it computes is said in ``kernels/orthogonality.py``.

Contract. Float32 throughout, products on tensor cores as three TF32 terms (float32 accuracy); buffers of 16 bits are taken too. Sums run
in a fixed order: columns of a segment, then segments, then tiles, then matrices. No atomics. Ranks up to 256 and lengths are runtime
values; of the ranks only the largest one's tile size is compiled in.

A program takes an *item* of the work table (:class:`igulora.kernels.orthogonality.Plan`): one tile of rows of one matrix A and one segment
of its columns.
1. ``_gram_kernel``: the item's share of A A^T, summed over the segment's columns.
2. ``_residual_kernel``, one program per tile of rows: E = A A^T - I from all shares, in the place of the first, and the sum of its squares.
3. ``_gradient_kernel``: adds coef * E A to the item's part of the gradient, and in a program of its own averages the norms.

Matrices of odd length or offset take 4-byte accesses in a branch of their own; all others 16-byte ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..orthogonality import LARGEST_TILE, SEGMENT, TILES, Plan, noise_floor
from ..traffic import Traffic
from .common import Specimen, cdiv, dot_precision, family, padded_rank

_ROW = 7 * 8  # bytes of a row of the work table
_MATRICES = 64  # whose norms are added at a time
_SLICES = 4  # of the columns, one per warp, where a tile of the Gram matrix is smaller than what four warps take


@dataclass(frozen=True)
class _Config:
    """Columns per step, warps and stages of the Gram product and of the gradient; ``inner`` is the step of the latter's sum."""

    gram: tuple[int, int, int]
    gradient: tuple[int, int, int]
    inner: int
    residual_warps: int

    def of_gram(self, tile: int, single: bool) -> dict[str, Any]:
        """Constants and options of ``_gram_kernel``."""
        block, warps, stages = self.gram
        slices = 1 if tile == LARGEST_TILE else _SLICES
        sizes = {"SEGMENT": SEGMENT, "TILE": tile, "BLOCK": block, "SLICES": slices, "SINGLE": single}
        return {**sizes, "PRECISION": dot_precision(torch.float32), "num_warps": warps, "num_stages": stages}

    def of_residual(self, tile: int, offdiagonal: bool) -> dict[str, Any]:
        """Constants and options of ``_residual_kernel``."""
        sizes = {"SEGMENT": SEGMENT, "TILE": tile, "TILES": TILES, "BLOCK": min(tile, 32), "OFFDIAGONAL": offdiagonal}
        return {**sizes, "num_warps": self.residual_warps, "num_stages": 2}

    def of_gradient(self, tile: int) -> dict[str, Any]:
        """Constants and options of ``_gradient_kernel``."""
        block, warps, stages = self.gradient
        sizes = {"SEGMENT": SEGMENT, "TILE": tile, "TILES": TILES, "BLOCK": block, "INNER": self.inner}
        more = {"BLOCK_MATRICES": _MATRICES, "PRECISION": dot_precision(torch.float32)}
        return {**sizes, **more, "num_warps": warps, "num_stages": stages}


# Splitting a factor into three TF32 terms doubles its registers: steps are as long as leaves none of them spilled.
_16 = _Config(gram=(16, 4, 2), gradient=(64, 4, 2), inner=16, residual_warps=4)
_32 = _Config(gram=(16, 4, 2), gradient=(64, 8, 2), inner=32, residual_warps=4)
_32_OF_8_WARPS = _Config(gram=(16, 8, 2), gradient=(64, 8, 2), inner=32, residual_warps=4)
_64 = _Config(gram=(16, 8, 2), gradient=(32, 8, 3), inner=16, residual_warps=8)
# Factors of wgmma and tcgen05 lie in shared memory.
_64_SHARED = _Config(gram=(32, 8, 2), gradient=(32, 8, 3), inner=32, residual_warps=8)
_CONFIGS = {
    "sm_80": {16: _16, 32: _32, 64: _64},
    "sm_86": {16: _16, 32: _32, 64: _64},
    "sm_90": {16: _16, 32: _32, 64: _64_SHARED},
    "sm_100": {16: _16, 32: _32_OF_8_WARPS, 64: _64_SHARED},
    "sm_120": {16: _16, 32: _32, 64: _64},
}


@triton.jit
def _load(ptr, rows, cols, height, width, stride):
    """A tile of a matrix, 0 beyond its edges."""
    mask = (rows[:, None] < height) & (cols[None, :] < width)
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, rows, cols, height, width, values):
    """Write a tile of a matrix that is ``width`` wide in memory."""
    mask = (rows[:, None] < height) & (cols[None, :] < width)
    tl.store(ptr + rows[:, None] * width + cols[None, :], values, mask=mask)


@triton.jit
def _item(table_ptr, item):
    """Offset, rank, length, first row and column, workspace offset, and number of the matrix."""
    row = table_ptr + item * 7
    offset = tl.load(row)
    rank = tl.load(row + 1).to(tl.int32)
    length = tl.load(row + 2).to(tl.int32)
    first_row = tl.load(row + 3).to(tl.int32)
    first_col = tl.load(row + 4).to(tl.int32)
    place = tl.load(row + 5)
    matrix = tl.load(row + 6).to(tl.int32)
    return offset, rank, length, first_row, first_col, place // 16 * 16, matrix


@triton.jit
def _gram(
    weight_ptr,
    share_ptr,
    rank,
    length,
    first_row,
    start,
    stop,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
    SINGLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of a tile of rows with all rows, over the columns from ``start`` to ``stop``."""
    length = length // VECTOR * VECTOR
    stride = (rank + 15) // 16 * 16
    if SLICES > 1:
        # A small tile would leave most warps to repeat each other: instead each takes a slice of the columns.
        lanes = tl.arange(0, SLICES)[:, None, None] * BLOCK + tl.arange(0, BLOCK)[None, None, :]
        rows = tl.arange(0, TILE)
        products = tl.zeros((SLICES, TILE, TILE), tl.float32)
        for k in range(start, stop, SLICES * BLOCK):
            mask = (rows[None, :, None] < rank) & (k + lanes < length)
            a = tl.load(weight_ptr + rows[None, :, None] * length + k + lanes, mask=mask, other=0.0).to(tl.float32)
            # (SLICES, TILE, BLOCK) @ (SLICES, BLOCK, TILE)
            products = tl.dot(a, tl.permute(a, (0, 2, 1)), products, input_precision=PRECISION)
        _store(share_ptr, rows, rows, rank, stride, tl.sum(products, 0))
    else:
        rows = first_row + tl.arange(0, TILE)
        for other in range(0, rank, TILE):
            others = other + tl.arange(0, TILE)
            gram = tl.zeros((TILE, TILE), tl.float32)
            for k in range(start, stop, BLOCK):
                cols = k + tl.arange(0, BLOCK)
                a = _load(weight_ptr, rows, cols, rank, length, length)
                if SINGLE:
                    b = a
                else:
                    b = _load(weight_ptr, others, cols, rank, length, length)
                gram = tl.dot(a, tl.trans(b), gram, input_precision=PRECISION)  # (TILE, BLOCK) @ (BLOCK, TILE)
            _store(share_ptr, rows, others, rank, stride, gram)


@triton.jit
def _gram_kernel(
    weight_ptr,
    table_ptr,
    share_ptr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
    SINGLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offset, rank, length, first_row, first_col, place, _ = _item(table_ptr, tl.program_id(0))
    columns = SEGMENT * ((rank + TILE - 1) // TILE)
    stop = tl.minimum(first_col + columns, length)
    start = first_col // SEGMENT * SEGMENT
    share_ptr += place + (first_col // columns) * rank * ((rank + 15) // 16 * 16)
    if (offset % 4 == 0) & (length % 4 == 0):
        aligned_ptr = weight_ptr + offset // 4 * 4
        _gram(aligned_ptr, share_ptr, rank, length, first_row, start, stop, 4, TILE, BLOCK, SLICES, SINGLE, PRECISION)
    else:
        _gram(
            weight_ptr + offset,
            share_ptr,
            rank,
            length,
            first_row,
            start,
            stop,
            1,
            TILE,
            BLOCK,
            SLICES,
            SINGLE,
            PRECISION,
        )


@triton.jit
def _residual_kernel(
    table_ptr,
    share_ptr,
    square_ptr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFDIAGONAL: tl.constexpr,
):
    _, rank, length, first_row, _, place, matrix = _item(table_ptr, tl.program_id(0))
    stride = (rank + 15) // 16 * 16
    tiles = (rank + TILE - 1) // TILE
    segments = tl.maximum((length + SEGMENT * tiles - 1) // (SEGMENT * tiles), 1)
    rows = first_row + tl.arange(0, TILE)
    share_ptr += place
    square = 0.0
    for other in range(0, rank, BLOCK):
        cols = other + tl.arange(0, BLOCK)
        residual = tl.zeros((TILE, BLOCK), tl.float32)
        for segment in range(segments):
            residual += _load(share_ptr + segment * rank * stride, rows, cols, rank, stride, stride)
        diagonal = (rows[:, None] == cols[None, :]) & (rows[:, None] < rank)
        if OFFDIAGONAL:
            residual = tl.where(diagonal, 0.0, residual)
        else:
            residual = tl.where(diagonal, residual - 1.0, residual)
        square += tl.sum(tl.sum(residual * residual, 1), 0)
        _store(share_ptr, rows, cols, rank, stride, residual)
    tl.store(square_ptr + matrix * TILES + first_row // TILE, square)
    if first_row == 0:
        lanes = tl.arange(0, TILES)
        tl.store(square_ptr + matrix * TILES + lanes, tl.zeros((TILES,), tl.float32), mask=lanes >= tiles)


@triton.jit
def _gradient(
    weight_ptr,
    grad_ptr,
    residual_ptr,
    coef,
    rank,
    length,
    first_row,
    start,
    stop,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add coef * E A to a tile of rows, over the columns from ``start`` to ``stop``."""
    length = length // VECTOR * VECTOR
    stride = (rank + 15) // 16 * 16
    rows = first_row + tl.arange(0, TILE)
    inner = tl.arange(0, INNER)
    if INNER == TILE:  # a matrix is one tile high: E stays in registers
        e = _load(residual_ptr, rows, inner, rank, stride, stride)
    for k in range(start, stop, BLOCK):
        cols = k + tl.arange(0, BLOCK)
        product = tl.zeros((TILE, BLOCK), tl.float32)
        if INNER == TILE:
            a = _load(weight_ptr, inner, cols, rank, length, length)
            product = tl.dot(e, a, product, input_precision=PRECISION)  # (TILE, TILE) @ (TILE, BLOCK)
        else:
            for other in range(0, rank, INNER):
                e = _load(residual_ptr, rows, other + inner, rank, stride, stride)
                a = _load(weight_ptr, other + inner, cols, rank, length, length)
                product = tl.dot(e, a, product, input_precision=PRECISION)  # (TILE, INNER) @ (INNER, BLOCK)
        g = _load(grad_ptr, rows, cols, rank, length, length)
        _store(grad_ptr, rows, cols, rank, length, g + coef * product)


@triton.jit(do_not_specialize=["MATRICES"])
def _gradient_kernel(
    weight_ptr,
    grad_ptr,
    table_ptr,
    residual_ptr,
    square_ptr,
    penalty_ptr,
    MATRICES,
    share,
    scale,
    noise,
    BLOCK_MATRICES: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid == 0:
        norms = tl.zeros((BLOCK_MATRICES,), tl.float32)
        for first in range(0, MATRICES, BLOCK_MATRICES):
            matrices = first + tl.arange(0, BLOCK_MATRICES)
            squares = _load(square_ptr, matrices, tl.arange(0, TILES), MATRICES, TILES, TILES)
            norms += tl.sqrt_rn(tl.sum(squares, 1))
        tl.store(penalty_ptr, tl.sum(norms, 0) * share)
    else:
        offset, rank, length, first_row, first_col, place, matrix = _item(table_ptr, pid - 1)
        norm = tl.sqrt_rn(tl.sum(tl.load(square_ptr + matrix * TILES + tl.arange(0, TILES)), 0))
        above = norm > noise * rank
        coef = tl.where(above, tl.div_rn(scale, tl.where(above, norm, 1.0)), 0.0)
        stop = tl.minimum(first_col + SEGMENT * ((rank + TILE - 1) // TILE), length)
        start = first_col // SEGMENT * SEGMENT
        residual_ptr += place
        if (offset % 4 == 0) & (length % 4 == 0):
            aligned = offset // 4 * 4
            _gradient(
                weight_ptr + aligned,
                grad_ptr + aligned,
                residual_ptr,
                coef,
                rank,
                length,
                first_row,
                start,
                stop,
                4,
                TILE,
                BLOCK,
                INNER,
                PRECISION,
            )
        else:
            _gradient(
                weight_ptr + offset,
                grad_ptr + offset,
                residual_ptr,
                coef,
                rank,
                length,
                first_row,
                start,
                stop,
                1,
                TILE,
                BLOCK,
                INNER,
                PRECISION,
            )


def launch_orthogonality(
    weight: Tensor, grad: Tensor, groups: list[int], gamma: float, offdiagonal: bool, table: Tensor
) -> Tensor:
    """The penalty R, (); ``gamma * dR/dA`` is added to ``grad``. ``table`` is the groups' work table on the device."""
    plan = Plan.of(groups)
    items = len(plan.rows)
    if items == 0:
        return torch.zeros((), dtype=weight.dtype, device=weight.device)
    penalty = torch.empty((), dtype=weight.dtype, device=weight.device)
    shares = torch.empty(plan.workspace, dtype=torch.float32, device=weight.device)
    squares = torch.empty(plan.matrices * TILES, dtype=torch.float32, device=weight.device)
    w, g, table = weight.contiguous(), grad.contiguous(), table.contiguous()
    config = _CONFIGS[family(weight.device)][plan.tile]
    _gram_kernel[(items,)](w, table, shares, **config.of_gram(plan.tile, plan.single))
    _residual_kernel[(plan.heads,)](table, shares, squares, **config.of_residual(plan.tile, offdiagonal))
    _gradient_kernel[(items + 1,)](
        w,
        g,
        table,
        shares,
        squares,
        penalty,
        plan.matrices,
        1.0 / plan.count,
        2.0 * gamma / plan.count,
        noise_floor(1, torch.float32),
        **config.of_gradient(plan.tile),
    )
    if g is not grad:
        grad.copy_(g)
    return penalty


def traffic_orthogonality(groups: list[int], arch: str, *, itemsize: int = 4) -> Traffic:
    """All three launches; ``arch`` is an architecture family, whose steps say how often E is read again."""
    plan = Plan.of(groups)
    config = _CONFIGS[arch][plan.tile]
    block, inner = config.gradient[0], config.inner
    total = Traffic(loaded=plan.matrices * TILES * 4, stored=itemsize if plan.rows else 0)
    for k, (_, rank, length, first_row, first_col, _, _) in enumerate(plan.rows):
        height, tiles = min(plan.tile, rank - first_row), cdiv(rank, plan.tile)
        columns = SEGMENT * tiles
        width = max(min(columns, length - first_col), 0)
        part, matrix = height * width * itemsize, rank * width * itemsize
        share = height * padded_rank(rank) * 4
        flops = 2 * height * rank * width
        reads_of_e = 1 if inner == plan.tile else cdiv(width, block)
        gram = Traffic(loaded=_ROW + (matrix if plan.single else tiles * part + matrix), stored=share, flops=flops)
        residual = Traffic()
        if k < plan.heads:
            unused = 4 * (TILES - tiles) if first_row == 0 else 0
            shares = share * max(cdiv(length, columns), 1)
            residual = Traffic(read=_ROW + shares, loaded=_ROW + shares, written=unused, stored=share + 4 + unused)
        gradient = Traffic(loaded=_ROW + 4 * TILES + share * reads_of_e + matrix + part, stored=part, flops=flops)
        # Distinct bytes: each part of a matrix once per launch, E once, and what is stored.
        distinct = Traffic(
            read=2 * _ROW + 2 * part + part + (share if k < plan.heads else 0),
            written=share + part + ((share + 4) if k < plan.heads else 0),
        )
        total += gram + residual + gradient + distinct
    return total + Traffic(read=plan.matrices * TILES * 4, written=itemsize if plan.rows else 0)


def specimens(family: str) -> list[Specimen]:
    """Every kernel as it is launched on an architecture family."""
    odd = "matrices of odd length take 4-byte accesses in a branch of their own"
    small = "a tile of 16 x 16 has less than 16 bytes per thread"
    table = {"table_ptr": "*i64", "share_ptr": "*fp32"}
    flat = {"weight_ptr": "*fp32", "grad_ptr": "*fp32", "table_ptr": "*i64", "residual_ptr": "*fp32"}
    scalars = {"square_ptr": "*fp32", "penalty_ptr": "*fp32", "MATRICES": "i32", "share": "fp32", "scale": "fp32"} | {
        "noise": "fp32"
    }
    found = []

    def add(label: str, kernel: Any, types: dict[str, str], config: dict[str, Any], **more: Any) -> None:
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        found.append(Specimen(label, kernel, types, config, num_warps=warps, num_stages=stages, **more))

    for tile, config in _CONFIGS[family].items():
        narrow = small if tile == 16 else ""
        for single in (True, False) if tile == LARGEST_TILE else (True,):
            label = f"gram {tile}{'' if single else ' of several'}"
            types = {"weight_ptr": "*fp32", **table}
            add(label, _gram_kernel, types, config.of_gram(tile, single), narrow_loads=odd, narrow_stores=narrow)
        for offdiagonal in (False, True):
            label = f"residual {tile}{' offdiagonal' if offdiagonal else ''}"
            options = config.of_residual(tile, offdiagonal)
            types = {**table, "square_ptr": "*fp32"}
            add(label, _residual_kernel, types, options, dots=False, narrow_loads=narrow, narrow_stores=narrow)
        types = {**flat, **scalars}
        add(f"gradient {tile}", _gradient_kernel, types, config.of_gradient(tile), narrow_loads=odd, narrow_stores=odd)
    return found
