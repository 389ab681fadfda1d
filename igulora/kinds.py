"""The triplets of a kind of layer, apart from it: LinearAdapter, EmbeddingAdapter, Conv2dAdapter. Who holds them keeps the base layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad

from .adapter import SVDAdapter
from .bases import Base, Conv2dBase, EmbeddingBase
from .kernels import svd_conv, svd_embed, svd_linear, svd_update
from .shared import Taken


class LayerAdapter(SVDAdapter):
    """What is known of the layer below, and how its update is added to what that layer returned.

    Args:
        found: the layer, described.
        r: number of stored triplets, from 0 up.
        options: ``lora_alpha``, ``dropout``, ``init``, ``init_lambda`` and ``generator`` of :class:`SVDAdapter`.

    Raises:
        ValueError: the layer cannot be adapted (says why), or an argument is out of range.
    """

    def __init__(self, found: Base, r: int, **options: Any) -> None:
        obstacle = found.obstacle()
        if obstacle is not None:
            raise ValueError(f"expected a layer that can be adapted, got {found.kind} of which {obstacle}")
        super().__init__(
            found.in_features, found.out_features, r, device=found.device, dtype=found.master_dtype, **options
        )

    def keep_padding(self) -> None:
        """To be called when rows of Q were drawn anew: an embedding's padding id has a column that stays zero."""

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The update of ``x`` added to ``y``, the layer's output for it, which may be overwritten.

        Inside a path pass alpha and the rows' destinations come from the shared context.
        """
        raise NotImplementedError


class LinearAdapter(LayerAdapter):
    """The triplets of a linear layer: of any module that maps (..., in) to (..., out) by a product with its weight."""

    reads_features = True

    def call(self, base: nn.Module, x: Tensor, fused: bool, run: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """``base(x)`` plus the update; in one operator call where ``fused``, that is where the base is a plain product (:class:`Base`).

        Inside a path pass alpha and the rows' destinations come from the shared context.

        Args:
            run: what to call for ``base(x)``; the base itself by default.
        """
        run = base if run is None else run
        if self.merged or not self.context.enabled:
            return run(x)
        if not fused:
            return self.add_to(run(x), x)
        x, options = self._operands(x)
        alpha = self.context.alpha
        return svd_linear(x, base.weight, base.bias, *self.factors(), self.mask, alpha, **options)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The update of ``x`` added to ``y``, a base's output for it, which may be overwritten."""
        x, options = self._operands(x)
        return svd_update(y, x, *self.factors(), self.mask, self.context.alpha, **options)

    def _operands(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        self.check_stepped()
        taken = Taken(x) if self.shared is None else self.shared.take(self, x)
        recipe = taken.recipe
        if taken.S is None and self.recompute is not None:
            recipe = self.recompute.of(x)
        options = self.rows()
        options["dropout_p"] = self.dropout
        options["seed"] = self.dropout_seed(x) if taken.S is None else taken.seed
        options["S"] = taken.S
        options["again"] = None if recipe is None else recipe.hold()
        return taken.x, options


class _GivenS(LayerAdapter):
    """An adapter whose S is no product with an input (..., in): an operator of its own makes it."""

    def _parts(self) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any], dict[str, Any]]:
        """P, lambda and Q; what the operator that makes S is told of the pass under way; and what the one that adds the update is."""
        self.check_stepped()
        P, E, Q = self.factors()
        update = self.rows()
        rows = {key: update[key] for key in ("train_groups", "path_start", "path_weight")}
        rows["path_Q"] = None if update["path"] is None else update["path"][2]
        return (P, E, Q), rows, update


class EmbeddingAdapter(_GivenS):
    """The triplets of an ``nn.Embedding``; the column of Q of a ``padding_idx`` stays zero."""

    def __init__(self, found: EmbeddingBase, r: int, **options: Any) -> None:
        super().__init__(found, r, **options)
        module = found.module
        self.factor = found.factor
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.padding_idx = module.padding_idx
        self.keep_padding()

    def reset_parameters(self, *args: Any, **kwargs: Any) -> None:
        """As :meth:`SVDAdapter.reset_parameters`, the padding id's column at zero."""
        super().reset_parameters(*args, **kwargs)
        self.keep_padding()

    @torch.no_grad()
    def keep_padding(self) -> None:
        """The padding id's column of Q is zero."""
        padding_idx = getattr(self, "padding_idx", None)  # not known yet at the first start
        if padding_idx is not None:
            self.lora_Q[:, padding_idx] = 0

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The update of the ids ``x`` (...) added to their rows ``y`` (..., dimension), which are overwritten."""
        (P, E, Q), rows, update = self._parts()
        update["scale"] *= self.factor
        S = svd_embed(x, Q, self.context.alpha, dtype=y.dtype, padding_idx=self.padding_idx, **rows)
        return svd_update(y, None, P, E, Q, self.mask, self.context.alpha, S=S, **update)


class Conv2dAdapter(_GivenS):
    """The triplets of an ``nn.Conv2d``: r filters, then a 1x1 convolution."""

    def __init__(self, found: Conv2dBase, r: int, **options: Any) -> None:
        super().__init__(found, r, **options)
        module = found.module
        self.in_channels, self.out_channels, self.groups = module.in_channels, module.out_channels, module.groups
        self.kernel_size, self.stride, self.padding = module.kernel_size, module.stride, module.padding
        self.dilation, self.padding_mode = module.dilation, module.padding_mode
        self._zeros, self._border = _padding(module)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The update of ``x`` (images, in channels, height, width) added to ``y``, or both without images."""
        (P, E, Q), rows, update = self._parts()
        alpha = self.context.alpha
        dropped = dropout(x.to(y.dtype), self.dropout, self.training)
        if self._border:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            dropped = pad(dropped, self._border, mode=mode)
        batched = dropped if dropped.ndim == 4 else dropped.unsqueeze(0)
        S = svd_conv(
            batched,
            Q,
            alpha,
            kernel=self.kernel_size,
            stride=self.stride,
            padding=self._zeros,
            dilation=self.dilation,
            **rows,
        )
        # In a tensor of its own: y lies with its channels first, and its strides are the model's to choose.
        term = y.new_zeros((*S.shape[:-1], self.out_channels))
        term = svd_update(term, None, P, E, Q, self.mask, alpha, S=S.flatten(0, -2), **update)
        return y + term.permute(0, 3, 1, 2).reshape(y.shape)


def _padding(base: nn.Conv2d) -> tuple[tuple[int, int], list[int]]:
    """(zeros on both sides of height and width, what to pad beforehand: left, right, top, bottom) of a convolution."""
    if base.padding == "valid":
        return (0, 0), []
    if isinstance(base.padding, str):  # "same": one more on the far side where the kernel reaches over an odd number
        spans = [d * (k - 1) for d, k in zip(base.dilation, base.kernel_size, strict=True)]
    else:
        spans = [2 * p for p in base.padding]
    if base.padding_mode == "zeros" and not any(span % 2 for span in spans):
        return (spans[0] // 2, spans[1] // 2), []
    return (0, 0), [side for span in reversed(spans) for side in (span // 2, span - span // 2)]


_ADAPTERS: dict[type[Base], Callable[..., LayerAdapter]] = {EmbeddingBase: EmbeddingAdapter, Conv2dBase: Conv2dAdapter}


def adapter_of(found: Base, r: int, **options: Any) -> LayerAdapter:
    """The adapter of a layer, by its kind; arguments and errors of :class:`LayerAdapter`."""
    return _ADAPTERS.get(type(found), LinearAdapter)(found, r, **options)
