"""The rank-r update of a base that runs its own forward: ``y + alpha * s * ((dropout(x) Q^T) * (m * lambda)) P``, in one pass over y.

Contract. y and x share one compute dtype; masters, rounding of S, rows and determinism as in ``svd_linear``. y is read once and rounded
once more. Eager calls write into y's own storage, compiled ones make a new tensor of the same numbers. The backward is that of
``svd_linear`` without a base: y's gradient passes through untouched, the base runs its own backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd

from .backend import as_given, past_dispatcher
from .checks import (
    Path,
    check_device,
    check_dropout,
    check_given,
    check_input,
    check_masters,
    check_rows,
    check_windows,
)
from .rows import Again, again_as, group_count, rank_buffer, rank_factors, rows_first, serves, windows
from .svd_linear import gradients
from .windows import add_out_of_rank


def _reference(
    y: Tensor,
    x: Tensor,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    out: Tensor,
) -> Tensor:
    """Fill ``out`` (y itself, or like it) and return S, empty where it was given."""
    T, Pc, saved = rank_factors(rows_first(x), P, E, Q, mask, alpha, S, seed, scale, dropout_p)
    if out is not y:
        out.copy_(y)
    add_out_of_rank(rows_first(out), T, Pc)  # (M, r) @ (r, N)
    return saved


def _saved_like(
    y: Tensor, x: Tensor, P: Tensor, Q: Tensor, S: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor:
    if S is not None:
        return x.new_empty((0,))
    rows = math.prod(x.shape[:-1])  # torch.Size.numel would fix symbolic sizes
    return rank_buffer(x, rows, P.shape[0], *windows(y.shape[-1], P, Q, seed, dropout_p))


def _run(y: Tensor, x: Tensor, P: Tensor, E: Tensor, Q: Tensor, *rest: Any) -> Tensor:
    operands = (y, x, P, E, Q, *rest)
    *_tensors, seed, _scale, dropout_p, _out = rest
    with as_given(x):
        if not serves(x, y.shape[-1], P, Q, seed, dropout_p):
            return _reference(*operands)
        from .fused import svd_linear as fused

        return fused.update(*operands)


@torch.library.custom_op("igulora::svd_update", mutates_args=())
def _svd_update(
    y: Tensor,
    x: Tensor,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor | None,
    S: Tensor | None,
    path_weight: Tensor | None,
    path_P: Tensor | None,
    path_E: Tensor | None,
    path_Q: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    train_groups: int,
    path_start: int,
) -> tuple[Tensor, Tensor]:
    """Returns the updated y and S; S empty where it was given."""
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    return out, _run(y.contiguous(), x, P, E, Q, mask, alpha, S, seed, scale, dropout_p, out)


def _update_in_place(
    y: Tensor,
    x: Tensor,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Updates y, which is contiguous; returns S, empty where it was given."""
    return _run(y, x, P, E, Q, mask, alpha, S, seed, scale, dropout_p, y)


_svd_update_ = torch.library.custom_op("igulora::svd_update_", mutates_args=("y",))(_update_in_place)


@_svd_update.register_fake
def _(y, x, P, E, Q, mask, alpha, S, path_weight, path_P, path_E, path_Q, seed, scale, dropout_p, *_rest):
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    return out, _saved_like(y, x, P, Q, S, seed, dropout_p)


@_svd_update_.register_fake
def _(y, x, P, E, Q, mask, alpha, S, seed, scale, dropout_p):
    return _saved_like(y, x, P, Q, S, seed, dropout_p)


def _save(ctx, inputs, saved, again=None):
    _y, x, P, E, Q, mask, alpha, S, path_weight, *accumulators, seed = inputs[:13]
    ctx.again = again
    x = None if again is not None else x
    ctx.save_for_backward(saved if S is None else S, x, P, E, Q, mask, alpha, path_weight, seed)
    ctx.accumulators = accumulators  # written to, not read
    ctx.given = S is not None
    ctx.scalars = inputs[13:17]
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, first=0):
    """Of the 17 inputs of the functional operator, the first of which is the function's input number ``first``."""
    if dy is None:
        return (None,) * 17
    wanted = ctx.needs_input_grad[first:]
    S, x, *masters, alpha, path_weight, seed = ctx.saved_tensors
    x = ctx.again() if x is None else x
    trains = ctx.scalars[2] > 0
    factors = (*(wanted[i] and trains for i in (2, 3)), wanted[4] and trains and not ctx.given)
    needs = [wanted[1], False, False, *factors, ctx.given]
    grads = gradients(dy, S, x, None, *masters, alpha, path_weight, *ctx.accumulators, seed, *ctx.scalars, needs)
    dx, _, _, dP, dE, dQ, dS = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dy, dx, dP, dE, dQ, None, None, dS, *(None,) * 9


def _setup_context(ctx, inputs, output):
    _save(ctx, inputs, output[1])
    ctx.mark_non_differentiable(output[1])


_svd_update.register_autograd(lambda ctx, dy, _dS: _gradients(ctx, dy), setup_context=_setup_context)


class _InPlace(torch.autograd.Function):
    """The update written into y's own storage."""

    @staticmethod
    def forward(ctx, again, *inputs):
        y, x, P, E, Q, mask, alpha, S, _weight, _path_P, _path_E, _path_Q, seed, scale, dropout_p = inputs[:15]
        update = past_dispatcher(x, _svd_update_, _update_in_place)
        saved = update(y, x, P, E, Q, mask, alpha, S, seed, scale, dropout_p)
        ctx.mark_dirty(y)
        _save(ctx, inputs, saved, again)
        return y

    @staticmethod
    def backward(ctx, dy):
        return None, *_gradients(ctx, dy, first=1)


def _may_be_written(y: Tensor, x: Tensor) -> bool:
    """Not x itself, and no view that was made without gradients or inside a function of Python's: autograd refuses to change those."""
    if not y.is_contiguous() or y is x:
        return False
    if not y._is_view():
        return True
    return y.grad_fn is not None and _autograd._get_creation_meta(y) == _autograd.CreationMeta.DEFAULT


def svd_update(
    y: Tensor,
    x: Tensor | None,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    S: Tensor | None = None,
    train_groups: int | None = None,
    path_start: int | None = None,
    path_weight: Tensor | None = None,
    path: Path | None = None,
    again: Again | None = None,
) -> Tensor:
    """Add the adapter's update to what a base returned for x (ALGORITHMS section 1; IGU-LoRA Eq. 2); y is overwritten where possible.

    Args:
        y: (..., out), the base's output: not a leaf that requires gradients, and not needed by the base's own backward.
        x: (..., in); converted to y's dtype. None where S is given and is no product of x with Q (``svd_embed``, ``svd_conv``): no
            gradient goes to x then. Others: as in ``svd_linear``.

    Returns:
        y plus the update: y itself in eager calls on contiguous storage, else a new tensor.

    Raises:
        TypeError, ValueError: as ``svd_linear`` does; there is neither x nor S.
    """
    if x is None:
        if S is None:
            raise ValueError("expected x or S, got neither")
        given = x = S.detach().view(*y.shape[:-1], S.shape[-1])  # for the count of its rows
        check_input(x, S.shape[-1], group_count(alpha, path_weight))
        blocks = 1
    else:
        given, x = x, x.to(y.dtype)
        blocks = check_windows(y.shape[-1], x.shape[-1], P, Q)
        check_input(x, blocks * Q.shape[-1], group_count(alpha, path_weight))
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"expected y and x of one leading shape, got {tuple(y.shape)} and {tuple(x.shape)}")
    check_masters(y.shape[-1] // blocks, Q.shape[-1], P, E, Q, mask)
    check_given(S, P, blocks)
    check_device(x, {"y": y, "P": P, "E": E, "Q": Q, "mask": mask, "alpha": alpha, "S": S})
    check_dropout(dropout_p)
    train_groups, path_start = check_rows(alpha, path_weight, train_groups, path_start, path is not None)
    accumulators = path if path is not None else (None, None, None)
    inputs = (y, x, P, E, Q, mask, alpha, S, path_weight, *accumulators, seed)
    inputs += (float(scale), float(dropout_p), train_groups, path_start)
    if torch.compiler.is_compiling() or not _may_be_written(y, x):
        return _svd_update(*inputs)[0]
    return _InPlace.apply(again_as(again, given, x) if torch.is_grad_enabled() else None, *inputs)
