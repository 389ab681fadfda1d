"""Partial sums into gradients: up to three matrices in one launch, each with a result of its own or an accumulator it is added to.

Contract. Float32. A job's partial sums lie ``stride`` elements apart; the first ``count0`` of them make ``out``, the next ``count1`` are
added to ``acc``. Every sum is taken in the order of the parts: same bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..traffic import Traffic
from .common import Specimen, cdiv

JOBS = 3
_BLOCK = 1024


@dataclass(frozen=True)
class Job:
    """One matrix: its partial sums, and where they go (None: that share is dropped)."""

    part: Tensor
    stride: int
    numel: int
    count0: int
    count1: int
    out: Tensor | None
    acc: Tensor | None


@triton.jit
def _sum_job(part_ptr, out_ptr, acc_ptr, at, stride, numel, count0, count1):
    inside = at < numel
    if out_ptr is not None:
        total = tl.zeros(at.shape, tl.float32)
        for i in range(count0):
            total += tl.load(part_ptr + tl.cast(i, tl.int64) * stride + at, mask=inside, other=0.0)
        tl.store(out_ptr + at, total, mask=inside)
    if acc_ptr is not None:
        total = tl.load(acc_ptr + at, mask=inside, other=0.0)
        for i in range(count0, count0 + count1):
            total += tl.load(part_ptr + tl.cast(i, tl.int64) * stride + at, mask=inside, other=0.0)
        tl.store(acc_ptr + at, total, mask=inside)


_COUNTS = [f"{name}{job}" for job in range(JOBS) for name in ("first", "second")]


@triton.jit(do_not_specialize=_COUNTS)
def _sum_partials_kernel(
    part0_ptr,
    part1_ptr,
    part2_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    acc0_ptr,
    acc1_ptr,
    acc2_ptr,
    stride0,
    stride1,
    stride2,
    numel0,
    numel1,
    numel2,
    first0,
    first1,
    first2,
    second0,
    second1,
    second2,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    job = tl.program_id(1)
    if job == 0:
        _sum_job(part0_ptr, out0_ptr, acc0_ptr, at, stride0, numel0, first0, second0)
    if job == 1:
        _sum_job(part1_ptr, out1_ptr, acc1_ptr, at, stride1, numel1, first1, second1)
    if job == 2:
        _sum_job(part2_ptr, out2_ptr, acc2_ptr, at, stride2, numel2, first2, second2)


def launch_sum_partials(jobs: list[Job]) -> None:
    """Finish up to three jobs."""
    blocks = cdiv(max(job.numel for job in jobs), _BLOCK)
    each = [*jobs, *([jobs[0]] * (JOBS - len(jobs)))]
    accs = [None if job.acc is None else job.acc.contiguous() for job in each]
    _sum_partials_kernel[(blocks, len(jobs))](
        *(job.part for job in each),
        *(job.out for job in each),
        *accs,
        *(job.stride for job in each),
        *(job.numel for job in each),
        *(job.count0 for job in each),
        *(job.count1 for job in each),
        BLOCK=_BLOCK,
    )
    for job, acc in zip(jobs, accs, strict=False):
        if job.acc is not None and acc is not None and not job.acc.is_contiguous():
            job.acc.copy_(acc)


def traffic_sum_partials(jobs: list[tuple[int, int, int, bool, bool]]) -> Traffic:
    """Of one :func:`launch_sum_partials`; a job is (numel, count0, count1, has out, has accumulator)."""
    read = written = 0
    for numel, count0, count1, has_out, has_acc in jobs:
        read += 4 * numel * (count0 * has_out + (count1 + 1) * has_acc)
        written += 4 * numel * (has_out + has_acc)
    return Traffic(read, written, read, written)


def specimens(family: str) -> list[Specimen]:
    """The one configuration of :func:`launch_sum_partials`."""
    types = {f"{name}{job}_ptr": "*fp32" for job in range(JOBS) for name in ("part", "out", "acc")}
    types |= {f"{name}{job}": "i32" for job in range(JOBS) for name in ("stride", "numel", "first", "second")}
    return [Specimen("sum partials", _sum_partials_kernel, types, {"BLOCK": _BLOCK}, num_warps=4, dots=False)]
