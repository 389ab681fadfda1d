"""Inputs of adapted layers made again in the backward pass, bit by bit, from what autograd keeps anyway.

The gradient of Q needs the layer's input x, which a frozen layer would not keep: over a Llama this is most of what adapters add to the
memory of a step. But x is nearly always a product or a cast of tensors that their own backward keeps (the norm's ``weight * (h * rstd)``,
the MLP's ``act(gate) * up``), and that backward comes later: x can be multiplied out once more when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

_Node = Any  # torch.autograd.graph.Node with attributes that its kind adds
_DEPTH = 4  # operators between x and what is kept: norms need three
_NARROW = (torch.bfloat16, torch.float16)


def _kept(node: _Node, which: str) -> bool | None:
    """Whether a product keeps this operand for its own backward; None where somebody else's hooks keep it, who are not to be asked."""
    saved = getattr(node, f"_raw_saved_{which}")
    if saved.data is None:
        return False
    return True if isinstance(saved.data, Tensor) and saved.unpack_hook is None else None


def _plan(node: _Node, dtype: torch.dtype, depth: int = _DEPTH) -> tuple[Callable[[], Tensor], str] | None:
    """How to compute again what ``node`` returned in ``dtype``, and of which operators that consists; None where that is not known."""
    name = node.name() if node is not None and depth else ""
    if name == "ToCopyBackward0":
        # A cast keeps nothing, not even what it cast to. Only a factor of a 16-bit product can be of no other type than the product.
        inner = _plan(node.next_functions[0][0], dtype, depth - 1) if dtype in _NARROW else None
        if inner is None:
            return None
        wide, kind = inner
        return (lambda: wide().to(dtype)), f"cast({kind})"
    if name != "MulBackward0":
        return None
    sources = (*node.next_functions, (None, 0))  # a product with a plain number has one
    operands = []
    for i, which in enumerate(("self", "other")):
        kept = _kept(node, which)
        if kept is None:
            return None
        operand = (
            (partial(getattr, node, f"_saved_{which}"), "kept") if kept else _plan(sources[i][0], dtype, depth - 1)
        )
        if operand is None:
            return None
        operands.append(operand)
    (one, first), (other, second) = operands
    return (lambda: one() * other()), f"mul({first}, {second})"


class Recompute:
    """Finds recipes for the inputs of an adapted layer, or of several that read one.

    A recipe is tried out when operators of its kind are first met: only what it gives bit by bit is left out of memory. That comparison is
    the only time that something is read from the device.
    """

    def __init__(self) -> None:
        self._exact: dict[tuple[str, torch.dtype, torch.device], bool] = {}

    def of(self, x: Tensor) -> Recipe | None:
        """The recipe for x, or None where x is to be kept.

        That is so where somebody else decides what is kept (activation checkpointing, offloading), where nothing is kept, inside a compiled
        graph, on other devices than CPU and CUDA, and where x was changed in place.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.grad_fn is None or x._version:
            return None
        if (
            x.device.type not in ("cpu", "cuda")
            or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        ):
            return None
        found = _plan(x.grad_fn, x.dtype)
        if found is None:
            return None
        compute, kind = found
        key = (kind, x.dtype, x.device)
        if key not in self._exact:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # nothing can be compared now
            with torch.no_grad():
                again = compute()
                alike = again.dtype == x.dtype and again.device == x.device and torch.equal(again, x)
                if alike and not x.any():
                    return None  # zeros show nothing
            self._exact[key] = alike
        return Recipe(compute) if self._exact[key] else None


class Recipe:
    """x, computed when the first of the operators that would have kept it needs it, and dropped with the last."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._held = self._waiting = 0
        self._value: Tensor | None = None

    def hold(self) -> Callable[[], Tensor]:
        """What one operator gets instead of keeping x."""
        self._held += 1
        return self._take

    def _take(self) -> Tensor:
        if self._value is None:
            with torch.no_grad():
                self._value = self._compute()
            self._waiting = self._held
        value = self._value
        self._waiting -= 1
        if self._waiting == 0:
            self._value = None
        return value
