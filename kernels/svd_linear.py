"""Adapted linear layer ``y = x W0^T + b + alpha * s * ((x Q^T) * (m * lambda)) P`` and its hand-derived backward.

Contract. x, weight, bias, y share one compute dtype (float64/float32/bfloat16/float16); P, E (lambda), Q, mask, alpha and path
weights are float32 masters (float64 when x is). Products accumulate in float32. S = dropout(x) Q^T is rounded once to the compute
dtype and saved for the backward. The reference rounds the rank term plus bias to the compute dtype and lets the base product accumulate
onto it, so that only one rounding happens at the size of y.
Gradients of masters come back in the masters' dtype; those of path rows are added to the path accumulators (see ``rows.py`` for which rows
are which). Fixed-order sums, no atomics: same inputs and seed give the same bits.
Error bound: against float64 at most twice the error of the same products written in PyTorch in the same dtype.

Where layers read one x, S comes from ``svd_project`` for all of them: then the backward returns the gradient of S, without any group's
factor, and leaves dQ to that operator; the share of dx that goes through Q stays here, inside the base product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import as_given, past_dispatcher
from .checks import (
    Path,
    check_device,
    check_dropout,
    check_given,
    check_input,
    check_masters,
    check_rows,
    check_same_dtype,
    check_windows,
    under_autocast,
)
from .rows import (
    Again,
    Ranges,
    again_as,
    by_group,
    empty_results,
    flat_alpha,
    group_count,
    keep_factor,
    q_gradient,
    rank_buffer,
    rank_factors,
    rows_first,
    serves,
    times_per_group,
    windows,
)
from .windows import into_rank, out_of_rank, over_rows, per_triplet

_N_INPUTS = 18


def _reference_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """Reference forward. Returns y ``x.shape[:-1] + (out,)`` and S, both in x's dtype; S empty where it was given."""
    x2 = rows_first(x)
    T, Pc, saved = rank_factors(x2, P, E, Q, mask, alpha, S, seed, scale, dropout_p)
    y = out_of_rank(T, Pc, bias)  # (M, r) @ (r, N)
    y.addmm_(x2, weight.t())  # the base product accumulates onto the small term: one rounding at the size of y
    return y.view((*x.shape[:-1], weight.shape[0])), saved


def _fake_fwd(
    x,
    weight,
    bias,
    P,
    E,
    Q,
    mask,
    alpha,
    S,
    path_weight,
    path_P,
    path_E,
    path_Q,
    seed,
    scale,
    dropout_p,
    train_groups,
    path_start,
):
    rows = math.prod(x.shape[:-1])  # torch.Size.numel would fix symbolic sizes
    blocks = windows(weight.shape[0], P, Q, seed, dropout_p)
    saved = rank_buffer(x, rows, Q.shape[0], *blocks) if S is None else x.new_empty((0,))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), saved


def _reference_bwd(
    dy: Tensor,
    S: Tensor,
    x: Tensor,
    weight: Tensor | None,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor | None,
    path_weight: Tensor | None,
    path_P: Tensor | None,
    path_E: Tensor | None,
    path_Q: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    train_groups: int,
    path_start: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reference backward: gradients of (x, weight, bias, P, E, Q, S), empty where ``needs`` is False.

    ``needs[6]``: S was given, and its gradient without any group's factor is wanted instead of dQ. Without a weight, dx is the share that
    goes through Q alone (the rank-r update of a base that runs its own backward). Path rows are added to the accumulators that are given.
    """
    dt = x.dtype
    dy2, x2 = rows_first(dy), rows_first(x)
    need_x, need_w, need_b, need_p, need_e, need_q, need_s = needs
    groups = group_count(alpha, path_weight)
    rows = Ranges.of(x2.shape[0], groups, train_groups, path_start)
    train, path = slice(0, rows.train), slice(rows.path, None)
    factor = flat_alpha(alpha)
    at_path = None if path_weight is None else path_weight.reshape(-1)[path_start:]
    sampled = rows.has_path and path_P is not None
    c = scale * mask * E  # (r,)
    dx = dW = db = dP = dE = dQ = G = None
    dyP = dy2.new_empty((x2.shape[0], 0))
    if need_x or need_e or need_q or need_s or sampled:
        dyP = into_rank(dy2, P.to(dt))  # (M, N) @ (N, r)
        G = (dyP * per_triplet(c, dyP)).to(dt)
    keep = None
    if G is not None and (need_x or (not need_s and (need_q or sampled))):
        keep = keep_factor(x2, seed, dropout_p)
    if need_x and G is not None:
        dx = out_of_rank(times_per_group(G, factor), Q.to(dt))  # (M, r) @ (r, K)
        if keep is not None:
            dx *= keep
        if weight is not None:
            dx.addmm_(dy2, weight)  # (M, N) @ (N, K)
        dx = dx.view(x.shape)
    if need_w:
        dW = dy2.t() @ x2
    if need_b:
        db = dy2.sum(0)
    if need_p:
        rows_of = times_per_group(S[..., train, :], None if factor is None else factor[:train_groups])
        dP = over_rows(rows_of, dy2[train]) * c.unsqueeze(1)  # (r, M) @ (M, N)
    sums = c  # summed over the rows of a group before the group's factor: (n, r) numbers are left to weigh
    if need_e or sampled:
        sums = by_group(S.to(E.dtype) * dyP, groups).sum(-2)
        sums = sums if sums.ndim == 2 else sums.transpose(0, 1).flatten(1)
    if sampled and path_P is not None and path_E is not None and at_path is not None:
        path_P += over_rows(times_per_group(S[..., path, :], at_path), dy2[path]) * c.unsqueeze(1)
        path_E += (sums[path_start:] * at_path[:, None]).sum(0) * (scale * mask)
    if need_e:
        weighed = sums[:train_groups] if factor is None else sums[:train_groups] * factor[:train_groups, None]
        dE = weighed.sum(0) * (scale * mask)
    if G is not None and not need_s and (need_q or sampled):
        dropped = x2 if keep is None else x2 * keep
        dQ = q_gradient(G, dropped, alpha, path_weight, path_Q, train_groups, path_start, need_q)
        dQ = None if dQ is None else dQ.to(Q.dtype)
    return empty_results(x, (dx, dW, db, dP, dE, dQ, G if need_s else None))  # type: ignore[return-value]


def _fake_bwd(
    dy,
    S,
    x,
    weight,
    P,
    E,
    Q,
    mask,
    alpha,
    path_weight,
    path_P,
    path_E,
    path_Q,
    seed,
    scale,
    dropout_p,
    train_groups,
    path_start,
    needs,
):
    shapes = (x.shape, None if weight is None else weight.shape, dy.shape[-1:], P.shape, E.shape, Q.shape)
    likes = (x, x, x, P, E, Q)
    grads = [
        like.new_empty(shape) if need else x.new_empty((0,))
        for like, shape, need in zip(likes, shapes, needs[:6], strict=True)
    ]
    return (*grads, rank_buffer(x, S.shape[0], S.shape[1]) if needs[6] else x.new_empty((0,)))


def _dispatch_fwd(x, weight, bias, P, E, Q, mask, alpha, S, *rest):
    operands = (x, weight, bias, P, E, Q, mask, alpha, S)
    with as_given(x):
        *_path, seed, scale, dropout_p, _train_groups, _path_start = rest  # path rows differ in the backward alone
        if not serves(x, weight.shape[0], P, Q, seed, dropout_p):
            return _reference_fwd(*operands, *rest)
        from .fused import svd_linear as fused  # Triton takes half a second to import, and is absent on some platforms

        return fused.forward(*operands, seed, scale, dropout_p)


def _dispatch_bwd(dy, S, x, weight, P, E, Q, *rest):
    operands = (dy, S, x, weight, P, E, Q)
    with as_given(x):
        *_tensors, seed, _scale, dropout_p, _train_groups, _path_start, _needs = rest
        if not serves(x, dy.shape[-1], P, Q, seed, dropout_p):
            return _reference_bwd(*operands, *rest)
        from .fused import svd_linear as fused

        return fused.backward(*operands, *rest)


def _dispatch_bwd_op(dy, S, x, *rest):
    """An operator returns tensors: empty ones for what the kernels leave out."""
    return empty_results(x, _dispatch_bwd(dy, S, x, *rest))


_svd_linear_fwd = torch.library.custom_op("igulora::svd_linear_fwd", _reference_fwd, mutates_args=())
_svd_linear_bwd = torch.library.custom_op(
    "igulora::svd_linear_bwd", _reference_bwd, mutates_args=("path_P", "path_E", "path_Q")
)
_svd_linear_fwd.register_fake(_fake_fwd)
_svd_linear_bwd.register_fake(_fake_bwd)
for _device in ("cuda", "cpu"):
    _svd_linear_fwd.register_kernel(_device)(_dispatch_fwd)
    _svd_linear_bwd.register_kernel(_device)(_dispatch_bwd_op)


def gradients(dy, *rest):
    """The backward operator, as its caller can have it fastest."""
    return past_dispatcher(dy, _svd_linear_bwd, _dispatch_bwd)(dy, *rest)


def _setup_context(ctx, inputs, output, again=None):
    x, weight, _bias, P, E, Q, mask, alpha, S, path_weight, *accumulators, seed = inputs[:14]
    ctx.again = again
    x = None if again is not None else x
    ctx.save_for_backward(output[1] if S is None else S, x, weight, P, E, Q, mask, alpha, path_weight, seed)
    # Written to, not read: views of one flat buffer, whose version changes with every layer's backward.
    ctx.accumulators = accumulators
    ctx.given = S is not None
    ctx.scalars = inputs[14:]  # scale, dropout_p, train_groups, path_start
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _dS, first=0):
    """Gradients of the operator's inputs, the first of which is the function's input number ``first``."""
    if dy is None:
        return (None,) * _N_INPUTS
    wanted = ctx.needs_input_grad[first:]
    S, x, *saved, seed = ctx.saved_tensors
    x = ctx.again() if x is None else x
    trains = ctx.scalars[2] > 0
    needs = [*wanted[:3], *(wanted[i] and trains for i in (3, 4)), wanted[5] and trains and not ctx.given, ctx.given]
    grads = gradients(dy, S, x, *saved, *ctx.accumulators, seed, *ctx.scalars, needs)
    dx, dW, db, dP, dE, dQ, dS = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, dW, db, dP, dE, dQ, None, None, dS, None, None, None, None, None, None, None, None, None


_svd_linear_fwd.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator with its registered autograd formula, minus what the registration costs per eager call."""

    @staticmethod
    def forward(ctx, again, *inputs):
        output = past_dispatcher(inputs[0], _svd_linear_fwd, _dispatch_fwd)(*inputs)
        _setup_context(ctx, inputs, output, again)
        return output

    @staticmethod
    def backward(ctx, dy, dS):
        return None, *_backward(ctx, dy, dS, first=1)


def svd_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """``y = x W0^T + b + alpha * scale * ((dropout(x) Q^T) * (mask * E)) P`` (ALGORITHMS section 1; IGU-LoRA Eq. 2).

    Args:
        x: (..., in), any leading shape; compute dtype float64, float32, bfloat16 or float16.
        weight, bias: (out, in) and (out,) or None, in x's dtype.
        P, E, Q, mask: (r, out), (r,), (r, in), (r,) masters, r >= 0. Or (r, out / n) and (r, in / n) of a block-diagonal adapter: the
            triplets of one of n blocks after another over their windows of y and x (RaLoRA; ALGORITHMS 5).
        alpha: () or (n,): position on the path of all rows, or of each of n sequences (x's first dimension, or n equal groups of
            the rows of a 2-D x). 1 by default.
        scale: ``lora_alpha / r_init``.
        dropout_p, seed: probability of dropping an entry of x before Q, and the int64 seed its mask is drawn from; no seed, no dropout.
        S: (M, r) of this layer from ``svd_project``, drawn with the same seed, of one block; computed here by default.
        train_groups: how many leading groups are training rows; all by default. With none, no parameter gets a gradient.
        path_start: first group of path rows; ``train_groups`` by default.
        path_weight, path: (n,) weights, and the (P, E, Q) accumulators, shaped like the masters, to which the backward adds the
            gradients of path rows; needed when there are any.
        again: makes x anew, bit by bit, when the backward needs it; eager calls then do not keep x.

    Returns:
        y: (..., out) in x's dtype.

    Raises:
        TypeError: x, weight and bias differ in dtype, or the dtype is not supported.
        ValueError: shapes do not fit, a number is out of range, operands lie on several devices, or x's first dimension is not the
            sequences of alpha.
    """
    given = x
    x, weight, bias = under_autocast(x, weight, bias)
    check_input(x, weight.shape[1], group_count(alpha, path_weight))
    check_same_dtype(x, {"weight": weight, "bias": bias})
    blocks = check_windows(weight.shape[0], weight.shape[1], P, Q)
    check_masters(weight.shape[0] // blocks, weight.shape[1] // blocks, P, E, Q, mask)
    check_given(S, P, blocks)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"expected bias of shape {(weight.shape[0],)}, got {tuple(bias.shape)}")
    check_device(x, {"weight": weight, "P": P, "E": E, "Q": Q, "mask": mask, "alpha": alpha, "S": S})
    check_dropout(dropout_p)
    train_groups, path_start = check_rows(alpha, path_weight, train_groups, path_start, path is not None)
    path_P, path_E, path_Q = path if path is not None else (None, None, None)
    tensors = (x, weight, bias, P, E, Q, mask, alpha, S, path_weight, path_P, path_E, path_Q, seed)
    inputs = (*tensors, float(scale), float(dropout_p), train_groups, path_start)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _svd_linear_fwd(*inputs)[0]
    return _Eager.apply(again_as(again, given, x), *inputs)[0]
