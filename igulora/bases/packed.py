"""Weights that are stored packed: their layer's own forward with a gradient for x that we supply.

Kernels of packed weights are made for inference. Some have no derivative, some lose it without a word (torchao's int8 activations, the
GGUF product for few rows): y then does not depend on x for autograd, and everything below the layer trains on nothing. The gradient here is
that of the product with the unpacked weight, which is unpacked again in the backward instead of being kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Base


class PackedBase(Base):
    """A layer whose forward is not to be relied on for gradients."""

    def product(self, x: Tensor) -> Tensor:
        """The layer's own forward."""
        return self.module(x)

    def run(self, x: Tensor) -> Tensor:
        """The layer's own forward; the gradient of x is ``dy W``, W unpacked in dy's dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        return self.product(x)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base):  # type: ignore[no-untyped-def]
        ctx.base = base
        return base.product(x)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        with torch.autocast(dy.device.type, enabled=False):
            return dy @ ctx.base.dense().to(dy.dtype), None
