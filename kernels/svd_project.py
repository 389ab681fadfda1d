"""S of all layers that read one x (q, k and v; gate and up): ``S_i = dropout(x) Q_i^T``, x read once, and once more for every dQ_i.

Contract. Dtypes, rounding and determinism as in ``svd_linear``; the layers share one dropout mask. The gradient of S_i that arrives is that
without any group's factor: the training rows' factor alpha and the path rows' weights enter here. dx gets nothing here: the share that
goes through Q_i is part of each layer's own dx, inside its base product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import as_given, past_dispatcher, runs_fused
from .checks import check_device, check_dropout, check_input, check_rows, under_autocast
from .rows import Again, again_as, empty_results, group_count, keep_factor, q_gradient, rank_buffer, rows_first


def _widest(Qs: list[Tensor]) -> int:
    return max(Q.shape[0] for Q in Qs)


def _reference_fwd(
    x: Tensor,
    Qs: list[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    alpha: Tensor | None,
    path_weight: Tensor | None,
    path_Qs: list[Tensor],
    train_groups: int,
    path_start: int,
) -> list[Tensor]:
    """Reference forward. Returns S_i (M, r_i) in x's dtype."""
    x2 = rows_first(x)
    keep = keep_factor(x2, seed, dropout_p)
    joint = (x2 if keep is None else x2 * keep) @ torch.cat(Qs).to(x.dtype).t()  # (M, K) @ (K, sum of r_i)
    # Copies: an operator may not return one storage twice, and a part of no columns, or of a single row, is contiguous as it is.
    parts = joint.split([Q.shape[0] for Q in Qs], dim=1)
    return [joint] if len(Qs) == 1 else [S.clone(memory_format=torch.contiguous_format) for S in parts]


def _fake_fwd(x, Qs, *_rest):
    rows = math.prod(x.shape[:-1])  # torch.Size.numel would fix symbolic sizes
    return [rank_buffer(x, rows, Q.shape[0]) for Q in Qs]


def _reference_bwd(
    Gs: list[Tensor],
    x: Tensor,
    Qs: list[Tensor],
    alpha: Tensor | None,
    path_weight: Tensor | None,
    path_Qs: list[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    train_groups: int,
    path_start: int,
    needed: bool,
) -> tuple[Tensor, Tensor]:
    """Reference backward: dQ_i below one another, empty unless needed; adds those of path rows to ``path_Qs``, which may be empty.

    No list, because the compiler takes no operator that changes its arguments and returns one. The second result is always empty:
    Inductor (torch 2.11 to 2.13) fails on an operator with a single result where it is given none of the arguments that it changes.
    """
    x2 = rows_first(x)
    keep = keep_factor(x2, seed, dropout_p)
    sizes = [Q.shape[0] for Q in Qs]
    joint_path = torch.zeros((sum(sizes), x2.shape[1]), dtype=Qs[0].dtype, device=x.device) if path_Qs else None
    joint = q_gradient(
        torch.cat(Gs, dim=1),
        x2 if keep is None else x2 * keep,
        alpha,
        path_weight,
        joint_path,
        train_groups,
        path_start,
        needed,
    )
    if joint_path is not None:
        torch._foreach_add_(path_Qs, joint_path.split(sizes))
    return empty_results(x, (None if joint is None else joint.to(Qs[0].dtype), None))  # type: ignore[return-value]


def _fake_bwd(Gs, x, Qs, alpha, path_weight, path_Qs, seed, dropout_p, train_groups, path_start, needed):
    joint = Qs[0].new_empty((sum(Q.shape[0] for Q in Qs), x.shape[-1])) if needed else None
    return empty_results(x, (joint, None))


def _dispatch_fwd(x, Qs, seed, dropout_p, *rest):
    with as_given(x):
        if not runs_fused(x, _widest(Qs)):
            return _reference_fwd(x, Qs, seed, dropout_p, *rest)
        from .fused import svd_linear as fused

        return fused.project(x, Qs, seed, dropout_p)


def _dispatch_bwd(Gs, x, Qs, *rest):
    with as_given(x):
        if not runs_fused(x, _widest(Qs)):
            return _reference_bwd(Gs, x, Qs, *rest)
        from .fused import svd_linear as fused

        return fused.project_backward(Gs, x, Qs, *rest), None


def _dispatch_bwd_op(Gs, x, *rest):
    """An operator returns tensors: empty ones for what the kernels leave out."""
    return empty_results(x, _dispatch_bwd(Gs, x, *rest))


_svd_project_fwd = torch.library.custom_op("igulora::svd_project_fwd", _reference_fwd, mutates_args=())
_svd_project_bwd = torch.library.custom_op("igulora::svd_project_bwd", _reference_bwd, mutates_args=("path_Qs",))
_svd_project_fwd.register_fake(_fake_fwd)
_svd_project_bwd.register_fake(_fake_bwd)
for _device in ("cuda", "cpu"):
    _svd_project_fwd.register_kernel(_device)(_dispatch_fwd)
    _svd_project_bwd.register_kernel(_device)(_dispatch_bwd_op)


def _setup_context(ctx, inputs, output, again=None):
    x, Qs, seed, ctx.dropout_p, alpha, path_weight, path_Qs, *ctx.ranges = inputs
    ctx.again = again
    ctx.save_for_backward(None if again is not None else x, seed, alpha, path_weight, *Qs)
    # Written to, not read: views of one flat buffer, whose version changes with every layer's backward.
    ctx.accumulators = path_Qs


def _gradients(ctx, Gs, wanted):
    """dQ of every layer, None where no parameter trains."""
    x, seed, alpha, path_weight, *Qs = ctx.saved_tensors
    x = ctx.again() if x is None else x
    needed = ctx.ranges[0] > 0 and wanted
    rest = (ctx.accumulators, seed, ctx.dropout_p, *ctx.ranges, needed)
    backward = past_dispatcher(x, _svd_project_bwd, _dispatch_bwd)
    joint, _ = backward(list(Gs), x, Qs, alpha, path_weight, *rest)
    return list(joint.split([Q.shape[0] for Q in Qs])) if needed else [None] * len(Qs)


def _backward(ctx, Gs):
    dQs = _gradients(ctx, Gs, any(ctx.needs_input_grad[1]))
    return None, dQs, None, None, None, None, [None] * len(ctx.accumulators), None, None


_svd_project_fwd.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator with its registered autograd formula, minus what the registration costs; the last arguments are the layers' Q."""

    @staticmethod
    def forward(ctx, again, x, seed, scalars, alpha, path_weight, path_Qs, *Qs):
        inputs = (x, list(Qs), seed, scalars[0], alpha, path_weight, path_Qs, *scalars[1:])
        output = tuple(past_dispatcher(x, _svd_project_fwd, _dispatch_fwd)(*inputs))
        _setup_context(ctx, inputs, output, again)
        return output

    @staticmethod
    def backward(ctx, *Gs):
        return (*(None,) * 7, *_gradients(ctx, Gs, any(ctx.needs_input_grad[7:])))


def svd_project(
    x: Tensor,
    Qs: list[Tensor],
    alpha: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    train_groups: int | None = None,
    path_start: int | None = None,
    path_weight: Tensor | None = None,
    path_Qs: list[Tensor] | None = None,
    again: Again | None = None,
) -> list[Tensor]:
    """``S_i = dropout(x) Q_i^T`` for every layer that reads x, to be handed to ``svd_linear(..., S=S_i)`` (ALGORITHMS section 1).

    Args:
        x: (..., in). Qs: masters (r_i, in). dropout_p, seed: as in ``svd_linear``; the layers must get the same.
        alpha, train_groups, path_start, path_weight: as in ``svd_linear``; they matter in the backward.
        path_Qs: accumulators of the path rows' dQ_i. again: as in ``svd_linear``.

    Returns:
        One S_i (M, r_i) in x's dtype for every Q.

    Raises:
        TypeError, ValueError: as ``svd_linear`` does.
    """
    if not Qs:
        raise ValueError("expected at least one Q, got none")
    given = x
    (x,) = under_autocast(x)
    check_input(x, Qs[0].shape[-1], group_count(alpha, path_weight))
    for i, Q in enumerate(Qs):
        if Q.ndim != 2 or Q.shape[1] != x.shape[-1]:
            raise ValueError(f"expected Qs of shape (r, {x.shape[-1]}), got {tuple(Q.shape)} at index {i}")
    check_device(x, {"alpha": alpha, "path_weight": path_weight, **{f"Qs[{i}]": Q for i, Q in enumerate(Qs)}})
    check_dropout(dropout_p)
    train_groups, path_start = check_rows(alpha, path_weight, train_groups, path_start, path_Qs is not None)
    scalars = (float(dropout_p), train_groups, path_start)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        rest = (alpha, path_weight, path_Qs or [], *scalars[1:])
        return _svd_project_fwd(x, Qs, seed, scalars[0], *rest)
    return list(_Eager.apply(again_as(again, given, x), x, seed, scalars, alpha, path_weight, path_Qs or [], *Qs))
