"""FusedSVDLinear, the adapted linear layer, and LinearAdapter, its triplets where the base layer is kept elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import SVDAdapter
from .bases import Base, describe, is_plain_product
from .kernels import svd_linear, svd_update
from .shared import Taken
from .unwrap import placed_as


class LinearAdapter(SVDAdapter):
    """The triplets of a linear layer: of any module that maps (..., in) to (..., out) by a product with its weight."""

    def call(self, base: nn.Module, x: Tensor, fused: bool) -> Tensor:
        """``base(x)`` plus the update; in one operator call where ``fused``, that is where the base is a plain product (:class:`Base`).

        Inside a path pass alpha and the rows' destinations come from the shared context.
        """
        if self.merged or not self.context.enabled:
            return base(x)
        if not fused:
            return self.add_to(base(x), x)
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


class AdaptedLayer(SVDAdapter):
    """What adapted layers of all kinds share: the base layer, whose own tensors are used, frozen, never copied."""

    base_layer: Any

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
        """Add the update to the base weight, rounded once to its dtype. Merging twice is an error.

        Returns:
            The error of storing the sum beyond that rounding, as a share of its norm (:meth:`Base.assign`).
        """
        if self.merged:
            raise ValueError("expected an unmerged layer, got a merged one; unmerge it first")
        base = self.base
        dense = base.dense().to(self.lora_P.dtype)
        error = base.assign(dense + placed_as(self.delta_weight(), dense))
        self.merged = True
        return error

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the update again; in 16-bit weights this returns the base up to rounding."""
        if not self.merged:
            raise ValueError("expected a merged layer, got an unmerged one; nothing to undo")
        base = self.base
        dense = base.dense().to(self.lora_P.dtype)
        base.assign(dense - placed_as(self.delta_weight(), dense))
        self.merged = False


class FusedSVDLinear(AdaptedLayer, LinearAdapter):
    """``y = x W0^T + b + alpha s ((dropout(x) Q^T) * (m * lambda)) P`` in one operator call (IGU-LoRA Eq. 2; ALGORITHMS 1).

    Parameters: ``lora_P (r, out)``, ``lora_E (r,)`` (lambda), ``lora_Q (r, in)``, float32; buffer ``mask (r,)`` of 0 and 1. The base
    weight and bias are the base layer's own tensors, frozen, never copied.

    Args:
        base: the linear layer to adapt, or its number of input features (then ``out_features`` is needed and one is built).
        out_features, bias, device, dtype: of the linear layer to build; not allowed with a base layer.
        r: number of stored triplets, from 0 up.
        options: ``lora_alpha``, ``dropout``, ``init``, ``init_lambda`` and ``generator`` of :class:`SVDAdapter`.

    Raises:
        TypeError: base is neither a linear layer nor an int.
        ValueError: an argument is out of range.
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
        if found is None:
            raise TypeError(f"expected an nn.Linear or a number of input features, got {type(base).__name__}")
        if out_features is not None:
            raise ValueError("expected either a base layer or in_features and out_features, got both")
        super().__init__(
            found.in_features, found.out_features, r, device=found.device, dtype=found.master_dtype, **options
        )
        self.base_layer = found.module.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.call(self.base_layer, x, fused=is_plain_product(self.base_layer))


def wrap(module: nn.Module, r: int, **options: Any) -> AdaptedLayer:
    """The adapted layer around ``module``, by its kind; ``options`` as for :class:`FusedSVDLinear`."""
    return FusedSVDLinear(module, r=r, **options)


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
