"""counted() on kernels whose traffic is known by hand."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from igulora.kernels.traffic import Traffic

from .counted import counted, only_interpreted

pytestmark = only_interpreted


@triton.jit
def _copy_twice_kernel(x_ptr, y_ptr, scale_ptr, N, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < N, other=0.0)
    tl.store(y_ptr + cols, x * tl.load(scale_ptr), mask=cols < N)


@triton.jit
def _square_kernel(x_desc, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = x_desc.load([0, 0])
    y = tl.dot(x, x, input_precision="tf32x3")  # (BLOCK, BLOCK) @ (BLOCK, BLOCK)
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], y)


@triton.jit
def _atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


def test_masked_and_repeated_accesses() -> None:
    x, y, scale = torch.arange(7.0), torch.full((8,), -1.0), torch.tensor(2.0)
    with counted() as count:
        _copy_twice_kernel[(3,)](x, y, scale, 7, BLOCK=8)
    assert count.launches == [("_copy_twice_kernel", Traffic(read=32, written=28, loaded=96, stored=84))]
    assert y.tolist() == [0, 2, 4, 6, 8, 10, 12, -1]
    assert count.traffic == count.launches[0][1]


def test_descriptors_edges_and_products() -> None:
    x, y = torch.ones(12, 12), torch.empty(16, 16)
    with counted() as count:
        _square_kernel[(1,)](TensorDescriptor.from_tensor(x, [16, 16]), y, BLOCK=16)
        _square_kernel[(1,)](TensorDescriptor.from_tensor(x, [16, 16]), y, BLOCK=16)
    once = Traffic(read=12 * 12 * 4, written=1024, loaded=12 * 12 * 4, stored=1024, flops=2 * 16**3)
    assert count.traffic == once + once
    assert y[:12, :12].eq(12).all()


def test_atomics_are_refused() -> None:
    with counted(), pytest.raises(InterpreterError, match="without atomics"):
        _atomic_kernel[(1,)](torch.zeros(1))
