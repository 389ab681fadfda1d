"""Layers with a dense weight: ``nn.Linear`` and the ``Conv1D`` of GPT-2, which is a linear layer with its weight transposed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import PLAIN_TENSORS, DenseBase, TransposedBase, is_kind, runs_as

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_plain_product(module: nn.Module) -> bool:
    """Whether the layer is ``x W^T + b`` of a plain ``weight`` and ``bias``, which an operator may compute itself.

    Elsewhere (a subclass or an instance with a forward of its own, a weight that is a tensor of its own kind) the layer's own forward runs,
    and the update is added to what it returns.
    """
    if type(module) is nn.Linear and not torch.compiler.is_compiling():  # nearly all there are, at every forward
        own = module.__dict__
        return "forward" not in own and type(own["_parameters"].get("weight")) in PLAIN_TENSORS
    return runs_as(module, nn.Linear) and type(module.weight) in PLAIN_TENSORS


class LinearBase(DenseBase):
    """``nn.Linear`` and its subclasses."""

    kind = "nn.Linear"

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.in_features, self.out_features = module.in_features, module.out_features

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def obstacle(self) -> str | None:
        dtype = self.module.weight.dtype
        if dtype in _FLOATS:
            return None
        return f"its weight is stored as {dtype}, in a form that igulora cannot unpack; quantise with bitsandbytes or torchao instead"

    def dense(self) -> Tensor:
        return self.module.weight


class Conv1DBase(TransposedBase):
    """``transformers.pytorch_utils.Conv1D``: weight (in, out)."""

    kind = "Conv1D"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.in_features, self.out_features = self.module.weight.shape

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return is_kind(module, "transformers", "Conv1D")
