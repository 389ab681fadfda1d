"""Orthogonality penalty of all P and Q at once: value and closed-form gradient, no autograd (ALGORITHMS 2.4).

Contract. ``R = mean over matrices of ||A A^T - I||_F`` over stored rows; its gradient ``2 (A A^T - I) A / ||A A^T - I||_F`` (0 where
the norm is 0), times ``gamma / number of matrices``, is added to the flat gradient. Float32 throughout, fixed-order sums.
``groups`` is a flat list of (offset, matrices, rank, length): matrices of one shape, stored one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("igulora::orthogonality_grad_", mutates_args=("grad",))
def _orthogonality_grad_(weight: Tensor, grad: Tensor, groups: list[int], gamma: float, offdiagonal: bool) -> Tensor:
    """Reference. Returns the penalty R as a () tensor."""
    count = sum(groups[1::4])
    penalty = weight.new_zeros(())
    for i in range(0, len(groups), 4):
        offset, matrices, rank, length = groups[i : i + 4]
        part = slice(offset, offset + matrices * rank * length)
        A = weight[part].view(matrices, rank, length)
        with torch.autocast(weight.device.type, enabled=False):  # the caller may be inside autocast; this stays float32
            gram = torch.bmm(A, A.transpose(1, 2))  # (matrices, rank, length) @ (matrices, length, rank)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        if offdiagonal:
            diagonal.zero_()
        else:
            diagonal.sub_(1.0)
        norm = torch.linalg.vector_norm(gram, dim=(1, 2))
        penalty += norm.sum()
        coef = torch.where(norm > 0, (2.0 * gamma / count) / norm, torch.zeros_like(norm))
        grad[part].view(matrices, rank, length).baddbmm_(gram.mul_(coef.view(-1, 1, 1)), A)
    return penalty / max(count, 1)


@_orthogonality_grad_.register_fake
def _(weight, grad, groups, gamma, offdiagonal):
    return weight.new_empty(())


def orthogonality_grad_(
    weight: Tensor, grad: Tensor, groups: list[int], gamma: float, *, offdiagonal: bool = False
) -> Tensor:
    """Add ``gamma * dR/dA`` of every matrix to the flat gradient in place and return R.

    Args:
        weight, grad: flat float32 (n,).
        groups: (offset, matrices, rank, length) quadruples, flattened.
        gamma: weight of the penalty (the paper: 0.1).
        offdiagonal: penalise only off-diagonal entries of the Gram matrix, as the released code does.

    Raises:
        ValueError: the buffers differ in length.
    """
    if weight.shape != grad.shape:
        raise ValueError(
            f"expected weight and gradient of one length, got {tuple(weight.shape)} and {tuple(grad.shape)}"
        )
    return _orthogonality_grad_(weight, grad, groups, gamma, offdiagonal)
