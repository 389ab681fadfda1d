"""orthogonality_grad_ against autograd of the penalty, in float64 and float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from igulora.kernels import orthogonality_grad_

# (offset, matrices, rank, length): several of a shape with a gap after them, one, rank 1, and more rows than columns.
GROUPS = [0, 3, 2, 5, 32, 1, 4, 6, 56, 2, 1, 3, 64, 1, 5, 2]
SIZE = 80


def penalty(weight: Tensor, groups: list[int], offdiagonal: bool) -> Tensor:
    """R as printed: the mean over matrices of ||A A^T - I||_F, or of its off-diagonal part."""
    norms = []
    for i in range(0, len(groups), 4):
        offset, matrices, rank, length = groups[i : i + 4]
        for A in weight[offset : offset + matrices * rank * length].view(matrices, rank, length):
            gram = A @ A.t()
            rest = gram - torch.diag(gram.diagonal()) if offdiagonal else gram - torch.eye(rank, dtype=gram.dtype)
            norms.append(torch.linalg.matrix_norm(rest))
    return torch.stack(norms).mean()


def weights(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("offdiagonal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_value_and_gradient(offdiagonal: bool, dtype: torch.dtype, tolerance: float) -> None:
    # A matrix of rank 1 has no off-diagonal part: its norm is 0, where autograd's gradient is NaN and ours is 0.
    groups = GROUPS[:8] + GROUPS[12:] if offdiagonal else GROUPS
    w = weights(torch.float64).requires_grad_()
    exact = penalty(w, groups, offdiagonal)
    (0.3 * exact).backward()
    held = torch.full((SIZE,), 2.0, dtype=dtype)
    grad = held.clone()
    value = orthogonality_grad_(w.detach().to(dtype), grad, groups, 0.3, offdiagonal=offdiagonal)
    assert value.shape == ()
    torch.testing.assert_close(value.double(), exact.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close((grad - held).double(), w.grad, rtol=tolerance, atol=tolerance)
    assert torch.equal(grad[30:32], held[30:32])  # the gap


def test_zero_norm_has_no_gradient() -> None:
    weight = torch.eye(3, 5).flatten()
    grad = torch.zeros_like(weight)
    assert float(orthogonality_grad_(weight, grad, [0, 1, 3, 5], 0.1)) == 0.0
    assert torch.count_nonzero(grad) == 0
    lone = torch.randn(4, generator=torch.Generator().manual_seed(1))
    grad = torch.zeros(4)
    assert float(orthogonality_grad_(lone, grad, [0, 1, 1, 4], 0.1, offdiagonal=True)) == 0.0
    assert torch.count_nonzero(grad) == 0


def test_one_orthonormal_matrix_beside_others() -> None:
    weight = torch.cat((torch.eye(2, 3).flatten(), torch.ones(6)))
    grad = torch.zeros(12)
    orthogonality_grad_(weight, grad, [0, 2, 2, 3], 1.0)
    assert torch.count_nonzero(grad[:6]) == 0
    assert grad.isfinite().all()
    assert torch.count_nonzero(grad[6:]) == 6


def test_nothing_to_do() -> None:
    grad = torch.ones(4)
    assert float(orthogonality_grad_(torch.ones(4), grad, [], 0.1)) == 0.0
    orthogonality_grad_(torch.ones(4) * 3, grad, [0, 1, 2, 2], 0.0)
    assert torch.equal(grad, torch.ones(4))


def test_float32_inside_autocast() -> None:
    one, two = torch.zeros(SIZE), torch.zeros(SIZE)
    expected = orthogonality_grad_(weights(torch.float32), one, GROUPS, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = orthogonality_grad_(weights(torch.float32), two, GROUPS, 0.1)
    assert torch.equal(value, expected)
    assert torch.equal(one, two)


@pytest.mark.parametrize("groups", [GROUPS, []])
@pytest.mark.parametrize("offdiagonal", [False, True])
def test_opcheck(groups: list[int], offdiagonal: bool) -> None:
    args = (weights(torch.float32), torch.zeros(SIZE), groups, 0.1, offdiagonal)
    torch.library.opcheck(torch.ops.igulora.orthogonality_grad_.default, args)


def test_same_bits_and_bad_input() -> None:
    runs = []
    for _ in range(2):
        grad = torch.zeros(SIZE)
        runs.append((orthogonality_grad_(weights(torch.float32), grad, GROUPS, 0.1), grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with pytest.raises(ValueError, match=r"one length, got \(80,\) and \(79,\)"):
        orthogonality_grad_(weights(), torch.zeros(79, dtype=torch.float64), GROUPS, 0.1)


def test_orthonormal_rows_are_left_alone() -> None:
    """Their A A^T - I is rounding; divided by its own norm it would push every row somewhere at full strength."""
    g = torch.Generator().manual_seed(0)
    for rank, length in ((1, 64), (8, 200), (32, 4096), (64, 576)):
        A = torch.linalg.qr(torch.randn(length, rank, generator=g)).Q.t().contiguous().view(-1)
        grad = torch.zeros_like(A)
        orthogonality_grad_(A, grad, [0, 1, rank, length], 0.1)
        assert torch.count_nonzero(grad) == 0
        orthogonality_grad_(A * 1.001, grad, [0, 1, rank, length], 0.1)
        assert torch.count_nonzero(grad) > 0
