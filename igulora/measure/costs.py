"""What one call of a PyTorch operator costs on a GPU: launches, bytes and FLOPs, from shapes alone, so that meta tensors will do.

Launches. One for each operator that is neither a view nor bare allocation. Operators on lists of tensors (``_foreach_*``, fused
optimizers) count what PyTorch's multi-tensor kernels take (:func:`multi_tensor_launches`). Some others need several kernels (sorting,
attention's backward, a product split over its inner dimension), differently from device to device: they count one, a lower bound.

Bytes. Each distinct byte of an input once, each of a result once, as if nothing stayed in a cache between two launches. Dimensions that
were expanded count once, an operand given twice counts once, gathers read what they gather, an operator in place writes what it changes.

FLOPs. Of matrix products and attention only, by the formulas of ``torch.utils.flop_counter``, which do not halve a causal attention's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class Cost:
    """What one or several operator calls cost on a GPU.

    Attributes:
        launches: of kernels.
        read, written: bytes that must come from and go to memory at least once per launch.
        flops: of matrix products, a multiply-add counting 2.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.launches + other.launches,
            self.read + other.read,
            self.written + other.written,
            self.flops + other.flops,
        )

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


# Operators that only make or describe storage, or a number that travels as an argument.
FREE = frozenset(
    {
        "scalar_tensor",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "lift_fresh",
        "_unsafe_view",
        "set_",
    }
)
# In place, without a look at what was there.
_OVERWRITES = frozenset({"zero_", "fill_", "copy_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"})
# Of their first argument they read what they return.
_GATHERS = frozenset({"embedding", "index", "_unsafe_index", "index_select", "gather", "take"})
# Of their first argument they change what is handed to them; those that add also read it.
_SCATTERS = {
    "index_put_": False,
    "_index_put_impl_": False,
    "index_copy_": False,
    "index_fill_": False,
    "scatter_": False,
    "index_add_": True,
    "scatter_add_": True,
}

# PyTorch's multi-tensor kernels (ATen/native/cuda/MultiTensorApply.cuh): a launch takes at most so many tensors, by how many lists it walks
# (parameters, gradients, two states: 4), and at most so many chunks of so many elements.
CHUNK = 65536
MOST_CHUNKS = 320
MOST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


def multi_tensor_launches(sizes: Iterable[int], lists: int) -> int:
    """Launches of one multi-tensor operator.

    Args:
        sizes: elements of each tensor of a list, in order; empty tensors are passed over.
        lists: how many lists of tensors the kernel walks, result included; more than 5 count as 5.
    """
    most = MOST_TENSORS[min(max(lists, 1), 5)]
    launches = tensors = chunks = 0
    for size in sizes:
        left = -(-size // CHUNK)
        tensors += left > 0
        while left:
            taken = min(left, MOST_CHUNKS - chunks)
            left, chunks = left - taken, chunks + taken
            if chunks == MOST_CHUNKS or (not left and tensors == most):
                launches += 1
                chunks, tensors = 0, int(left > 0)
    return launches + (chunks > 0)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a nest of arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def distinct_bytes(t: Tensor) -> int:
    """Bytes of a tensor that differ in address: an expanded dimension counts once."""
    if t.layout != torch.strided:
        return t.numel() * t.element_size()
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * t.element_size()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of several operands, one given twice counted once."""
    seen: dict[tuple[Any, ...], int] = {}
    for t in tensors:
        if t.layout == torch.strided:
            seen[t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype] = distinct_bytes(t)
        else:
            seen[id(t),] = distinct_bytes(t)
    return sum(seen.values())


def _attention(q: Tensor, k: Tensor, v: Tensor, *_rest: Any, **_options: Any) -> int:
    return sdpa_flop_count(q.shape, _heads_of(q, k), _heads_of(q, v))


def _attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any, **_options: Any) -> int:
    return sdpa_backward_flop_count(dy.shape, q.shape, _heads_of(q, k), _heads_of(q, v))


def _heads_of(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """k's shape with q's heads: where several query heads share one of k's, each multiplies with it."""
    return (k.shape[0], q.shape[1], *k.shape[2:])


# The formulas that the counter of PyTorch lacks, or lacks for shared key heads (up to torch 2.11).
_ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
FLOPS: dict[str, Callable[..., int]] = {
    **{f"aten::_scaled_dot_product_{kind}": _attention for kind in _ATTENTION},
    **{f"aten::_scaled_dot_product_{kind}_backward": _attention_backward for kind in _ATTENTION},
    "aten::mv": lambda matrix, vector: 2 * matrix.numel(),
    "aten::dot": lambda a, b: 2 * a.numel(),
}
# Products in place have the formula of those that are not.
_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of the matrix products in an operator call; 0 for all other operators."""
    own = FLOPS.get(func._schema.name)
    if own is not None:
        return int(own(*args, **kwargs))
    packet = func._overloadpacket
    formula = flop_registry.get(_IN_PLACE.get(packet, packet))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def multi_tensor_lists(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[list[Tensor]]:
    """The lists of tensors that a multi-tensor kernel walks, result included; none for any other operator.

    An optimizer's step counters travel apart from its lists, and a list that is empty does not count.
    """
    short = func._schema.name.split("::")[1]
    if not short.startswith(("_foreach_", "_fused_")):
        return []
    names = [a.name for a in func._schema.arguments]
    given = [*zip(names, args, strict=False), *kwargs.items()]
    lists = [tensors_in(v) for name, v in given if isinstance(v, (list, tuple)) and name != "state_steps"]
    if isinstance(out, (list, tuple)) and not func._schema.is_mutable:
        lists.append(tensors_in(out))
    return [found for found in lists if found]


def aten_cost(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
    """Cost of one call of an operator that is none of igulora's.

    Args:
        func: the ``OpOverload`` that a dispatch mode sees, with its arguments.
        out: what it returned.
    """
    short = func._schema.name.split("::")[1]
    if func.is_view or short in FREE:
        return Cost()
    lists = multi_tensor_lists(func, args, kwargs, out)
    launches = multi_tensor_launches([t.numel() for t in lists[0]], len(lists)) if lists else 1
    read, written = _moved(func, short, args, kwargs, out)
    return Cost(launches, read, written, flops_of(func, args, kwargs, out))


def _moved(func: Any, short: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[int, int]:
    """Bytes read and written."""
    if short in _SCATTERS:
        return _scattered(args, kwargs, adds=_SCATTERS[short])
    changed: list[Tensor] = []
    inputs: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        found = tensors_in(value)
        if not found:
            continue
        if argument.alias_info is not None and argument.alias_info.is_write:
            # A fused optimizer is declared to change the gradients, which it does only to undo a loss scale.
            if not (argument.name == "grads" and kwargs.get("grad_scale") is None):
                changed += found
            if argument.is_out or short in _OVERWRITES:
                continue
        inputs += found
    fresh = [] if func._schema.is_mutable else tensors_in(out)
    if short in _GATHERS and inputs:
        return _bytes(inputs[1:]) + _bytes(fresh), _bytes(fresh)
    return _bytes(inputs), _bytes(changed) + _bytes(fresh)


def _scattered(args: tuple[Any, ...], kwargs: dict[str, Any], *, adds: bool) -> tuple[int, int]:
    """In place: the indices and the values are read, as many elements are written."""
    target, others = args[0], tensors_in((args[1:], kwargs))
    values = max((t.numel() for t in others if t.dtype == target.dtype), default=0)
    counts = [t.numel() for t in others if t.dtype in (torch.int64, torch.int32)]
    touched = max(values, max(counts, default=0)) if values or counts else target.numel()
    written = min(touched, target.numel()) * target.element_size()
    return _bytes(others) + (written if adds else 0), written
