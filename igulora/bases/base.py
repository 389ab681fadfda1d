"""Base: a layer under an adapter."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Base:
    """A layer that can be adapted, seen as a matrix W (out, in).

    Args:
        module: the layer.

    Attributes:
        kind: the name that messages use.
        in_features, out_features: columns and rows of W.
    """

    kind: ClassVar[str]
    linear: ClassVar[bool] = True  # one of those that "all-linear" names
    in_features: int
    out_features: int

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether ``module`` is of this kind."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.module.weight.device

    @property
    def master_dtype(self) -> torch.dtype:
        """Of the adapter's masters: float64 over float64 weights, else float32."""
        return torch.float64 if self.module.weight.dtype == torch.float64 else torch.float32

    def dense(self) -> Tensor:
        """W as (out, in) numbers; the layer's own storage where that is what it stores."""
        raise NotImplementedError

    def assign(self, dense: Tensor) -> float:
        """Store W; returns how far the stored numbers are from ``dense`` beyond rounding to the weight's dtype, as a share of its norm.

        Raises:
            ValueError: weights of this kind cannot be written; says why and what to do.
        """
        raise NotImplementedError
