"""Kernels for the compile report to find fault with: each breaks one rule."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import triton
import triton.language as tl
from toy_kernels import double, product

from igulora.kernels.fused.common import Specimen


@triton.jit
def _sum_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + at, mask=at < N, other=0.0)))


@triton.jit
def _wrong_kernel(x_ptr):
    tl.store(x_ptr, name_that_is_nowhere)  # noqa: F821


@triton.jit
def _unlisted_kernel(x_ptr):
    tl.store(x_ptr, 0.0)


@triton.jit
def _ends_kernel(x_ptr):
    tl.store(x_ptr, 0.0)


class _Ends(dict[str, Any]):
    """Constants that end the process that compiles, as a failed assertion of the compiler does."""

    def items(self) -> Any:
        if multiprocessing.parent_process() is not None:
            os.abort()
        return super().items()


def specimens(family: str) -> list[Specimen]:
    """One specimen per fault, and a good one at the end."""
    del family
    summed = {"x_ptr": "*fp32", "y_ptr": "*fp32", "N": "i32"}
    return [
        product("spills", "bf16", tile=128, depth=32, num_warps=2),
        product("too much shared memory", "bf16", tile=128, depth=128, num_warps=8, num_stages=4),
        product("scalar product", "fp32", tile=32, depth=32, precision="ieee"),
        double("strided", stride=None),
        double("strided with a reason", stride=None, narrow_loads="every other element"),
        Specimen("atomic", _sum_kernel, summed, {"BLOCK": 1024}, dots=False, narrow_stores="one number"),
        Specimen("wrong", _wrong_kernel, {"x_ptr": "*fp32"}, {}, dots=False),
        Specimen("ends", _ends_kernel, {"x_ptr": "*fp32"}, _Ends(), dots=False),
        double("contiguous", stride=1),
    ]
