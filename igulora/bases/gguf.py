"""Linear layers as transformers loads them from a GGUF file with ``GgufConfig(dequantize=False)``: weights stay in the file's blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import is_kind
from .packed import PackedBase


class GgufBase(PackedBase):
    """``transformers.integrations.gguf.utils.GgufLinear``.

    With up to eight rows its forward is a kernel that has no derivative; with more, every unpacked weight would be kept for the backward.
    """

    kind = "GGUF"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.in_features, self.out_features = self.module.in_features, self.module.out_features

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return is_kind(module, "transformers", "GgufLinear")

    def fixed(self) -> str | None:
        return (
            "GGUF blocks are written by llama.cpp's tools, not here; merge into the model loaded with GgufConfig(dequantize=True), or "
            "serve the adapter beside the model (igulora.export_peft)"
        )

    def product(self, x: Tensor) -> Tensor:
        from transformers.integrations.gguf.kernels import kernel_can_read

        if kernel_can_read(self.module.weight):
            return self.module(x)
        # transformers' own forward needs a kernel for few rows, whatever the device.
        order = self.module.input_permutation
        x = x if order is None else x.index_select(-1, order)
        y = torch.nn.functional.linear(x, self._blocks(x.dtype))
        return y if self.module.bias is None else y + self.module.bias.to(y.dtype)

    def dense(self) -> Tensor:
        blocks, order = self._blocks(torch.float32), self.module.input_permutation
        return blocks if order is None else torch.empty_like(blocks).index_copy_(1, order, blocks)

    def _blocks(self, dtype: torch.dtype) -> Tensor:
        """The weight as it lies in the file: its columns may be in another order than the input's features."""
        from transformers.integrations.gguf.kernels import dequantize_blocks

        module = self.module
        return dequantize_blocks(module.weight, module.ggml_type, self.out_features, self.in_features, dtype)
