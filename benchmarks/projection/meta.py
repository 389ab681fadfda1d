"""A training step where no tensor has values: the meta device, with an answer for everything that asks for one.

Whole models of any size run so within seconds, since nothing is stored or computed. What a step would read from its device is answered
with something plausible; a counter outside notes each such wait before it is answered.
"""

from __future__ import annotations

import operator
import random
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_COMPARISONS: dict[str, Any] = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
_OPTIMIZERS = {"_fused_adamw_", "_fused_adam_", "_fused_sgd_"}


class MetaDevice:
    """Inside the block meta tensors can be trained on, read from and attended with.

    Attention runs as the one operator that a fused kernel is (the CPU's, whose shapes ask for no padding), where the meta device alone
    would take it apart into products and a softmax. Answers: numbers are 1, a tensor read whole is ones; what was asked of all entries
    is true; scalars that are compared get numbers by chance, from a seed, so that a sort that waits at each comparison makes as many as it
    would of real ones.
    """

    def __init__(self, seed: int = 0) -> None:
        self._stack = ExitStack()
        self._operators = _Operators(random.Random(seed))

    @property
    def comparisons(self) -> int:
        """Comparisons of two scalars that were answered so far."""
        return self._operators.comparisons

    def __enter__(self) -> MetaDevice:
        supported = torch_optimizer._get_fused_kernels_supported_devices()
        replaced = mock.patch.object(
            torch_optimizer, "_get_fused_kernels_supported_devices", return_value=[*supported, "meta"]
        )
        for context in (replaced, _Functions(), self._operators):
            self._stack.enter_context(context)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def comparisons_of_a_sort(entries: int, seed: int = 0) -> int:
    """How often Python compares two of so many shuffled numbers while it sorts them."""
    chance = random.Random(seed)
    made = 0

    class Number(float):
        def __lt__(self, other: float) -> bool:
            nonlocal made
            made += 1
            return float(self) < float(other)

    sorted(Number(chance.random()) for _ in range(entries))
    return made


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].is_meta:
            return _attention(*args, **kwargs)
        if func in (Tensor.tolist, Tensor.numpy) and args[0].is_meta:
            return func(args[0].cpu())
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class _Operators(TorchDispatchMode):
    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance
        self.comparisons = 0
        # Where a scalar lies, and the number it got; the storage of the last comparison of scalars, and how it came out.
        self._numbers: dict[tuple[int, Any], float] = {}
        self._compared: tuple[int, bool] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        short = func._schema.name.split("::")[1]
        if short == "_local_scalar_dense" and args[0].is_meta:
            return self._answer(args[0])
        if short == "_to_copy" and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if short in _OPTIMIZERS and args[0][0].is_meta:
            return None
        result = func(*args, **kwargs)
        if short in _COMPARISONS and result.is_meta and result.ndim == 0:
            first, second = (self._number(value) for value in args)
            self._compared = result.untyped_storage()._cdata, _COMPARISONS[short](first, second)
        return result

    def _number(self, value: Any) -> float:
        if not isinstance(value, Tensor):
            return float(value)
        where = (value.untyped_storage()._cdata, value.storage_offset())
        return self._numbers.setdefault(where, self._chance.random())

    def _answer(self, asked: Tensor) -> bool | int | float:
        if asked.dtype == torch.bool:
            if self._compared is None or asked.untyped_storage()._cdata != self._compared[0]:
                return True
            self.comparisons += 1
            return self._compared[1]
        return 1.0 if asked.dtype.is_floating_point else 1
