"""The layers that adapters sit on: how large they are, where they lie, and their weight as one dense matrix, whatever it is stored as."""

from __future__ import annotations

from torch import nn

from .base import Base
from .bitsandbytes import Linear4bitBase, Linear8bitBase
from .gguf import GgufBase
from .linear import Conv1DBase, LinearBase, is_plain_product
from .lookup import Conv2dBase, EmbeddingBase
from .torchao import TorchAOBase

# The first that knows a module describes it: kinds of weights before the layers they are in.
_KINDS: tuple[type[Base], ...] = (
    Linear4bitBase,
    Linear8bitBase,
    TorchAOBase,
    LinearBase,
    Conv1DBase,
    GgufBase,
    EmbeddingBase,
    Conv2dBase,
)


def describe(module: nn.Module) -> Base | None:
    """What an adapter needs to know of a layer, or None where no adapter exists for its kind."""
    for kind in _KINDS:
        if kind.matches(module):
            return kind(module)
    return None


__all__ = ["Base", "Conv1DBase", "Conv2dBase", "EmbeddingBase", "describe", "is_plain_product"]
