"""Linear layers of bitsandbytes: 4-bit (NF4, FP4) and 8-bit. Their own forward and backward run; merging quantises anew."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .base import Base, distance, is_kind


def _functional() -> Any:
    return sys.modules["bitsandbytes"].functional  # a layer of it exists, so it is imported


class Linear4bitBase(Base):
    """``bitsandbytes.nn.Linear4bit``: blocks of 4-bit numbers, with or without quantised scales."""

    kind = "bitsandbytes 4-bit"

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.in_features, self.out_features = module.in_features, module.out_features

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return is_kind(module, "bitsandbytes", "Linear4bit")

    @property
    def state(self) -> Any:
        """How the weight is quantised, or None before it is."""
        return getattr(self.module.weight, "quant_state", None) or getattr(self.module, "quant_state", None)

    def obstacle(self) -> str | None:
        if self.state is None:
            return "its weight is not quantised yet, which bitsandbytes does when the layer is moved; call model.to(device) first"
        return None

    def run(self, x: Tensor) -> Tensor:
        """Its forward, without the packing for CPUs with AVX512-BF16.

        There an evaluation packs the weight anew, for good, with scales rounded to bfloat16; passes with that packing have no gradient for
        x (bitsandbytes 0.50), and layers whose rows are no multiple of 32 stop with an assertion.
        """
        module = self.module
        packs = getattr(module, "support_avx512bf16_for_cpu", False)
        if not packs or x.device.type != "cpu":
            return module(x)
        self._unpack()
        module.support_avx512bf16_for_cpu = False
        try:
            return module(x)
        finally:
            module.support_avx512bf16_for_cpu = packs

    def _unpack(self) -> None:
        weight = self.module.weight
        if getattr(self.state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = _functional()._convert_weight_packed_for_cpu_inverse(
                weight.data, self.state
            )
            self.module.quant_state = weight.quant_state

    def dense(self) -> Tensor:
        self._unpack()
        return _functional().dequantize_4bit(self.module.weight.data, self.state)

    def assign(self, dense: Tensor) -> float:
        weight, state = self.module.weight, self.state
        weight.data, weight.quant_state = _functional().quantize_4bit(
            dense.to(state.dtype).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=weight.data.dtype,
        )
        self.module.quant_state = weight.quant_state
        return distance(self.dense(), dense)

    def snapshot(self) -> Any:
        self._unpack()
        return self.module.weight.data, self.state

    def restore(self, before: Any) -> None:
        data, state = before
        weight = self.module.weight
        state.to(weight.device)
        weight.data, weight.quant_state = data.to(weight.device), state
        self.module.quant_state = state


class Linear8bitBase(Base):
    """``bitsandbytes.nn.Linear8bitLt``: int8 numbers with one scale for each row."""

    kind = "bitsandbytes 8-bit"

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.in_features, self.out_features = module.in_features, module.out_features

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return is_kind(module, "bitsandbytes", "Linear8bitLt")

    def obstacle(self) -> str | None:
        if self.module.state.has_fp16_weights:
            return "it keeps 16-bit weights and quantises them in every forward; build it with has_fp16_weights=False"
        if self.module.weight.dtype != torch.int8:
            return "its weight is not quantised yet, which bitsandbytes does when the layer is moved; call model.to(device) first"
        return None

    def _scales(self) -> Tensor:
        """One for each row. The first forward moves them from the weight to the layer's state."""
        held = self.module.state.SCB
        return self.module.weight.SCB if held is None else held

    def dense(self) -> Tensor:
        return self.module.weight.data.to(torch.float32) * (self._scales().to(torch.float32) / 127).unsqueeze(1)

    def assign(self, dense: Tensor) -> float:
        numbers, scales, _ = _functional().int8_vectorwise_quant(dense.to(torch.float16).contiguous())
        self.restore((numbers, scales))
        return distance(self.dense(), dense)

    def snapshot(self) -> Any:
        return self.module.weight.data, self._scales()

    def restore(self, before: Any) -> None:
        weight, state = self.module.weight, self.module.state
        numbers, scales = (t.to(weight.device) for t in before)
        weight.data = numbers
        holder = weight if state.SCB is None else state
        holder.CB, holder.SCB = numbers, scales
