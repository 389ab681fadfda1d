"""Launches and host syncs, counted at the dispatcher."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that hand a value to the host, or whose result's shape depends on values.
SYNCS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
# Operators that only make or describe storage.
FREE = {
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


class Counting(TorchDispatchMode):
    """Counts operators that would each be at least one launch on a GPU: neither views nor mere allocation.

    A custom operator counts as one: what its reference does inside is not what its kernel will do. Numbers drawn from a
    CPU generator, and what is computed from nothing else, stay on the host on any machine: neither launches nor syncs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._host: dict[int, UntypedStorage] = {}
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        short = name.split("::")[1]
        result = func(*args, **(kwargs or {}))
        if self._on_host(args, kwargs or {}):
            for tensor in _tensors(result):
                self._host[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        elif short in SYNCS or _masks_by_index(short, args):
            self.syncs[name] += 1
        elif not func.is_view and short not in FREE:
            self.launches[name] += 1
        return result

    def _on_host(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        tensors = _tensors((args, kwargs))
        generator = kwargs.get("generator")
        if generator is not None and not any(t.untyped_storage().data_ptr() not in self._host for t in tensors):
            return generator.device.type == "cpu"
        return bool(tensors) and all(t.untyped_storage().data_ptr() in self._host for t in tensors)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _masks_by_index(short: str, args: tuple[Any, ...]) -> bool:
    """Whether an indexing operator is given a boolean mask, whose count of true entries the host must know."""
    if short not in ("index", "index_put", "index_put_") or len(args) < 2:
        return False
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
