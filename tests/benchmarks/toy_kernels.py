"""Kernels in which the compile report finds no fault."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from igulora.kernels.fused.common import Specimen


@triton.jit
def _product_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * K + k[None, :], mask=(rows[:, None] < M) & (k[None, :] < K), other=0.0)
        w = tl.load(
            w_ptr + columns[:, None] * K + k[None, :], mask=(columns[:, None] < N) & (k[None, :] < K), other=0.0
        )
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_K) @ (BLOCK_K, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _double_kernel(x_ptr, y_ptr, N, stride_x, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at * stride_x, mask=at < N, other=0.0), mask=at < N)


def product(label: str, dtype: str, tile: int, depth: int, precision: str = "tf32", **options: Any) -> Specimen:
    """x w^T in square tiles."""
    types = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), f"*{dtype}") | dict.fromkeys("MNK", "i32")
    constants = {"BLOCK_M": tile, "BLOCK_N": tile, "BLOCK_K": depth, "PRECISION": precision}
    return Specimen(label, _product_kernel, types, constants, **options)


def double(label: str, stride: int | None, **options: Any) -> Specimen:
    """2x, of contiguous or of spread elements."""
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32", "N": "i32"} | ({} if stride else {"stride_x": "i32"})
    constants = {"BLOCK": 1024} | ({"stride_x": stride} if stride else {})
    return Specimen(label, _double_kernel, types, constants, dots=False, **options)


def specimens(family: str) -> list[Specimen]:
    """A product of each precision and an elementwise kernel."""
    del family
    return [
        product("product bf16", "bf16", tile=64, depth=64),
        product("product fp32", "fp32", tile=64, depth=32, precision="tf32x3"),
        double("double", stride=1),
    ]
