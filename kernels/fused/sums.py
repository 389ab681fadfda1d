"""Partial sums into gradients: a vector and up to three matrices in one launch, each with a result or an accumulator it is added to.

Contract. Float32. A job's partial sums lie ``stride`` elements apart; the first ``count0`` of them make ``out``, the next ``count1`` are
added to ``acc``. Every sum is taken in one order: same bits every time. Ranks are runtime values: a matrix is rows times columns, and only
the columns, which no rank changes, are specialised on. The vector is short and has many parts, where a matrix is large and has few: a
program sums 16 of its elements, hundreds of parts at once. It lies in its buffer wherever the ranks before it end.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..traffic import Traffic
from .common import Specimen, cdiv
from .launch import Plan, launch, planned

MATRICES = 3
_BLOCK = 1024
_PARTS, _COLUMNS = 256, 16  # of a vector's sum at once


@dataclass
class Job:
    """One result of ``numel`` elements: its partial sums, and where they go (None: that share is dropped).

    Attributes:
        columns: of a matrix, which ``numel`` and ``stride`` are multiples of; 0 for a vector, whose ``stride`` is its padded length.
    """

    part: Tensor
    stride: int
    numel: int
    count0: int
    count1: int
    out: Tensor | None
    acc: Tensor | None
    columns: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """What a launch depends on beside the tensors."""
        return self.stride, self.numel, self.count0, self.count1, self.columns


@triton.jit
def sum_of_parts(part_ptr, at, inside, stride, first, end):
    """Parts [first, end) added up in their order where ``inside``, eight loads under way at a time."""
    total = tl.zeros(at.shape, tl.float32)
    for i in range(first, end, 8):
        part = part_ptr + tl.cast(i, tl.int64) * stride + at
        for j in tl.static_range(8):
            total += tl.load(part + j * stride, mask=inside & (i + j < end), other=0.0)
    return total


@triton.jit
def _sum_matrix(part_ptr, out_ptr, acc_ptr, at, stride, numel, count0, count1):
    inside = at < numel
    if out_ptr is not None:
        tl.store(out_ptr + at, sum_of_parts(part_ptr, at, inside, stride, 0, count0), mask=inside)
    if acc_ptr is not None:
        total = tl.load(acc_ptr + at, mask=inside, other=0.0)
        total += sum_of_parts(part_ptr, at, inside, stride, count0, count0 + count1)
        tl.store(acc_ptr + at, total, mask=inside)


@triton.jit
def _sum_rows(part_ptr, columns, stride, first, end, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for i in range(first, end, PARTS):
        rows = i + tl.arange(0, PARTS)
        at = part_ptr + rows[:, None] * stride + columns[None, :]  # parts are padded to whole multiples of COLUMNS
        total += tl.load(at, mask=rows[:, None] < end, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _sum_vector(
    part_ptr, out_ptr, acc_ptr, first_column, stride, numel, count0, count1, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    columns = first_column + tl.arange(0, COLUMNS)
    inside = columns < numel
    if out_ptr is not None:
        tl.store(out_ptr + columns, _sum_rows(part_ptr, columns, stride, 0, count0, PARTS, COLUMNS), mask=inside)
    if acc_ptr is not None:
        total = tl.load(acc_ptr + columns, mask=inside, other=0.0)
        total += _sum_rows(part_ptr, columns, stride, count0, count0 + count1, PARTS, COLUMNS)
        tl.store(acc_ptr + columns, total, mask=inside)


_RUNTIME = [f"{name}{job}" for job in ("", *range(MATRICES)) for name in ("STRIDE", "ROWS", "first", "second")]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["acc_ptr"])
def _sum_partials_kernel(
    part_ptr,
    out_ptr,
    acc_ptr,
    part0_ptr,
    out0_ptr,
    acc0_ptr,
    part1_ptr,
    out1_ptr,
    acc1_ptr,
    part2_ptr,
    out2_ptr,
    acc2_ptr,
    STRIDE,
    ROWS,
    first,
    second,
    STRIDE0,
    ROWS0,
    first0,
    second0,
    STRIDE1,
    ROWS1,
    first1,
    second1,
    STRIDE2,
    ROWS2,
    first2,
    second2,
    COLUMNS0,
    COLUMNS1,
    COLUMNS2,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    job = tl.program_id(1)
    if job == 0:
        column = tl.program_id(0) * COLUMNS
        if column < ROWS:
            _sum_vector(part_ptr, out_ptr, acc_ptr, column, STRIDE * COLUMNS, ROWS, first, second, PARTS, COLUMNS)
    if job == 1:
        _sum_matrix(part0_ptr, out0_ptr, acc0_ptr, at, STRIDE0 * COLUMNS0, ROWS0 * COLUMNS0, first0, second0)
    if job == 2:
        _sum_matrix(part1_ptr, out1_ptr, acc1_ptr, at, STRIDE1 * COLUMNS1, ROWS1 * COLUMNS1, first1, second1)
    if job == 3:
        _sum_matrix(part2_ptr, out2_ptr, acc2_ptr, at, STRIDE2 * COLUMNS2, ROWS2 * COLUMNS2, first2, second2)


def launch_sum_partials(jobs: list[Job]) -> None:
    """Finish one vector and up to three matrices, or fewer."""
    vectors = [job for job in jobs if not job.columns]
    matrices = [job for job in jobs if job.columns]
    assert len(vectors) <= 1
    assert len(matrices) <= MATRICES
    pointers: list[Tensor | None] = []
    strided: list[tuple[Tensor, Tensor]] = []
    if not vectors:
        pointers += (None, None, None)
    for job in (*vectors, *matrices):
        acc = job.acc
        if acc is not None and not acc.is_contiguous():
            own, acc = acc, acc.contiguous()
            strided.append((own, acc))
        pointers += (job.part, job.out, acc)
    pointers += [None] * (3 * (MATRICES - len(matrices)))
    launch(_plan(tuple([job.shape for job in (*vectors, *matrices)])), *pointers)
    for own, acc in strided:
        own.copy_(acc)


@planned
def _plan(shapes: tuple[tuple[int, int, int, int, int], ...]) -> Plan:
    """Of the vector, which has no columns, if there is one, then the matrices."""
    nothing = (0, 0, 0, 0, 0)
    has_vector = shapes[0][-1] == 0
    each = shapes if has_vector else (nothing, *shapes)
    each += (nothing,) * (1 + MATRICES - len(each))
    numbers: list[int] = []
    for stride, numel, count0, count1, columns in each:
        numbers += (stride // (columns or _COLUMNS), numel // (columns or 1), count0, count1)
    blocks = max(cdiv(numel, _BLOCK if columns else _COLUMNS) for _, numel, _, _, columns in shapes)
    grid = (blocks, len(shapes) + (0 if has_vector else 1))
    constants = {"BLOCK": _BLOCK, "PARTS": _PARTS, "COLUMNS": _COLUMNS}
    return Plan(_sum_partials_kernel, grid, (*numbers, *(columns for *_, columns in each[1:])), constants)


def traffic_sum_partials(jobs: list[tuple[int, int, int, int, bool, bool]]) -> Traffic:
    """Of one :func:`launch_sum_partials`; a job is (numel, stride, count0, count1, has out, has accumulator)."""
    read = written = 0
    for numel, stride, count0, count1, has_out, has_acc in jobs:
        read += 4 * stride * (count0 * has_out + count1 * has_acc) + 4 * numel * has_acc
        written += 4 * numel * (has_out + has_acc)
    return Traffic(read, written, read, written)


def specimens(family: str) -> list[Specimen]:
    """The one configuration of :func:`launch_sum_partials`."""
    types = {f"{name}{job}_ptr": "*fp32" for job in ("", *range(MATRICES)) for name in ("part", "out", "acc")}
    types |= dict.fromkeys([*_RUNTIME, *(f"COLUMNS{job}" for job in range(MATRICES))], "i32")
    constants = {"BLOCK": _BLOCK, "PARTS": _PARTS, "COLUMNS": _COLUMNS}
    return [Specimen("sum partials", _sum_partials_kernel, types, constants, num_warps=4, dots=False)]
