"""Adapted layers, with their base in them: FusedSVDLinear, FusedSVDEmbedding, FusedSVDConv2d."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import SVDAdapter
from .bases import Base, Conv2dBase, EmbeddingBase, describe, is_plain_product
from .kinds import Conv2dAdapter, EmbeddingAdapter, LayerAdapter, LinearAdapter


class AdaptedLayer(LayerAdapter):
    """What adapted layers of all kinds share: the base layer, whose own tensors are used, frozen, never copied.

    Args:
        found: the base layer, described.
        r: number of stored triplets, from 0 up.
        options: ``lora_alpha``, ``dropout``, ``init``, ``init_lambda`` and ``generator`` of :class:`SVDAdapter`.

    Attributes:
        merge_error: how far a merged weight is from base plus update because it is quantised, as a share of the update's norm: 1 is as far
            off as without the update. 0.0 for weights that are not quantised.

    Raises:
        ValueError: the layer cannot be adapted (says why), or an argument is out of range.
    """

    base_layer: Any
    merge_error: float = 0.0
    _before: Any = None  # what was in the weight, while merged into a quantised one

    def __init__(self, found: Base, r: int, **options: Any) -> None:
        super().__init__(found, r, **options)
        self.base_layer = found.module.requires_grad_(False)

    @property
    def base(self) -> Base:
        """The base layer as a matrix."""
        found = describe(self.base_layer)
        assert found is not None
        return found

    @property
    def weight(self) -> Tensor:
        """The base weight, as models that look at ``layer.weight`` expect."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias (out,) or None."""
        return self.base_layer.bias

    @torch.no_grad()
    def merge(self) -> float:
        """Add the update to the base weight, rounded once to its dtype, or quantised anew. Merging twice is an error.

        A quantised weight is kept beside the merged one until :meth:`unmerge`.

        Returns:
            ``merge_error``.

        Raises:
            ValueError: the layer is merged already, or its weight cannot be written (says why).
        """
        if self.merged:
            raise ValueError("expected an unmerged layer, got a merged one; unmerge it first")
        base = self.base
        base.check_writable()
        self._before = base.snapshot()
        update = self.delta_weight()
        self.merge_error = base.write(base.plus(update), update)
        self.merged = True
        return self.merge_error

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo :meth:`merge`: bit by bit in quantised weights, up to rounding in 16-bit ones, where the update is subtracted again."""
        if not self.merged:
            raise ValueError("expected a merged layer, got an unmerged one; nothing to undo")
        base = self.base
        if self._before is not None:
            base.restore(self._before)
        else:
            base.assign(base.plus(-self.delta_weight()))
        self.merged, self.merge_error, self._before = False, 0.0, None


class FusedSVDLinear(AdaptedLayer, LinearAdapter):
    """``y = x W0^T + b + alpha s ((dropout(x) Q^T) * (m * lambda)) P`` (IGU-LoRA Eq. 2; ALGORITHMS 1).

    One operator call over a plain ``nn.Linear``. Linear layers that compute their output themselves (transformers' ``Conv1D``, the
    quantised ones of bitsandbytes, torchao and GGUF, subclasses with a forward of their own) do so, and the update is added in place.

    Parameters: ``lora_P (r, out)``, ``lora_E (r,)`` (lambda), ``lora_Q (r, in)``, float32; buffer ``mask (r,)`` of 0 and 1. The base
    weight and bias are the base layer's own tensors, frozen, never copied.

    Args:
        base: the linear layer to adapt, or its number of input features (then ``out_features`` is needed and one is built).
        out_features, bias, device, dtype: of the linear layer to build; not allowed with a base layer.
        r: number of stored triplets, from 0 up.
        options: ``lora_alpha``, ``dropout``, ``init``, ``init_lambda`` and ``generator`` of :class:`SVDAdapter`.

    Raises:
        TypeError: base is neither a linear layer nor an int.
        ValueError: the layer cannot be adapted (says why), or an argument is out of range.
    """

    def __init__(
        self,
        base: nn.Module | int,
        out_features: int | None = None,
        r: int = 8,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if isinstance(base, int) and not isinstance(base, bool):
            if out_features is None:
                raise ValueError("expected out_features with in_features, got None")
            base = nn.Linear(base, out_features, bias=bias, device=device, dtype=dtype)
            out_features = None
        found = describe(base) if isinstance(base, nn.Module) else None
        if found is None or not found.linear:
            raise TypeError(f"expected an nn.Linear or a number of input features, got {type(base).__name__}")
        if out_features is not None:
            raise ValueError("expected either a base layer or in_features and out_features, got both")
        super().__init__(found, r, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if is_plain_product(self.base_layer):
            return self.call(self.base_layer, x, fused=True)
        return self.call(self.base_layer, x, fused=False, run=self.base.run)


class FusedSVDEmbedding(AdaptedLayer, EmbeddingAdapter):
    """``y = W0[ids] + alpha s ((Q[:, ids]^T) * (m * lambda)) P``: an embedding as a product with rows of the identity (ALGORITHMS 1).

    Parameters: ``lora_P (r, dimension)``, ``lora_E (r,)`` (lambda), ``lora_Q (r, number of ids)``, float32; buffer ``mask (r,)``. An
    embedding with a ``padding_idx`` keeps that id's row: its column of Q starts at zero and gets no gradient. Rows that the layer
    multiplies by a factor (``embed_scale``) have their update multiplied too. ``dropout`` does nothing: an id has no entries to drop.

    Args:
        base: the ``nn.Embedding`` to adapt.
        r: number of stored triplets, from 0 up.
        options: ``lora_alpha``, ``init``, ``init_lambda`` and ``generator`` of :class:`SVDAdapter`.

    Raises:
        TypeError: base is no ``nn.Embedding``.
        ValueError: it is sparse, quantised, has a ``max_norm`` or ``scale_grad_by_freq`` or a forward of its own, or an argument is out
            of range.
    """

    def __init__(self, base: nn.Embedding, r: int = 8, **options: Any) -> None:
        found = describe(base) if isinstance(base, nn.Module) else None
        if not isinstance(found, EmbeddingBase):
            raise TypeError(f"expected an nn.Embedding, got {type(base).__name__}")
        super().__init__(found, r, **options)

    @property
    def bias(self) -> None:
        """None: an embedding has none."""
        return None

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., dimension)."""
        y = self.base_layer(ids)
        if self.merged or not self.context.enabled:
            return y
        return self.add_to(y, ids)


class FusedSVDConv2d(AdaptedLayer, Conv2dAdapter):
    """``y = conv2d(x, W0) + b + alpha s (conv2d(dropout(x), Q) * (m * lambda)) P``: r filters, then a 1x1 convolution (ALGORITHMS 1).

    Parameters: ``lora_P (r, out channels)``, ``lora_E (r,)`` (lambda), ``lora_Q (r, in channels * kernel height * kernel width)``,
    float32; buffer ``mask (r,)``. Stride, padding (of any mode) and dilation are the base's; the output keeps its memory format.

    Args:
        base: the ``nn.Conv2d`` to adapt.
        r: number of stored triplets, from 0 up.
        options: ``lora_alpha``, ``dropout``, ``init``, ``init_lambda`` and ``generator`` of :class:`SVDAdapter`.

    Raises:
        TypeError: base is no ``nn.Conv2d``.
        ValueError: it has groups or a forward of its own, or an argument is out of range.
    """

    def __init__(self, base: nn.Conv2d, r: int = 8, **options: Any) -> None:
        found = describe(base) if isinstance(base, nn.Module) else None
        if not isinstance(found, Conv2dBase):
            raise TypeError(f"expected an nn.Conv2d, got {type(base).__name__}")
        super().__init__(found, r, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(images, in channels, height, width) -> (images, out channels, height, width), or both without images."""
        y = self.base_layer(x)
        if self.merged or not self.context.enabled:
            return y
        return self.add_to(y, x)


_LAYERS: dict[type[Base], Callable[..., AdaptedLayer]] = {EmbeddingBase: FusedSVDEmbedding, Conv2dBase: FusedSVDConv2d}


def wrap(module: nn.Module, r: int, **options: Any) -> AdaptedLayer:
    """The adapted layer around ``module``, by its kind; ``options`` as for :class:`FusedSVDLinear`."""
    return _LAYERS.get(type(describe(module)), FusedSVDLinear)(module, r=r, **options)  # type: ignore[arg-type]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without its adapters inside the block (the base model's own outputs)."""
    contexts = list({id(m.context): m.context for m in model.modules() if isinstance(m, SVDAdapter)}.values())
    before = [context.enabled for context in contexts]
    for context in contexts:
        context.enabled = False
    try:
        yield
    finally:
        for context, enabled in zip(contexts, before, strict=True):
            context.enabled = enabled
