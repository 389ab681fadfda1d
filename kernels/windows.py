"""Products with windowed triplets: n blocks, each with triplets of its own over its window of x and of y (ALGORITHMS 5; RaLoRA).

P (R, N/n) and Q (R, K/n) hold the rows of one block after another, R/n of each. What has a row of x and a triplet, S and its gradient, is
(n, M, R/n) then. n = 1 is the ordinary adapter: (M, R), and these are its products. A block-diagonal adapter has as many parameters as
one of rank R/n, and as many multiplications; S and its gradient are n times as large.
"""

from __future__ import annotations

from torch import Tensor, addmm, bmm


def _by_block(t: Tensor, n: int) -> Tensor:
    """(M, n k) as (n, M, k); no copy."""
    return t.view(t.shape[0], n, t.shape[1] // n).transpose(0, 1)


def _blocks(rows: Tensor, n: int) -> Tensor:
    """(R, length) as (n, R/n, length)."""
    return rows.view(n, rows.shape[0] // n, rows.shape[1])


def per_triplet(values: Tensor, like: Tensor) -> Tensor:
    """(R,) as it multiplies S or its gradient."""
    return values if like.ndim == 2 else values.view(like.shape[0], 1, like.shape[2])


def into_rank(x: Tensor, Q: Tensor) -> Tensor:
    """``x Q^T``: (M, K), (R, K/n) -> (M, R), or (n, M, R/n). Likewise ``dy P^T``."""
    n = x.shape[1] // Q.shape[1]
    if n == 1:
        return x @ Q.t()
    return bmm(_by_block(x, n), _blocks(Q, n).transpose(1, 2))  # (n, M, K/n) @ (n, K/n, R/n)


def add_out_of_rank(y: Tensor, T: Tensor, P: Tensor) -> Tensor:
    """``y + T P`` into y (M, N), whose rows are neighbours; T like S. Likewise the gradient of x from that of S."""
    if T.ndim == 2:
        return y.addmm_(T, P)
    _by_block(y, T.shape[0]).baddbmm_(T, _blocks(P, T.shape[0]))  # (n, M, R/n) @ (n, R/n, N/n)
    return y


def out_of_rank(T: Tensor, P: Tensor, bias: Tensor | None = None) -> Tensor:
    """``T P + bias`` (M, N)."""
    if T.ndim == 2:
        return T @ P if bias is None else addmm(bias, T, P)  # (M, R) @ (R, N)
    n, M, _ = T.shape
    y = T.new_empty((M, n * P.shape[1]))
    if bias is not None:
        return add_out_of_rank(y.copy_(bias), T, P)
    bmm(T, _blocks(P, n), out=_by_block(y, n))
    return y


def over_rows(T: Tensor, y: Tensor) -> Tensor:
    """``T^T y``, T like S: (M, N) -> (R, N/n)."""
    if T.ndim == 2:
        return T.t() @ y
    n, _, rank = T.shape
    of_blocks = bmm(T.transpose(1, 2), _by_block(y, n))  # (n, R/n, M) @ (n, M, N/n)
    return of_blocks.view(n * rank, y.shape[1] // n)


def widened(rows: Tensor, n: int) -> Tensor:
    """Windowed rows (R, L) as rows of the whole side, (R, n L), zero outside their windows."""
    if n == 1:
        return rows
    wide = rows.new_zeros((n, rows.shape[0] // n, n, rows.shape[1]))
    for block, own in enumerate(rows.view(n, -1, rows.shape[1])):
        wide[block, :, block] = own
    return wide.view(rows.shape[0], n * rows.shape[1])
