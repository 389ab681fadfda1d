"""Products with windowed triplets: n blocks, each with triplets of its own over its window of x and of y (ALGORITHMS 5; RaLoRA).

P (R, N/n) and Q (R, K/n) hold the rows of one block after another, R/n of each. n = 1 is the ordinary adapter, whose products these are
then. A block-diagonal adapter has as many parameters as one of rank R/n, and as many products.
"""

from __future__ import annotations

from torch import Tensor, bmm


def _by_block(t: Tensor, n: int) -> Tensor:
    """(M, n k) as (n, M, k)."""
    return t.reshape(t.shape[0], n, t.shape[1] // n).transpose(0, 1)


def into_rank(x: Tensor, Q: Tensor) -> Tensor:
    """``x Q^T`` block by block: (M, K), (R, K/n) -> (M, R). Likewise ``dy P^T``."""
    n, rows = x.shape[1] // Q.shape[1], Q.shape[0]
    if n == 1:
        return x @ Q.t()
    of_block = Q.reshape(n, rows // n, Q.shape[1]).transpose(1, 2)
    return bmm(_by_block(x, n), of_block).transpose(0, 1).reshape(x.shape[0], rows)  # (n, M, K/n) @ (n, K/n, R/n)


def out_of_rank(T: Tensor, P: Tensor, features: int) -> Tensor:
    """``T P`` block by block: (M, R), (R, N/n) -> (M, N), N being ``features``. Likewise the gradient of x from that of S."""
    n, rows = features // P.shape[1], P.shape[0]
    if n == 1:
        return T @ P
    of_block = P.reshape(n, rows // n, P.shape[1])
    return bmm(_by_block(T, n), of_block).transpose(0, 1).reshape(T.shape[0], features)  # (n, M, R/n) @ (n, R/n, N/n)


def over_rows(T: Tensor, y: Tensor, length: int) -> Tensor:
    """``T^T y`` block by block: (M, R), (M, N) -> (R, N/n), N/n being ``length``."""
    n = y.shape[1] // length
    if n == 1:
        return T.t() @ y
    return bmm(_by_block(T, n).transpose(1, 2), _by_block(y, n)).reshape(
        T.shape[1], length
    )  # (n, R/n, M) @ (n, M, N/n)


def widened(rows: Tensor, n: int) -> Tensor:
    """Windowed rows (R, L) as rows of the whole side, (R, n L), zero outside their windows."""
    if n == 1:
        return rows
    wide = rows.new_zeros((n, rows.shape[0] // n, n, rows.shape[1]))
    for block, own in enumerate(rows.view(n, -1, rows.shape[1])):
        wide[block, :, block] = own
    return wide.view(rows.shape[0], n * rows.shape[1])
