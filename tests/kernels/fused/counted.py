"""Counts what kernels move and multiply under Triton's interpreter, to hold the traffic functions of ``kernels/fused`` against.

Every load and store of the interpreter, those of tensor descriptors included, ends in ``InterpreterBuilder.create_masked_load`` or
``create_masked_store``; both are wrapped here, by the names that Triton 3.6 to 3.9 share. An atomic raises: no result may need one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from igulora.kernels.backend import interpreting
from igulora.kernels.traffic import Traffic

# Marks tests that count: on a CUDA device the kernels run compiled, and nothing can be counted.
only_interpreted = pytest.mark.skipif(not interpreting(), reason="loads and stores are counted by Triton's interpreter")


class _Accesses:
    """Accesses of one launch in one direction."""

    def __init__(self) -> None:
        self.requested = 0
        self._addresses: dict[int, list[np.ndarray]] = {}

    def add(self, ptrs: Any, mask: Any) -> None:
        """One access: the handles of its pointers and of its mask (Triton 3.6 and 3.7 pass a descriptor's mask as an array)."""
        mask = mask if isinstance(mask, np.ndarray) else mask.data
        itemsize = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        # A mask made with & from a scalar condition holds integers.
        wanted = ptrs.data[np.broadcast_to(mask, ptrs.data.shape).astype(bool)]
        self.requested += wanted.size * itemsize
        self._addresses.setdefault(itemsize, []).append(np.unique(wanted))

    def distinct(self) -> int:
        """Bytes that were accessed at least once."""
        spans = [
            (np.unique(np.concatenate(parts))[:, None] + np.arange(size, dtype=np.uint64)).ravel()
            for size, parts in self._addresses.items()
        ]
        return np.unique(np.concatenate(spans)).size if spans else 0


@dataclass
class Counted:
    """What ran inside a :func:`counted` block.

    Attributes:
        launches: name of the kernel and its traffic, launch by launch. ``flops`` counts whole tiles: it equals a model that cuts tiles
            at the matrices' edges only where the shapes are multiples of the tiles.
    """

    launches: list[tuple[str, Traffic]] = field(default_factory=list)

    @property
    def traffic(self) -> Traffic:
        """Sum over all launches; distinct bytes are distinct within a launch."""
        return reduce(add, (traffic for _, traffic in self.launches), Traffic())


@contextmanager
def counted() -> Iterator[Counted]:
    """Count the launches made inside the block."""
    result = Counted()
    loads, stores, flops = _Accesses(), _Accesses(), 0
    run, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )
    dot = InterpreterBuilder.create_dot

    def counting_run(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        nonlocal loads, stores, flops
        loads, stores, flops = _Accesses(), _Accesses(), 0
        run(self, *args, **kwargs)
        traffic = Traffic(loads.distinct(), stores.distinct(), loads.requested, stores.requested, flops)
        result.launches.append((self.fn.__name__, traffic))

    def counting_load(self: InterpreterBuilder, ptrs: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        loads.add(ptrs, mask)
        return load(self, ptrs, mask, *args, **kwargs)

    def counting_store(self: InterpreterBuilder, ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        stores.add(ptrs, mask)
        return store(self, ptrs, value, mask, *args, **kwargs)

    def counting_dot(self: InterpreterBuilder, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal flops
        out = dot(self, a, b, *args, **kwargs)
        flops += 2 * out.data.size * a.data.shape[-1]
        return out

    def refused(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(
            "expected kernels without atomics, got one: its result would depend on the order of programs"
        )

    changes: list[tuple[type, str, Callable[..., Any]]] = [
        (GridExecutor, "__call__", counting_run),
        (InterpreterBuilder, "create_masked_load", counting_load),
        (InterpreterBuilder, "create_masked_store", counting_store),
        (InterpreterBuilder, "create_dot", counting_dot),
        (InterpreterBuilder, "create_atomic_rmw", refused),
        (InterpreterBuilder, "create_atomic_cas", refused),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, function in changes:
            patch.setattr(owner, name, function)
        yield result
