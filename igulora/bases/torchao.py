"""Linear layers whose weight torchao keeps in a tensor of its own kind (int8, and int4 to int1 in int8)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .base import distance, runs_as
from .packed import PackedBase


class TorchAOBase(PackedBase):
    """``nn.Linear`` after ``torchao.quantization.quantize_``.

    The gradient of x is that of the unpacked weight: torchao's own is not kept where activations are quantised too.
    """

    kind = "torchao"

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.in_features, self.out_features = module.in_features, module.out_features

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and type(module.weight).__module__.split(".")[0] == "torchao"

    @property
    def _form(self) -> str:
        return type(self.module.weight).__name__

    def obstacle(self) -> str | None:
        if type(self.module.weight).dequantize is Tensor.dequantize:
            return (
                f"torchao cannot unpack its {self._form}, so that there is no gradient for its input; quantise with Int8WeightOnlyConfig, "
                "or for 4 bits with IntxWeightOnlyConfig(weight_dtype=torch.int4)"
            )
        if not runs_as(self.module, nn.Linear):
            return f"{type(self.module).__name__} has a forward of its own over a torchao weight; leave it out of target_modules"
        return None

    def fixed(self) -> str | None:
        if self._form not in _QUANTISE:
            return (
                f"igulora does not know how torchao made its {self._form}; merge into the unquantised model and quantise that, or serve "
                "the adapter beside the model (igulora.export_peft)"
            )
        return None

    def dense(self) -> Tensor:
        return self.module.weight.dequantize()

    def assign(self, dense: Tensor) -> float:
        old, wanted = self.module.weight, dense.to(self.module.weight.dtype)
        # Fresh scales follow a grown weight. The old ones are better for a small update: numbers that fill their range on one side only
        # (int4's -8 to 7) would be laid out anew even where nothing changes.
        made = [_QUANTISE[self._form](old, wanted, keep) for keep in (False, True)]
        errors = [distance(weight.dequantize(), dense) for weight in made]
        best = min(range(2), key=errors.__getitem__)
        self.module.weight = nn.Parameter(made[best], requires_grad=False)
        return errors[best]

    def snapshot(self) -> Any:
        return (self.module.weight,)  # in a tuple: a layer that keeps a bare parameter registers it

    def restore(self, before: Any) -> None:
        (weight,) = before
        self.module.weight = nn.Parameter(weight.to(self.module.weight.device), requires_grad=False)


def _asymmetric(old: Any) -> bool:
    return old.zero_point is not None and bool(torch.any(old.zero_point != 0))


def _mapping(old: Any) -> Any:
    kinds = sys.modules["torchao.quantization.quant_primitives"].MappingType
    return kinds.ASYMMETRIC if _asymmetric(old) else kinds.SYMMETRIC


def _int8(old: Any, dense: Tensor, keep_scale: bool) -> Tensor:
    granularity = sys.modules["torchao.quantization.granularity"]
    whole = list(old.block_size) == list(old.shape)
    return type(old).from_hp(
        dense,
        granularity.PerTensor() if whole else granularity.PerRow(),
        mapping_type=_mapping(old),
        scale=old.scale if keep_scale else None,
        zero_point=old.zero_point if keep_scale else None,
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale,
        reduce_range=old.reduce_range,
    )


def _intx(old: Any, dense: Tensor, keep_scale: bool) -> Tensor:
    options: dict[str, Any] = {"mapping_type": _mapping(old)}
    if keep_scale:
        options |= {
            "intx_choose_qparams_algorithm": None,
            "custom_scale": old.scale,
            "custom_zero_point": old.zero_point,
        }
    return type(old).from_hp(
        dense,
        tuple(old.block_size),
        old.target_dtype,
        activation_quantization=old.activation_quantization,
        **options,
    )


# How the same kind of weight is made from other numbers, by the names of torchao's classes.
_QUANTISE = {"Int8Tensor": _int8, "IntxUnpackedToInt8Tensor": _intx}
