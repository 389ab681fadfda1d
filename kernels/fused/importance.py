"""Importance in two launches for the whole model (ALGORITHMS 2.3); what it computes is said in ``kernels/importance.py``.

Contract. States and arithmetic float32; buffers of 16 bits are taken too, each value rounded once. The quotient of a score is within two
units in the last place, all else is rounded to nearest. Row sums run in a fixed order: BLOCK lanes along the row, then a tree. No
atomics. A window whose path gradient holds a NaN or an infinity writes no state.

1. ``_finite_kernel`` reads T and leaves one flag per program; it fills all ``FLAGS`` of them, so that
2. ``_importance_kernel`` reduces them by one 16-byte load per thread in every program, while the row's own addresses are on their way:
   nothing returns to the host between the two. It reads w, T and both states once and writes both states once.

Programs walk the row table (offset, length, column). A row whose offset and length are multiples of 4 moves in 16-byte accesses, another
in 4-byte ones, by a branch: one head of odd width does not slow the rest of the model. Rows of one element at the end of the table (the
lambdas) are taken BLOCK at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..traffic import Traffic
from .common import Specimen, cdiv, processors

FLAGS = 2048
# Elements per program and step. Four loads of 16 bytes are in flight per thread in either kernel, and registers let 8 programs share a
# multiprocessor: 64 KiB in flight there, more than latency times bandwidth of any memory we know of.
_FINITE_BLOCK, _BLOCK = 2048, 512
_WARPS = 4


@triton.jit
def _spoiled(path_ptr, length, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """1 where a row of T holds something that is not finite, else 0."""
    length = length // VECTOR * VECTOR
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        t = tl.load(path_ptr + cols, mask=cols < length, other=0.0).to(tl.float32)
        bad = tl.where(tl.abs(t) < float("inf"), bad, 1)
    return tl.max(bad, 0)


@triton.jit(do_not_specialize=["ROWS", "SINGLES"])
def _finite_kernel(path_ptr, table_ptr, flag_ptr, ROWS, SINGLES, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    bad = tl.full((), 0, tl.int32)
    for row in range(pid, ROWS, programs):
        offset = tl.load(table_ptr + row * 3)
        length = tl.load(table_ptr + row * 3 + 1).to(tl.int32)
        if (offset % 4 == 0) & (length % 4 == 0):
            bad = tl.maximum(bad, _spoiled(path_ptr + offset // 4 * 4, length, 4, BLOCK))
        else:
            bad = tl.maximum(bad, _spoiled(path_ptr + offset, length, 1, BLOCK))
    for start in range(pid * BLOCK, SINGLES, programs * BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        offsets = tl.load(table_ptr + (ROWS + lanes) * 3, mask=lanes < SINGLES, other=0)
        t = tl.load(path_ptr + offsets, mask=lanes < SINGLES, other=0.0).to(tl.float32)
        bad = tl.maximum(bad, tl.max(tl.where(tl.abs(t) < float("inf"), 0, 1), 0))
    for slot in range(pid, FLAGS, programs):
        tl.store(flag_ptr + slot, bad.to(tl.int8))


@triton.jit
def _elements(
    weight_ptr,
    path_ptr,
    mean_ptr,
    deviation_ptr,
    mask,
    written,
    step1,
    step2,
    eps,
    COMBINE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):
    """Read the states of some elements and, where ``written``, update them; returns score, y, mean and deviation, 0 where masked."""
    y = tl.load(path_ptr, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(mean_ptr, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(deviation_ptr, mask=mask, other=0.0).to(tl.float32)
    if not ABSOLUTE:
        y *= tl.load(weight_ptr, mask=mask, other=0.0).to(tl.float32)
    y = tl.abs(y)
    y = tl.where(y < float("inf"), y, 0.0)
    m = tl.where(written, m + step1 * (y - m), m)
    u = tl.where(written, u + step2 * (tl.abs(y - m) - u), u)
    tl.store(mean_ptr, m, mask=written)
    tl.store(deviation_ptr, u, mask=written)
    divisor = tl.where(mask, u + eps, 1.0)
    if COMBINE == "product":
        score = m * u
    elif COMBINE == "mean":
        score = m
    elif COMBINE == "snr-release":
        score = (m + eps) / divisor
    else:
        score = m / divisor
    return tl.where(mask, score, 0.0), y, m, u


@triton.jit
def _row(
    weight_ptr,
    path_ptr,
    mean_ptr,
    deviation_ptr,
    stats_ptr,
    stride,
    length,
    finite,
    step1,
    step2,
    eps,
    COMBINE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    length = length // VECTOR * VECTOR
    written = tl.where(finite, length, 0)
    scores = tl.zeros((BLOCK,), tl.float32)
    ys = tl.zeros((BLOCK,), tl.float32)
    means = tl.zeros((BLOCK,), tl.float32)
    deviations = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        score, y, m, u = _elements(
            weight_ptr + cols,
            path_ptr + cols,
            mean_ptr + cols,
            deviation_ptr + cols,
            cols < length,
            cols < written,
            step1,
            step2,
            eps,
            COMBINE,
            ABSOLUTE,
        )
        scores += score
        ys += y
        means += m
        deviations += u
    count = length.to(tl.float32)
    tl.store(stats_ptr, tl.div_rn(tl.sum(scores, 0), count))
    tl.store(stats_ptr + stride, tl.div_rn(tl.sum(ys, 0), count))
    tl.store(stats_ptr + 2 * stride, tl.div_rn(tl.sum(means, 0), count))
    tl.store(stats_ptr + 3 * stride, tl.div_rn(tl.sum(deviations, 0), count))


@triton.jit(do_not_specialize=["ROWS", "SINGLES"])
def _importance_kernel(
    weight_ptr,
    path_ptr,
    mean_ptr,
    deviation_ptr,
    table_ptr,
    flag_ptr,
    stats_ptr,
    finite_ptr,
    ROWS,
    SINGLES,
    step1,
    step2,
    eps,
    FLAGS: tl.constexpr,
    COMBINE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    # The longest rows come last in the table and first here. A program of single elements reads row 0 for nothing.
    row = tl.maximum(ROWS - 1 - pid, 0)
    flags = tl.load(flag_ptr + tl.arange(0, FLAGS))
    offset = tl.load(table_ptr + row * 3)
    length = tl.load(table_ptr + row * 3 + 1).to(tl.int32)
    column = tl.load(table_ptr + row * 3 + 2)
    finite = tl.max(flags.to(tl.int32), 0) == 0
    stride = ROWS + SINGLES
    if pid == 0:
        tl.store(finite_ptr, finite)
    if pid < ROWS:
        if (offset % 4 == 0) & (length % 4 == 0):
            aligned = offset // 4 * 4
            _row(
                weight_ptr + aligned,
                path_ptr + aligned,
                mean_ptr + aligned,
                deviation_ptr + aligned,
                stats_ptr + column,
                stride,
                length,
                finite,
                step1,
                step2,
                eps,
                COMBINE,
                ABSOLUTE,
                4,
                BLOCK,
            )
        else:
            _row(
                weight_ptr + offset,
                path_ptr + offset,
                mean_ptr + offset,
                deviation_ptr + offset,
                stats_ptr + column,
                stride,
                length,
                finite,
                step1,
                step2,
                eps,
                COMBINE,
                ABSOLUTE,
                1,
                BLOCK,
            )
    else:
        lanes = (pid - ROWS) * BLOCK + tl.arange(0, BLOCK)
        mask = lanes < SINGLES
        offsets = tl.load(table_ptr + (ROWS + lanes) * 3, mask=mask, other=0)
        columns = tl.load(table_ptr + (ROWS + lanes) * 3 + 2, mask=mask, other=0)
        score, y, m, u = _elements(
            weight_ptr + offsets,
            path_ptr + offsets,
            mean_ptr + offsets,
            deviation_ptr + offsets,
            mask,
            lanes < tl.where(finite, SINGLES, 0),
            step1,
            step2,
            eps,
            COMBINE,
            ABSOLUTE,
        )
        tl.store(stats_ptr + columns, score, mask=mask)
        tl.store(stats_ptr + stride + columns, y, mask=mask)
        tl.store(stats_ptr + 2 * stride + columns, m, mask=mask)
        tl.store(stats_ptr + 3 * stride + columns, u, mask=mask)


def _counts(regions: list[int]) -> tuple[int, int]:
    """Rows that take a program each, and the rows of one element behind them."""
    end = len(regions)
    while end and regions[end - 1] == 1:
        end -= 3
    return sum(regions[1:end:3]), sum(regions[end + 1 :: 3])


def launch_importance(
    weight: Tensor,
    path: Tensor,
    mean: Tensor,
    deviation: Tensor,
    regions: list[int],
    beta1: float,
    beta2: float,
    eps: float,
    combine: str,
    absolute: bool,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    """Row statistics (4, rows) and the () flag; states are updated in place. ``table`` is the row table on the device."""
    rows, singles = _counts(regions)
    stats = torch.empty((4, rows + singles), dtype=weight.dtype, device=weight.device)
    if rows + singles == 0:
        return stats, torch.ones((), dtype=torch.bool, device=weight.device)
    finite = torch.empty((), dtype=torch.bool, device=weight.device)
    flags = torch.empty(FLAGS, dtype=torch.int8, device=weight.device)
    checks = min(max(rows, cdiv(singles, _FINITE_BLOCK)), 16 * processors(weight.device), FLAGS)
    updates = rows + cdiv(singles, _BLOCK)
    w, t, table = weight.contiguous(), path.contiguous(), table.contiguous()
    m, u = mean.contiguous(), deviation.contiguous()
    _finite_kernel[(checks,)](t, table, flags, rows, singles, FLAGS=FLAGS, BLOCK=_FINITE_BLOCK, num_warps=_WARPS)
    _importance_kernel[(updates,)](
        w,
        t,
        m,
        u,
        table,
        flags,
        stats,
        finite,
        rows,
        singles,
        1.0 - beta1,
        1.0 - beta2,
        eps,
        FLAGS=FLAGS,
        COMBINE=combine,
        ABSOLUTE=absolute,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    for state, packed in ((mean, m), (deviation, u)):
        if packed is not state:
            state.copy_(packed)
    return stats, finite


def traffic_importance(regions: list[int], *, absolute: bool = False, itemsize: int = 4) -> Traffic:
    """Both launches, of a window whose path gradient is finite."""
    rows, singles = _counts(regions)
    if rows + singles == 0:
        return Traffic()
    elements = sum(n * length for n, length in zip(regions[1::3], regions[2::3], strict=True))
    updates = rows + cdiv(singles, _BLOCK)
    check = Traffic(
        read=elements * itemsize + 16 * rows + 8 * singles,
        written=FLAGS,
        loaded=elements * itemsize + 16 * rows + 8 * singles,
        stored=FLAGS,
    )
    # A program that takes single elements has asked for row 0 too: of a table without other rows that is one of the singles' own.
    streams = elements * itemsize * (3 if absolute else 4)
    own = 24 * rows + 16 * singles
    outputs = 2 * elements * itemsize + 4 * (rows + singles) * itemsize + 1
    update = Traffic(
        read=streams + own + FLAGS + (0 if rows else 8),
        written=outputs,
        loaded=streams + own + updates * FLAGS + 24 * (updates - rows),
        stored=outputs,
    )
    return check + update


def specimens(family: str) -> list[Specimen]:
    """Every kernel as it is launched; the same on all families."""
    odd = "rows of odd length take 4-byte accesses in a branch of their own"
    pointers = {"path_ptr": "*fp32", "table_ptr": "*i64", "flag_ptr": "*i8"}
    counts = {"ROWS": "i32", "SINGLES": "i32"}
    found = [
        Specimen(
            "finite",
            _finite_kernel,
            {**pointers, **counts},
            {"FLAGS": FLAGS, "BLOCK": _FINITE_BLOCK},
            num_warps=_WARPS,
            dots=False,
            narrow_loads=odd,
            narrow_stores="one flag of a byte per program",
        )
    ]
    states = {f"{name}_ptr": "*fp32" for name in ("weight", "mean", "deviation", "stats")}
    variants: list[tuple[str, bool]] = [
        ("snr", False),
        ("snr", True),
        ("snr-release", False),
        ("product", False),
        ("mean", False),
    ]
    for combine, absolute in variants:
        constants: dict[str, Any] = {"FLAGS": FLAGS, "COMBINE": combine, "ABSOLUTE": absolute, "BLOCK": _BLOCK}
        found.append(
            Specimen(
                f"importance {combine}{' absolute' if absolute else ''}",
                _importance_kernel,
                {
                    **pointers,
                    **states,
                    "finite_ptr": "*u1",
                    **counts,
                    "step1": "fp32",
                    "step2": "fp32",
                    "eps": "fp32",
                },
                constants,
                num_warps=_WARPS,
                dots=False,
                narrow_loads=odd,
                narrow_stores=odd,
            )
        )
    return found
