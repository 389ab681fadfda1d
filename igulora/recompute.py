"""Inputs of adapted layers made again in the backward pass, bit by bit, from what autograd keeps anyway.

The gradient of Q needs the layer's input x, which a frozen layer would not keep: over a Llama this is most of what adapters add to the
memory of a step. But x is nearly always a product or a cast of tensors that their own backward keeps (the norm's ``weight * (h * rstd)``,
the MLP's ``act(gate) * up``), and that backward comes later: x can be multiplied out once more when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_Node = Any  # torch.autograd.graph.Node with attributes that its kind adds
_DEPTH = 4  # operators between x and what is kept: norms need three


def _plan(node: _Node, dtype: torch.dtype, depth: int = _DEPTH) -> tuple[Callable[[], Tensor], str] | None:
    """How to compute again what ``node`` returned, and of which operators that consists; None where that is not known."""
    name = node.name() if node is not None and depth else ""
    if name == "ToCopyBackward0":
        # A cast keeps nothing. What it cast was float32 or came from an operator that kept its operands; the check tells.
        inner = _plan(node.next_functions[0][0], dtype, depth - 1)
        if inner is None:
            return None
        wide, kind = inner
        return (lambda: wide().to(dtype)), f"cast({kind})"
    if name != "MulBackward0":
        return None
    sources = (*node.next_functions, (None, 0))  # a product with a plain number has one
    operands = []
    for i, which in enumerate(("_saved_self", "_saved_other")):
        kept = getattr(node, which) is not None
        operand = (partial(getattr, node, which), "kept") if kept else _plan(sources[i][0], dtype, depth - 1)
        if operand is None:
            return None
        operands.append(operand)
    (one, first), (other, second) = operands
    return (lambda: one() * other()), f"mul({first}, {second})"


class Recompute:
    """Keeps recipes instead of inputs, for one adapted layer or for several that read one input.

    A recipe is tried out when operators of its kind are first met: only what it gives bit by bit is left out of memory. That comparison is
    the only time that something is read from the device.
    """

    def __init__(self) -> None:
        self._exact: dict[str, bool] = {}

    def saving(self, x: Tensor) -> AbstractContextManager[object]:
        """The context for an operator that saves ``x`` for its backward: in it the recipe is saved where there is one.

        Where somebody else decides what is kept (activation checkpointing, offloading), where nothing is kept, and inside a compiled graph,
        nothing changes.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.grad_fn is None:
            return nullcontext()
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return nullcontext()
        found = _plan(x.grad_fn, x.dtype)
        if found is None:
            return nullcontext()
        compute, kind = found
        if kind not in self._exact:
            with torch.no_grad():
                again = compute()
                self._exact[kind] = again.dtype == x.dtype and torch.equal(again, x)
        return _Recipe(x, compute).hooks() if self._exact[kind] else nullcontext()


class _Recipe:
    """x, to be computed when the first of the operators that saved it needs it, and dropped with the last."""

    def __init__(self, x: Tensor, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._address, self._shape = x.data_ptr(), x.shape
        self._saved = self._waiting = 0
        self._value: Tensor | None = None

    def hooks(self) -> saved_tensors_hooks:
        """While they are set, saving x saves this."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.data_ptr() != self._address or tensor.shape != self._shape:
            return tensor
        self._saved += 1
        return self

    @staticmethod
    def _unpack(kept: Any) -> Tensor:
        return kept.take() if isinstance(kept, _Recipe) else kept

    def take(self) -> Tensor:
        """x once more."""
        if self._value is None:
            with torch.no_grad():
                self._value = self._compute()
            self._waiting = self._saved
        value = self._value
        self._waiting -= 1
        if self._waiting == 0:
            self._value = None
        return value
