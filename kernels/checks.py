"""What the adapted-layer operators are told: operands that fit together, or an error that says what was expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import autocasts
from .rows import group_count

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Path = tuple[Tensor, Tensor, Tensor]


def check_input(x: Tensor, in_features: int, groups: int) -> None:
    """x has a supported dtype, the right features, and the sequences that alpha or the path weights belong to."""
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"expected x in float64, float32, bfloat16 or float16, got {x.dtype}; convert it before the call"
        )
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"expected x with {in_features} features in its last dimension, got {tuple(x.shape)}")
    if groups == 0:
        raise ValueError("expected alpha to hold at least one value, got none")
    if groups > 1 and (x.ndim < 2 or (x.shape[0] != groups and (x.ndim > 2 or x.shape[0] % groups))):
        raise ValueError(
            f"expected x to hold {groups} sequences in its first dimension (one alpha each), got shape {tuple(x.shape)}; "
            'a model that reorders its batch needs separate path passes: path_pass="separate"'
        )


def check_same_dtype(x: Tensor, others: dict[str, Tensor | None]) -> None:
    """Operands of the base product share x's dtype."""
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"expected x and {name} in one dtype, got x {x.dtype} and {name} {tensor.dtype}; convert one or use autocast"
            )


def check_windows(out_features: int, in_features: int, P: Tensor, Q: Tensor) -> int:
    """How many blocks the rows of P and Q are windows of, for an (out, in) layer: 1 where they are as long as its sides."""
    n = out_features // P.shape[-1] if P.ndim == 2 and P.shape[-1] else 1
    if n > 1 and (Q.ndim != 2 or n * P.shape[-1] != out_features or n * Q.shape[-1] != in_features or P.shape[0] % n):
        raise ValueError(
            f"expected P and Q with rows of out / n and in / n for a layer of {in_features} to {out_features} features and n blocks of as "
            f"many rows each, got {tuple(P.shape)} and {tuple(Q.shape)}"
        )
    return max(n, 1)


def check_masters(out_features: int, in_features: int, P: Tensor, E: Tensor, Q: Tensor, mask: Tensor) -> None:
    """P, E, Q and mask are those of one rank for an (out, in) layer."""
    r = P.shape[0]
    found = (P.shape, E.shape, Q.shape, mask.shape)
    wanted = ((r, out_features), (r,), (r, in_features), (r,))
    if found == wanted:
        return
    for name, shape, right in zip(("P", "E", "Q", "mask"), found, wanted, strict=True):
        if tuple(shape) != right:
            raise ValueError(
                f"expected {name} of shape {right} for a layer of {in_features} to {out_features} features and rank {r}, "
                f"got {tuple(shape)}"
            )


def check_given(S: Tensor | None, P: Tensor, blocks: int) -> None:
    """S, where it is given, is that of these triplets, which are those of one block."""
    if S is None:
        return
    if blocks > 1:
        raise ValueError(f"expected S to be left to the operator for triplets in {blocks} blocks, got a tensor")
    if S.ndim != 2 or S.shape[1] != P.shape[0]:
        raise ValueError(f"expected S of shape (rows, {P.shape[0]}) for these triplets, got {tuple(S.shape)}")


def check_device(x: Tensor, others: dict[str, Tensor | None]) -> None:
    """Every operand lies where x does."""
    device = x.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"expected every operand on {x.device} like x, got {name} on {tensor.device}; move the model as a whole"
            )


def check_dropout(dropout_p: float) -> None:
    """A probability."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"expected 0 <= dropout_p < 1, got {dropout_p}")


def check_rows(
    alpha: Tensor | None,
    path_weight: Tensor | None,
    train_groups: int | None,
    path_start: int | None,
    has_accumulators: bool,
) -> tuple[int, int]:
    """The ranges of training and path rows, defaults filled in: (train_groups, path_start)."""
    n = group_count(alpha, path_weight)
    train_groups = n if train_groups is None else train_groups
    if not 0 <= train_groups <= n:
        raise ValueError(f"expected 0 <= train_groups <= {n} (the number of alphas), got {train_groups}")
    path_start = train_groups if path_start is None else path_start
    if not 0 <= path_start <= n:
        raise ValueError(f"expected 0 <= path_start <= {n} (the number of alphas), got {path_start}")
    if path_start < n and (not has_accumulators or path_weight is None or path_weight.numel() != n):
        raise ValueError(
            f"expected path accumulators and {n} path weights for path rows (path_start < number of alphas), got none"
        )
    return train_groups, path_start


def under_autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """x and the base product's other operands in autocast's dtype, where autocast is on."""
    if not autocasts(x.device.type):
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))
