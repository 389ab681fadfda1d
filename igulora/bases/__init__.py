"""The layers that adapters sit on: how large they are, where they lie, and their weight as one dense matrix, whatever it is stored as."""

from __future__ import annotations

from torch import nn

from .base import Base
from .linear import Conv1DBase, LinearBase, is_plain_product

# The first that knows a module describes it.
_KINDS: tuple[type[Base], ...] = (Conv1DBase, LinearBase)


def describe(module: nn.Module) -> Base | None:
    """What an adapter needs to know of a layer, or None where no adapter exists for its kind."""
    for kind in _KINDS:
        if kind.matches(module):
            return kind(module)
    return None


__all__ = ["Base", "Conv1DBase", "describe", "is_plain_product"]
