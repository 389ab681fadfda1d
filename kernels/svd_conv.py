"""S of a convolution's adapter: ``S = conv2d(x, Q)``, Q's rows being r filters; what ``svd_project`` is to a dense input.

Contract. x has a floating compute dtype and Q is a float32 master (float64 over float64 weights), rounded once to x's dtype. S has one row
for every output position, images first. The gradient of S that arrives is that without any group's factor: the training rows' factor alpha
and the path rows' weights enter here (``rows.py``), and so does alpha in the gradient of x. There is no Triton kernel: the products are
PyTorch's convolutions (cuDNN, oneDNN), which also decide how deterministic they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import as_given
from .checks import check_device, check_rows
from .rows import Ranges, empty_results, flat_alpha, group_count, path_rows, times_per_group, training_rows


def _filters(Q: Tensor, x: Tensor, kernel: list[int]) -> Tensor:
    return Q.to(x.dtype).view(Q.shape[0], x.shape[1], *kernel)


def _forward(
    x: Tensor,
    Q: Tensor,
    alpha: Tensor | None,
    path_weight: Tensor | None,
    path_Q: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    train_groups: int,
    path_start: int,
) -> Tensor:
    """S (images, height, width, r) of the output."""
    with as_given(x):
        if not Q.shape[0]:
            return x.new_empty((*_positions(x, kernel, stride, padding, dilation), 0))
        S = torch.nn.functional.conv2d(x, _filters(Q, x, kernel), None, stride, padding, dilation)
        return S.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


def _positions(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, ...]:
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(len(kernel))
    ]
    return (x.shape[0], *sizes)


def _backward(
    G: Tensor,
    x: Tensor,
    Q: Tensor,
    alpha: Tensor | None,
    path_weight: Tensor | None,
    path_Q: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    train_groups: int,
    path_start: int,
    need_x: bool,
    need_q: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (all rows) and Q (training rows), empty unless needed; adds that of path rows to ``path_Q``."""
    if not Q.shape[0]:
        dx, dQ = torch.zeros_like(x) if need_x else None, torch.zeros_like(Q) if need_q else None
        return empty_results(x, (dx, dQ))  # type: ignore[return-value]
    filters = _filters(Q, x, kernel)
    images = G.flatten(1)
    ranges = Ranges.of(x.shape[0], group_count(alpha, path_weight), train_groups, path_start)

    def convolved(rows: slice, weighed: Tensor, of_x: bool) -> Tensor:
        arrived = weighed.view(-1, *G.shape[1:]).permute(0, 3, 1, 2)
        dx, dQ, _ = torch.ops.aten.convolution_backward(
            arrived, x[rows], filters, None, stride, padding, dilation, False, [0, 0], 1, [of_x, not of_x, False]
        )
        return dx if of_x else dQ.reshape(Q.shape)

    dx = dQ = None
    with as_given(x):
        if path_Q is not None and path_weight is not None and ranges.has_path:
            path_Q += convolved(*path_rows(images, path_weight, ranges, path_start), of_x=False)
        if need_q:
            dQ = convolved(*training_rows(images, alpha, ranges, train_groups), of_x=False).to(Q.dtype)
        if need_x:
            dx = convolved(slice(None), times_per_group(images, flat_alpha(alpha)), of_x=True)
    return empty_results(x, (dx, dQ))  # type: ignore[return-value]


_svd_conv_fwd = torch.library.custom_op("igulora::svd_conv_fwd", _forward, mutates_args=())
_svd_conv_bwd = torch.library.custom_op("igulora::svd_conv_bwd", _backward, mutates_args=("path_Q",))


@_svd_conv_fwd.register_fake
def _(x, Q, alpha, path_weight, path_Q, kernel, stride, padding, dilation, train_groups, path_start):
    return x.new_empty((*_positions(x, kernel, stride, padding, dilation), Q.shape[0]))


@_svd_conv_bwd.register_fake
def _(G, x, Q, alpha, path_weight, path_Q, kernel, stride, padding, dilation, train_groups, path_start, need_x, need_q):
    return empty_results(x, (torch.empty_like(x) if need_x else None, torch.empty_like(Q) if need_q else None))


def _setup_context(ctx, inputs, output):
    x, Q, alpha, path_weight, ctx.accumulator, *ctx.scalars = inputs
    ctx.save_for_backward(x, Q, alpha, path_weight)  # the accumulator is written to, not read


def _gradients(ctx, G):
    x, Q, alpha, path_weight = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1] and ctx.scalars[4] > 0)
    grads = _svd_conv_bwd(G.contiguous(), x, Q, alpha, path_weight, ctx.accumulator, *ctx.scalars, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 9


_svd_conv_fwd.register_autograd(_gradients, setup_context=_setup_context)


def svd_conv(
    x: Tensor,
    Q: Tensor,
    alpha: Tensor | None = None,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    train_groups: int | None = None,
    path_start: int | None = None,
    path_weight: Tensor | None = None,
    path_Q: Tensor | None = None,
) -> Tensor:
    """``S = conv2d(x, Q)`` as (images, height, width, r), to be handed to ``svd_update(..., S=S)`` (ALGORITHMS section 1, x in patches).

    Args:
        x: (images, channels, height, width). Q: master (r, channels * kernel height * kernel width). stride, padding, dilation: as in
            ``torch.nn.functional.conv2d``.
        alpha, train_groups, path_start, path_weight: as in ``svd_linear``, the images being the sequences. path_Q: accumulator of the
            path rows' dQ.

    Raises:
        ValueError: shapes do not fit, operands lie on several devices, or x's first dimension is not the sequences of alpha.
    """
    if x.ndim != 4:
        raise ValueError(f"expected x of shape (images, channels, height, width), got {tuple(x.shape)}")
    size = x.shape[1] * kernel[0] * kernel[1]
    if Q.ndim != 2 or Q.shape[1] != size:
        raise ValueError(
            f"expected Q of shape (r, {size}) for {x.shape[1]} channels and {kernel}, got {tuple(Q.shape)}"
        )
    groups = group_count(alpha, path_weight)
    if groups > 1 and x.shape[0] != groups:
        raise ValueError(
            f"expected x to hold {groups} images in its first dimension (one alpha each), got shape {tuple(x.shape)}"
        )
    check_device(x, {"Q": Q, "alpha": alpha, "path_weight": path_weight, "path_Q": path_Q})
    train_groups, path_start = check_rows(alpha, path_weight, train_groups, path_start, path_Q is not None)
    shape = [list(pair) for pair in (kernel, stride, padding, dilation)]
    return _svd_conv_fwd(x, Q, alpha, path_weight, path_Q, *shape, train_groups, path_start)
