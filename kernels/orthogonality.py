"""Orthogonality penalty of all P and Q at once: value and closed-form gradient, no autograd (ALGORITHMS 2.4).

Contract. ``R = mean over matrices of ||A A^T - I||_F`` over stored rows; its gradient ``2 (A A^T - I) A / ||A A^T - I||_F`` (0 where
the norm is no more than rounding: :func:`noise_floor`), times ``gamma / number of matrices``, is added to the flat gradient. Float32
throughout, fixed-order sums.
``groups`` is a flat list of (offset, matrices, rank, length): matrices of one shape, stored one after the other. The reference takes a
group at a time; the kernels of ``fused/orthogonality.py`` take all matrices at once, by a table on the device whose rows are the parts
that programs work on (:func:`work_table`). A caller that keeps the table spares each call a copy to the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .backend import MAX_RANK, as_given, runs_fused
from .fused.common import block_rank, cdiv, padded_rank

# Columns of a matrix that one program takes per tile of its rows: enough programs for small models, few partial sums for large ones.
SEGMENT = 1024
LARGEST_TILE = 64  # rows; larger tiles of float32 products spill
TILES = MAX_RANK // LARGEST_TILE


def noise_floor(rank: int, dtype: torch.dtype) -> float:
    """The norm below which ``A A^T - I`` is rounding, and its direction no gradient: orthonormal rows are as orthonormal as they get."""
    return 8.0 * torch.finfo(dtype).eps * rank


@dataclass(frozen=True)
class Plan:
    """How the matrices of a model are cut into the work of programs.

    Attributes:
        tile: rows per program: the bucket of the largest rank, at most 64.
        single: whether every matrix is one tile high.
        rows: of the work table: offset, rank, length, first row, first column, workspace offset and number of the matrix. A program takes
            ``tile`` rows and ``SEGMENT`` columns times the matrix's number of tiles; parts with the first column 0 come first.
        heads: how many of them there are.
        matrices: how many matrices of rank 1 or more there are. count: of any rank.
        workspace: floats that the shares of all Gram matrices take: per matrix and segment of columns ``rank`` rows of
            ``padded_rank(rank)``.
    """

    tile: int
    single: bool
    rows: tuple[tuple[int, ...], ...]
    heads: int
    matrices: int
    count: int
    workspace: int

    @classmethod
    def of(cls, groups: list[int]) -> Plan:
        """Cut the matrices of ``groups``."""
        return _plan(tuple(groups))


@lru_cache(maxsize=16)
def _plan(groups: tuple[int, ...]) -> Plan:
    largest = max(groups[2::4], default=0)
    tile = min(block_rank(largest), LARGEST_TILE)
    heads: list[tuple[int, ...]] = []
    others: list[tuple[int, ...]] = []
    matrix = workspace = 0
    for i in range(0, len(groups), 4):
        offset, matrices, rank, length = groups[i : i + 4]
        columns = SEGMENT * cdiv(rank, tile)
        for k in range(matrices if rank else 0):
            for first_col in range(0, max(length, 1), columns):
                part = heads if first_col == 0 else others
                for first_row in range(0, rank, tile):
                    part.append((offset + k * rank * length, rank, length, first_row, first_col, workspace, matrix))
            workspace += max(cdiv(length, columns), 1) * rank * padded_rank(rank)
            matrix += 1
    return Plan(tile, largest <= tile, (*heads, *others), len(heads), matrix, sum(groups[1::4]), workspace)


def work_table(groups: list[int]) -> Tensor:
    """(parts, 7) int64 on the CPU: the rows of the :class:`Plan` of ``groups``."""
    return torch.tensor(Plan.of(groups).rows, dtype=torch.int64).reshape(-1, 7)


def _reference(
    weight: Tensor, grad: Tensor, groups: list[int], gamma: float, offdiagonal: bool, table: Tensor | None = None
) -> Tensor:
    """Returns the penalty R as a () tensor."""
    count = max(sum(groups[1::4]), 1)
    penalty = weight.new_zeros(())
    for i in range(0, len(groups), 4):
        offset, matrices, rank, length = groups[i : i + 4]
        part = slice(offset, offset + matrices * rank * length)
        A = weight[part].view(matrices, rank, length)
        with as_given(weight):  # the caller may be inside autocast; this stays float32
            gram = torch.bmm(A, A.transpose(1, 2))  # (matrices, rank, length) @ (matrices, length, rank)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        if offdiagonal:
            diagonal.zero_()
        else:
            diagonal.sub_(1.0)
        norm = torch.linalg.vector_norm(gram, dim=(1, 2))
        penalty += norm.sum()
        noise = noise_floor(rank, weight.dtype)
        coef = torch.where(norm > noise, (2.0 * gamma / count) / norm, torch.zeros_like(norm))
        grad[part].view(matrices, rank, length).baddbmm_(gram.mul_(coef.view(-1, 1, 1)), A)
    return penalty / count


_orthogonality_grad_ = torch.library.custom_op("igulora::orthogonality_grad_", mutates_args=("grad",))(_reference)


@_orthogonality_grad_.register_fake
def _(weight, grad, groups, gamma, offdiagonal, table=None):
    return weight.new_empty(())


@_orthogonality_grad_.register_kernel(("cpu", "cuda"))
def _dispatch(weight, grad, groups, gamma, offdiagonal, table=None):
    if not runs_fused(weight, max(groups[2::4], default=0)):
        return _reference(weight, grad, groups, gamma, offdiagonal)
    from .fused.orthogonality import launch_orthogonality  # Triton takes half a second to import

    if table is None:
        table = work_table(groups).to(weight.device)
    with as_given(weight):
        return launch_orthogonality(weight, grad, groups, gamma, offdiagonal, table)


def orthogonality_grad_(
    weight: Tensor,
    grad: Tensor,
    groups: list[int],
    gamma: float,
    *,
    offdiagonal: bool = False,
    table: Tensor | None = None,
) -> Tensor:
    """Add ``gamma * dR/dA`` of every matrix to the flat gradient in place and return R.

    Args:
        weight, grad: flat float32 (n,).
        groups: (offset, matrices, rank, length) quadruples, flattened.
        gamma: weight of the penalty (the paper: 0.1).
        offdiagonal: penalise only off-diagonal entries of the Gram matrix, as the released code does.
        table: what :func:`work_table` makes of ``groups``, on the device of the buffers. Without it kernels have to make it, which
            waits for a copy to the device.

    Raises:
        ValueError: the buffers differ in length, or the table is one of other groups.
    """
    if weight.shape != grad.shape:
        raise ValueError(
            f"expected weight and gradient of one length, got {tuple(weight.shape)} and {tuple(grad.shape)}"
        )
    if table is not None and (table.shape != (len(Plan.of(groups).rows), 7) or table.dtype != torch.int64):
        expected = f"({len(Plan.of(groups).rows)}, 7)"
        raise ValueError(f"expected a table of shape {expected}, int64, got {tuple(table.shape)}, {table.dtype}")
    return _orthogonality_grad_(weight, grad, groups, gamma, offdiagonal, table)
