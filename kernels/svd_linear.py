"""Adapted linear layer ``y = x W0^T + b + alpha * s * ((x Q^T) * (m * lambda)) P`` and its hand-derived backward.

Contract. x, weight, bias, y share one compute dtype (float64/float32/bfloat16/float16); P, E (lambda), Q, mask, alpha and path
weights are float32 masters (float64 when x is). Products accumulate in float32. S = dropout(x) Q^T is rounded once to the compute
dtype and saved for the backward. The reference rounds the rank term plus bias to the compute dtype and lets the base product accumulate
onto it, so that only one rounding happens at the size of y.
Gradients of masters come back in the masters' dtype. Fixed-order sums, no atomics: same inputs and seed give the same bits.
Error bound: against float64 at most twice the error of the same products written in PyTorch in the same dtype.

Rows of a mixed batch. The M rows of x form n = alpha.numel() equal consecutive groups (sequences), each with its own alpha. The first
``train_groups`` groups are training rows: their adapter gradients (with the factor alpha of the chain rule) go to P, E, Q. The groups
from ``path_start`` on are path rows: their adapter gradients are those of ALGORITHMS section 1 (no factor alpha), times the group's
``path_weight``, and go to ``path_P, path_E, path_Q``: leaves that alias P, E, Q and whose ``.grad`` is the path accumulator. The two
ranges meet in a mixed batch, are one of them empty in a separate path pass, and overlap where a training row is itself a sample of
the path (on-path training, and the endpoint f(1) of the trapezoid).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import dropout_keep_mask

_N_INPUTS = 17


def _rows_first(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _keep_factor(x2: Tensor, seed: Tensor | None, p: float) -> Tensor | None:
    """0 where dropout drops and 1/(1-p) elsewhere, in x's dtype and shape; None without dropout."""
    if p == 0.0 or seed is None:
        return None
    return dropout_keep_mask(seed, x2.shape[0], x2.shape[1], p).to(x2.dtype).mul_(1.0 / (1.0 - p))


def _grouped(rows: Tensor, coef: Tensor) -> Tensor:
    """Multiply (M, r) rows by a coefficient per group: ``coef`` (n, r) over n equal groups of rows; returns coef's dtype."""
    n, r = coef.shape
    if n == 0:
        return coef.new_empty((0, r))
    return (rows.reshape(n, rows.shape[0] // n, r) * coef.unsqueeze(1)).reshape(rows.shape[0], r)


@torch.library.custom_op("igulora::svd_linear_fwd", mutates_args=())
def _svd_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor,
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
    """Reference forward. Returns y ``x.shape[:-1] + (out,)`` and S ``(M, r)``, both in x's dtype."""
    x2 = _rows_first(x)
    keep = _keep_factor(x2, seed, dropout_p)
    S = (x2 if keep is None else x2 * keep) @ Q.to(x.dtype).t()  # (M, K) @ (K, r)
    coef = alpha.reshape(-1, 1) * (scale * mask * E)  # (n, r)
    T = _grouped(S, coef).to(x.dtype)
    y = T @ P.to(x.dtype) if bias is None else torch.addmm(bias, T, P.to(x.dtype))  # (M, r) @ (r, N)
    y.addmm_(x2, weight.t())  # the base product accumulates onto the small term: one rounding at the size of y
    return y.view((*x.shape[:-1], weight.shape[0])), S


@_svd_linear_fwd.register_fake
def _(
    x,
    weight,
    bias,
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
):
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((rows, Q.shape[0]))


@torch.library.custom_op("igulora::svd_linear_bwd", mutates_args=())
def _svd_linear_bwd(
    dy: Tensor,
    S: Tensor,
    x: Tensor,
    weight: Tensor,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor,
    path_weight: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    train_groups: int,
    path_start: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reference backward: gradients of (x, weight, bias, P, E, Q, path_P, path_E, path_Q), empty where ``needs`` is False."""
    dt = x.dtype
    dy2, x2 = _rows_first(dy), _rows_first(x)
    need_x, need_w, need_b, need_p, need_e, need_q, need_tp, need_te, need_tq = needs
    M, n, r = x2.shape[0], alpha.numel(), P.shape[0]
    per_group = M // n if n else 0
    train = slice(0, per_group * train_groups)
    path = slice(per_group * path_start, M)
    c = scale * mask * E  # (r,)
    # The factor of a row's parameter gradients: alpha for training rows, the path weight (and no alpha) for path rows.
    train_factor = alpha.reshape(-1, 1)[:train_groups]
    path_factor = alpha.new_empty((0, 1)) if path_weight is None else path_weight.reshape(-1, 1)[path_start:]
    need_rank = any(needs[3:]) or need_x
    dyP = dy2 @ P.to(dt).t() if need_rank else dy2.new_empty((M, r))  # (M, N) @ (N, r)
    keep = _keep_factor(x2, seed, dropout_p) if need_x or need_q or need_tq else None
    empty = x.new_empty((0,))
    dx = dW = db = dP = dE = dQ = tP = tE = tQ = empty

    # dL/dS of every row; a training row's share of dQ is made of the same numbers.
    dS = _grouped(dyP, alpha.reshape(-1, 1) * c).to(dt) if need_x or need_q else dyP
    if need_x:
        dx = dS @ Q.to(dt)  # (M, r) @ (r, K)
        if keep is not None:
            dx *= keep
        dx.addmm_(dy2, weight)  # (M, N) @ (N, K)
        dx = dx.view(x.shape)
    if need_w:
        dW = dy2.t() @ x2
    if need_b:
        db = dy2.sum(0)
    if need_p:
        dP = (_grouped(S[train], train_factor * c).to(dt).t() @ dy2[train]).to(P.dtype)  # (r, M) @ (M, N)
    if need_tp:
        tP = (_grouped(S[path], path_factor * c).to(dt).t() @ dy2[path]).to(P.dtype)
    if need_e or need_te:
        # Summed over the rows of a group before the group's factor: (n, r) numbers are left to weigh.
        per_group_sum = (S.to(E.dtype) * dyP).reshape(n, per_group, r).sum(1)
        if need_e:
            dE = (per_group_sum[:train_groups] * train_factor).sum(0) * (scale * mask)
        if need_te:
            tE = (per_group_sum[path_start:] * path_factor).sum(0) * (scale * mask)
    if need_q or need_tq:
        xd = x2 if keep is None else x2 * keep
        if need_q:
            dQ = (dS[train].t() @ xd[train]).to(Q.dtype)  # (r, M) @ (M, K)
        if need_tq:
            tQ = (_grouped(dyP[path], path_factor * c).to(dt).t() @ xd[path]).to(Q.dtype)
    # Unneeded results share one empty tensor inside; an operator must not return the same storage twice.
    return tuple(t if t is not empty else x.new_empty((0,)) for t in (dx, dW, db, dP, dE, dQ, tP, tE, tQ))  # type: ignore[return-value]


@_svd_linear_bwd.register_fake
def _(dy, S, x, weight, P, E, Q, mask, alpha, path_weight, seed, scale, dropout_p, train_groups, path_start, needs):
    shapes = (x, weight, weight[:, 0], P, E, Q, P, E, Q)
    return tuple(
        like.new_empty(like.shape) if need else x.new_empty((0,)) for like, need in zip(shapes, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, weight, _bias, P, E, Q, mask, alpha, path_weight, *_leaves, seed = inputs[:13]
    ctx.save_for_backward(output[1], x, weight, P, E, Q, mask, alpha, path_weight, seed)
    ctx.scalars = inputs[13:]  # scale, dropout_p, train_groups, path_start
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _dS):
    if dy is None:
        return (None,) * _N_INPUTS
    wanted = ctx.needs_input_grad
    needs = [wanted[i] for i in (0, 1, 2, 3, 4, 5, 9, 10, 11)]
    grads = _svd_linear_bwd(dy, *ctx.saved_tensors, *ctx.scalars, needs)
    dx, dW, db, dP, dE, dQ, tP, tE, tQ = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, dW, db, dP, dE, dQ, None, None, None, tP, tE, tQ, None, None, None, None, None


_svd_linear_fwd.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator with its registered autograd formula, minus what the registration costs per eager call (a third of its host time)."""

    @staticmethod
    def forward(*args):
        return _svd_linear_fwd(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, P: Tensor, E: Tensor, Q: Tensor, mask: Tensor, alpha: Tensor
) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"expected x in float64, float32, bfloat16 or float16, got {x.dtype}; convert it before the call"
        )
    if x.dtype != weight.dtype:
        raise TypeError(
            f"expected x and weight in one dtype, got x {x.dtype} and weight {weight.dtype}; convert one or use autocast"
        )
    r = P.shape[0]
    wanted = {"P": (r, weight.shape[0]), "E": (r,), "Q": (r, weight.shape[1]), "mask": (r,)}
    for name, tensor in (("P", P), ("E", E), ("Q", Q), ("mask", mask)):
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(
                f"expected {name} of shape {wanted[name]} for a weight of shape {tuple(weight.shape)} and rank {r}, "
                f"got {tuple(tensor.shape)}"
            )
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"expected x with {weight.shape[1]} features in its last dimension, got {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"expected bias of shape {(weight.shape[0],)}, got {tuple(bias.shape)}")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"expected x and bias in one dtype, got x {x.dtype} and bias {bias.dtype}; convert one")
    n = alpha.numel()
    if n == 0:
        raise ValueError("expected alpha to hold at least one value, got none")
    if n > 1 and (x.ndim < 2 or (x.shape[0] != n and (x.ndim > 2 or x.shape[0] % n))):
        raise ValueError(
            f"expected x to hold {n} sequences in its first dimension (one alpha each), got shape {tuple(x.shape)}; "
            'a model that reorders its batch needs separate path passes: path_pass="separate"'
        )
    for name, tensor in (("weight", weight), ("P", P), ("E", E), ("Q", Q), ("mask", mask), ("alpha", alpha)):
        if tensor.device != x.device:
            raise ValueError(
                f"expected every operand on {x.device} like x, got {name} on {tensor.device}; move the model as a whole"
            )


def svd_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    train_groups: int | None = None,
    path_start: int | None = None,
    path_weight: Tensor | None = None,
    path: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """``y = x W0^T + b + alpha * scale * ((dropout(x) Q^T) * (mask * E)) P`` (ALGORITHMS section 1; IGU-LoRA Eq. 2).

    Args:
        x: (..., in), any leading shape; compute dtype float64, float32, bfloat16 or float16.
        weight, bias: (out, in) and (out,) or None, in x's dtype.
        P, E, Q, mask: (r, out), (r,), (r, in), (r,) masters, r >= 0.
        alpha: () or (n,): position on the path of all rows, or of each of n sequences (x's first dimension, or n equal groups of
            the rows of a 2-D x).
        scale: ``lora_alpha / r_init``.
        dropout_p, seed: probability of dropping an entry of x before Q, and the int64 seed its mask is drawn from; no seed, no dropout.
        train_groups: how many leading groups are training rows; all by default.
        path_start: first group of path rows; ``train_groups`` by default.
        path_weight, path: (n,) weights and the (P, E, Q) leaves that receive the gradients of path rows; needed when there are any.

    Returns:
        y: (..., out) in x's dtype.

    Raises:
        TypeError: x, weight and bias differ in dtype, or the dtype is not supported.
        ValueError: shapes do not fit, a number is out of range, operands lie on several devices, or x's first dimension is not the
            sequences of alpha.
    """
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, bias, P, E, Q, mask, alpha)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"expected 0 <= dropout_p < 1, got {dropout_p}")
    n = alpha.numel()
    train_groups = n if train_groups is None else train_groups
    if not 0 <= train_groups <= n:
        raise ValueError(f"expected 0 <= train_groups <= {n} (the number of alphas), got {train_groups}")
    path_start = train_groups if path_start is None else path_start
    if not 0 <= path_start <= n:
        raise ValueError(f"expected 0 <= path_start <= {n} (the number of alphas), got {path_start}")
    if path_start < n and (path is None or path_weight is None or path_weight.numel() != n):
        raise ValueError(
            f"expected path leaves and {n} path weights for path rows (path_start < number of alphas), got none"
        )
    path_P, path_E, path_Q = path if path is not None else (None, None, None)
    tensors = (x, weight, bias, P, E, Q, mask, alpha, path_weight, path_P, path_E, path_Q, seed)
    run = _svd_linear_fwd if torch.compiler.is_compiling() or not torch.is_grad_enabled() else _Eager.apply
    return run(*tensors, float(scale), float(dropout_p), train_groups, path_start)[0]
