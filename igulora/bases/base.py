"""Base: a layer under an adapter."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..unwrap import placed_as

PLAIN_TENSORS = (nn.Parameter, Tensor)


class Base:
    """A layer that can be adapted, seen as a matrix W (out, in).

    Args:
        module: the layer.

    Attributes:
        kind: the name that messages use.
        linear: whether it is one of those that "all-linear" names.
        in_features, out_features: columns and rows of W.
    """

    kind: ClassVar[str]
    linear: ClassVar[bool] = True
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

    def obstacle(self) -> str | None:
        """Why this layer, though of a kind that can be adapted, cannot be (as the end of a sentence, with what to do), or None."""
        return None

    def fixed(self) -> str | None:
        """Why nothing can be merged into this layer's weight (as the end of a sentence, with what to do), or None."""
        return None

    def run(self, x: Tensor) -> Tensor:
        """The layer's own forward, with a gradient for x."""
        return self.module(x)

    def dense(self) -> Tensor:
        """W as (out, in) numbers; the layer's own storage where that is what it stores."""
        raise NotImplementedError

    def laid_out(self, dense: Tensor) -> Tensor:
        """A matrix (out, in) in the shape and order in which the layer's weight lies."""
        return dense

    def assign(self, dense: Tensor) -> float:
        """Store W; returns how far the stored numbers are from ``dense`` (Frobenius) beyond rounding to the weight's dtype.

        Only where :meth:`fixed` is None.
        """
        raise NotImplementedError

    def check_writable(self) -> None:
        """Raise ValueError where :meth:`fixed` says why nothing can be merged."""
        fixed = self.fixed()
        if fixed is not None:
            raise ValueError(f"expected a weight that can be written, got {self.kind}: {fixed}")

    def plus(self, update: Tensor) -> Tensor:
        """W and an update (out, in) that every process has whole, in the update's dtype; of a sharded weight this process's part."""
        dense = self.dense().to(update.dtype)
        return dense + placed_as(update, dense)

    def write(self, dense: Tensor, update: Tensor) -> float:
        """:meth:`assign` what :meth:`plus` gave; returns the distance as a share of the update's norm."""
        missed, size = self.assign(dense), float(update.norm())
        return missed / size if size else missed

    def snapshot(self) -> Any:
        """What :meth:`restore` needs to undo an :meth:`assign` bit by bit; None where the caller subtracts again what it added."""
        return None

    def restore(self, before: Any) -> None:
        """Undo what happened since ``before`` was taken by :meth:`snapshot`."""
        raise NotImplementedError


class DenseBase(Base):
    """A layer whose weight holds the numbers of W themselves, in some order."""

    def assign(self, dense: Tensor) -> float:
        self.module.weight.copy_(self.laid_out(dense))
        return 0.0


class TransposedBase(DenseBase):
    """A layer whose weight is W transposed."""

    def dense(self) -> Tensor:
        return self.module.weight.t()

    def laid_out(self, dense: Tensor) -> Tensor:
        return dense.t()


def is_kind(module: nn.Module, package: str, name: str) -> bool:
    """Whether ``module`` is an instance of ``package``'s class ``name`` or of a subclass; nothing is imported to find out."""
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == package for cls in type(module).__mro__)


def runs_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the layer's forward is that of PyTorch's own ``cls``."""
    return type(module).forward is cls.forward and "forward" not in vars(module)


def distance(stored: Tensor, wanted: Tensor) -> float:
    """``|stored - wanted|`` (Frobenius)."""
    return float((stored.to(torch.float32) - wanted.to(torch.float32)).norm())
