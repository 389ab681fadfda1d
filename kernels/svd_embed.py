"""S of an embedding's adapter: ``S = Q[:, ids]^T``, the columns of Q that a lookup names; what ``svd_project`` is to a dense input.

Contract. ids are integers; Q is a float32 master (float64 over float64 weights); S is rounded once to the dtype asked for. The gradient of
S that arrives is that without any group's factor: the training rows' factor alpha and the path rows' weights enter here (``rows.py``).
Gradients of one id are added up in the master's dtype, in the order of the ids: same inputs give the same bits on the same device.
The id ``padding_idx`` gets no gradient, as in ``nn.Embedding``. There is no Triton kernel: a gather and a sum over sorted ids are PyTorch's
own kernels on every device, and no product is in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_device, check_rows
from .rows import Ranges, empty_results, group_count, path_rows, training_rows


def _forward(
    ids: Tensor,
    Q: Tensor,
    alpha: Tensor | None,
    path_weight: Tensor | None,
    path_Q: Tensor | None,
    dtype: torch.dtype,
    padding_idx: int,
    train_groups: int,
    path_start: int,
) -> Tensor:
    """S (M, r)."""
    return Q.index_select(1, ids.reshape(-1)).t().to(dtype, memory_format=torch.contiguous_format, copy=True)


def _backward(
    G: Tensor,
    ids: Tensor,
    Q: Tensor,
    alpha: Tensor | None,
    path_weight: Tensor | None,
    path_Q: Tensor | None,
    padding_idx: int,
    train_groups: int,
    path_start: int,
    needed: bool,
) -> tuple[Tensor, Tensor]:
    """dQ of the training rows, empty unless needed; adds that of the path rows to ``path_Q``. The second result is always empty.

    (Inductor fails on an operator with a single result where it is given none of the arguments that it changes.)
    """
    flat = ids.reshape(-1)
    ranges = Ranges.of(flat.numel(), group_count(alpha, path_weight), train_groups, path_start)

    def summed(rows: slice, weighed: Tensor) -> Tensor:
        per_id = torch.ops.aten.embedding_dense_backward(weighed, flat[rows], Q.shape[1], padding_idx, False)
        return per_id.t()  # (r, ids)

    G = G.to(Q.dtype)
    if path_Q is not None and path_weight is not None and ranges.has_path:
        path_Q += summed(*path_rows(G, path_weight, ranges, path_start))
    dQ = summed(*training_rows(G, alpha, ranges, train_groups)).contiguous() if needed else None
    return empty_results(G, (dQ, None))  # type: ignore[return-value]


_svd_embed_fwd = torch.library.custom_op("igulora::svd_embed_fwd", _forward, mutates_args=())
_svd_embed_bwd = torch.library.custom_op("igulora::svd_embed_bwd", _backward, mutates_args=("path_Q",))


@_svd_embed_fwd.register_fake
def _(ids, Q, alpha, path_weight, path_Q, dtype, padding_idx, train_groups, path_start):
    return Q.new_empty((ids.numel(), Q.shape[0]), dtype=dtype)


@_svd_embed_bwd.register_fake
def _(G, ids, Q, alpha, path_weight, path_Q, padding_idx, train_groups, path_start, needed):
    return empty_results(Q, (torch.empty_like(Q) if needed else None, None))


def _setup_context(ctx, inputs, output):
    ids, Q, alpha, path_weight, ctx.accumulator, _dtype, *ctx.scalars = inputs
    ctx.save_for_backward(ids, Q, alpha, path_weight)  # the accumulator is written to, not read


def _gradients(ctx, G):
    ids, Q, alpha, path_weight = ctx.saved_tensors
    needed = ctx.needs_input_grad[1] and ctx.scalars[1] > 0
    dQ, _ = _svd_embed_bwd(G, ids, Q, alpha, path_weight, ctx.accumulator, *ctx.scalars, needed)
    return None, dQ if needed else None, None, None, None, None, None, None, None


_svd_embed_fwd.register_autograd(_gradients, setup_context=_setup_context)


def svd_embed(
    ids: Tensor,
    Q: Tensor,
    alpha: Tensor | None = None,
    *,
    dtype: torch.dtype,
    padding_idx: int | None = None,
    train_groups: int | None = None,
    path_start: int | None = None,
    path_weight: Tensor | None = None,
    path_Q: Tensor | None = None,
) -> Tensor:
    """``S = Q[:, ids]^T`` (M, r) in ``dtype``, to be handed to ``svd_update(..., S=S)`` (ALGORITHMS section 1, x a row of the identity).

    Args:
        ids: integers (...), each below the columns of Q. Q: master (r, ids there are).
        alpha, train_groups, path_start, path_weight: as in ``svd_linear``; they matter in the backward.
        padding_idx: the id whose column gets no gradient. path_Q: accumulator of the path rows' dQ.

    Raises:
        TypeError: ids are not integers.
        ValueError: Q is not a matrix, operands lie on several devices, or ids' first dimension is not the sequences of alpha.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"expected ids in int64 or int32, got {ids.dtype}; convert them before the call")
    if Q.ndim != 2:
        raise ValueError(f"expected Q of shape (r, number of ids), got {tuple(Q.shape)}")
    groups = group_count(alpha, path_weight)
    if groups > 1 and (ids.ndim == 0 or ids.shape[0] != groups):
        raise ValueError(
            f"expected ids of {groups} sequences in their first dimension (one alpha each), got shape {tuple(ids.shape)}; ids that all "
            "sequences share (positions) have no path of their own: leave that embedding out of target_modules"
        )
    check_device(ids, {"Q": Q, "alpha": alpha, "path_weight": path_weight, "path_Q": path_Q})
    train_groups, path_start = check_rows(alpha, path_weight, train_groups, path_start, path_Q is not None)
    padding = -1 if padding_idx is None else padding_idx
    return _svd_embed_fwd(ids, Q, alpha, path_weight, path_Q, dtype, padding, train_groups, path_start)
