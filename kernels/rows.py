"""Rows of a batch: groups with an alpha of their own, ranges with a destination of their own, dropped entries; plain PyTorch.

The M rows of x form n equal consecutive groups (sequences). Groups [0, train_groups) are training rows: their adapter gradients, with
the factor alpha of the chain rule, are the parameters' gradients. Groups [path_start, n) are path rows: their adapter gradients are those
of ALGORITHMS section 1 (no factor alpha), times the group's ``path_weight``, and are added to the path accumulator. The two ranges meet
in a mixed batch, are one of them empty in a separate path pass, and overlap where a training row is itself a sample of the path (on-path
training, and the endpoint f(1) of the trapezoid).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .backend import runs_fused
from .fused.common import padded_rank
from .philox import dropout_keep_mask
from .windows import into_rank, over_rows

Again = Callable[[], Tensor]


def again_as(again: Again | None, given: Tensor, used: Tensor) -> Again | None:
    """How to make the input anew that an operator works with, from how to make the one it was given (before a cast)."""
    return again if again is None or used is given else lambda: again().to(used.dtype)


def rows_first(t: Tensor) -> Tensor:
    """(..., K) as (M, K)."""
    if t.ndim == 2:
        return t
    return t.flatten(0, -2) if t.ndim > 2 else t.unsqueeze(0)


def group_count(alpha: Tensor | None, path_weight: Tensor | None) -> int:
    """Groups the rows form: one value of alpha or of the path weights for each, and a single group without either."""
    if alpha is not None:
        return alpha.numel()
    return 1 if path_weight is None else path_weight.numel()


@dataclass(frozen=True)
class Ranges:
    """Row numbers: training rows [0, train), path rows [path, rows), ``per_group`` of them in each group."""

    rows: int
    per_group: int
    train: int
    path: int

    @classmethod
    def of(cls, rows: int, groups: int, train_groups: int, path_start: int) -> Ranges:
        """From counts of groups."""
        per_group = rows // groups if groups else 0
        return cls(rows, per_group, per_group * train_groups, per_group * path_start)

    @property
    def has_path(self) -> bool:
        """Whether there are path rows."""
        return self.path < self.rows


def by_group(rows: Tensor, groups: int) -> Tensor:
    """(..., M, r) as (..., groups, M / groups, r)."""
    *leading, M, rank = rows.shape
    return rows.reshape(*leading, groups, M // groups, rank)


def times_per_group(rows: Tensor, factor: Tensor | None) -> Tensor:
    """(..., M, r) rows times a factor (n,) for each of n equal groups of rows, in the rows' dtype; unchanged without a factor."""
    if factor is None or factor.numel() == 0:
        return rows
    grouped = by_group(rows, factor.numel())
    return (grouped * factor.view(-1, 1, 1)).reshape(rows.shape).to(rows.dtype)


def keep_factor(x2: Tensor, seed: Tensor | None, p: float) -> Tensor | None:
    """0 where dropout drops and 1/(1-p) elsewhere, in x's dtype and shape; None without dropout."""
    if p == 0.0 or seed is None:
        return None
    return dropout_keep_mask(seed, x2.shape[0], x2.shape[1], p).to(x2.dtype).mul_(1.0 / (1.0 - p))


def flat_alpha(alpha: Tensor | None) -> Tensor | None:
    """alpha as (n,)."""
    return None if alpha is None else alpha.reshape(-1)


def rank_factors(
    x2: Tensor,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``alpha S`` and ``c P`` in x's dtype, whose product is the rank term; and S, empty where it was given."""
    if S is None:
        keep = keep_factor(x2, seed, dropout_p)
        S = saved = into_rank(x2 if keep is None else x2 * keep, Q.to(x2.dtype))  # (M, K) @ (K, r)
    else:
        saved = x2.new_empty((0,))
    return times_per_group(S, flat_alpha(alpha)), (P * (scale * mask * E).unsqueeze(1)).to(x2.dtype), saved


def training_rows(G: Tensor, alpha: Tensor | None, ranges: Ranges, train_groups: int) -> tuple[slice, Tensor]:
    """Which rows train, and their rows of the gradient G with the factor alpha of the chain rule."""
    rows = slice(0, ranges.train)
    return rows, times_per_group(G[..., rows, :], None if alpha is None else alpha.reshape(-1)[:train_groups])


def path_rows(G: Tensor, path_weight: Tensor, ranges: Ranges, path_start: int) -> tuple[slice, Tensor]:
    """Which rows are samples of the path, and their rows of the gradient G times the groups' weights."""
    rows = slice(ranges.path, None)
    return rows, times_per_group(G[..., rows, :], path_weight.reshape(-1)[path_start:])


def q_gradient(
    G: Tensor,
    dropped: Tensor,
    alpha: Tensor | None,
    path_weight: Tensor | None,
    path_Q: Tensor | None,
    train_groups: int,
    path_start: int,
    wanted: bool,
) -> Tensor | None:
    """dQ of the training rows (None unless wanted), after adding that of the path rows to ``path_Q``.

    Args:
        G: gradient of S, without any group's factor. dropped: (M, K) input of Q. Others: as in ``svd_linear``.
    """
    ranges = Ranges.of(dropped.shape[0], group_count(alpha, path_weight), train_groups, path_start)
    if path_Q is not None and path_weight is not None and ranges.has_path:
        rows, weighed = path_rows(G, path_weight, ranges, path_start)
        path_Q += over_rows(weighed, dropped[rows])
    if not wanted:
        return None
    rows, weighed = training_rows(G, alpha, ranges, train_groups)
    return over_rows(weighed, dropped[rows])  # (r, M) @ (M, K)


def empty_results(like: Tensor, results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """An empty tensor of its own for every None: an operator returns tensors, and never one storage twice."""
    return tuple(like.new_empty((0,)) if t is None else t for t in results)


def windows(features: int, P: Tensor, Q: Tensor, seed: Tensor | None, dropout_p: float) -> tuple[int, int]:
    """(blocks of a layer with ``features`` outputs, columns of their windows of x if dropout drops there, else 0)."""
    blocks = features // P.shape[1]
    return blocks, Q.shape[1] if blocks > 1 and seed is not None and dropout_p > 0.0 else 0


def serves(x: Tensor, features: int, P: Tensor, Q: Tensor, seed: Tensor | None, dropout_p: float) -> bool:
    """Whether a layer with ``features`` outputs runs as Triton kernels."""
    blocks, dropped = windows(features, P, Q, seed, dropout_p)
    return runs_fused(x, P.shape[0] // blocks, dropped)


def rank_buffer(like: Tensor, rows: int, rank: int, blocks: int = 1, dropped: int = 0) -> Tensor:
    """Empty S or gradient of S as the running backend stores it: kernels pad its rows to whole 16-byte accesses.

    (rows, rank) for ordinary triplets, (blocks, rows, rank / blocks) for windowed ones; ``dropped`` as for ``runs_fused``.
    """
    own = rank // blocks
    columns = padded_rank(own) if runs_fused(like, own, dropped) else own
    return like.new_empty((rows, columns) if blocks == 1 else (blocks, rows, columns))[..., :own]
