"""Launches of kernels at a fraction of the host's time that Triton's own call takes.

Triton binds each call's arguments anew to find out which compiled kernel they need. Here a launcher keeps a plan of each launch it has made
(grid, numbers, constants), and the plan knows the compiled kernel by its pointers' types and alignment alone. A plan that does not know
yet asks the kernel's other plans, by a key that tells apart at least what Triton does; what none of them knows is launched by Triton, which
returns the kernel it found or compiled. Pointers are passed on as addresses.

NVIDIA's assembler aims at an occupancy of its own choice, for which it puts a few bytes on the stack now and then: in which kernels depends
on trifles. A kernel where it does is assembled once more, with all registers that its threads can have, and launched so from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

F = TypeVar("F", bound=Callable[..., Any])
Key = tuple[Any, ...]


class Ready(NamedTuple):
    """A compiled kernel's own launch function, and the arguments that stay the same."""

    run: Callable[..., None]
    grid: tuple[int, ...]
    handles: tuple[Any, ...]
    tail: tuple[Any, ...]


@dataclass(eq=False)
class Plan:
    """A launch but for its pointers.

    Attributes:
        kernel: the ``triton.jit`` function; its arguments are pointers, then numbers, then constants.
        numbers: integers of 32 bits and floats. constants: the constexpr arguments and launch options by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    numbers: tuple[int | float, ...]
    constants: dict[str, Any]
    ready: dict[Key, Ready] = field(default_factory=dict)


def planned(function: F) -> F:
    """A launcher's plans, kept by what they depend on; bounded, since numbers of tokens may come in any variety."""
    return lru_cache(maxsize=4096)(function)  # type: ignore[return-value]


@dataclass
class _Kernel:
    """What any plan has found out about a kernel.

    Attributes:
        loose: whether a pointer is not specialised on its alignment. sizes: which numbers are specialised on.
        constants: names of the constexpr arguments in their order.
    """

    loose: list[bool]
    sizes: list[int]
    constants: list[str]
    compiled: dict[Key, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, kernel: JITFunction, pointers: int) -> _Kernel:
        """By what its parameters declare."""
        runtime = [p for p in kernel.params if not p.is_constexpr]
        sizes = [i for i, p in enumerate(runtime[pointers:]) if not p.do_not_specialize]
        constants = [p.name for p in kernel.params if p.is_constexpr]
        return cls([p.do_not_specialize_on_alignment for p in runtime[:pointers]], sizes, constants)


_kernels: dict[int, _Kernel] = {}  # by id: kernels live as long as their modules, and their own hash is slow


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches from Triton."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def all_registers(num_warps: int) -> int:
    """Registers per thread that a program of so many warps can have: 255, or its share of a multiprocessor's 65536."""
    return min(255, 65_536 // (32 * num_warps))


def _without_spills(compiled: Any, plan: Plan, pointers: tuple[Any, ...]) -> Any:
    """The kernel that was compiled, or the same with all registers where that leaves less on the stack. Nothing is launched."""
    if not compiled.n_spills:
        return compiled
    limit = all_registers(compiled.metadata.num_warps)
    other = plan.kernel.warmup(*pointers, *plan.numbers, grid=plan.grid, **plan.constants, maxnreg=limit)
    other.run  # noqa: B018 - loads it, which tells what it spills
    return other if other.n_spills < compiled.n_spills else compiled


def launch(plan: Plan, *pointers: Tensor | TensorDescriptor | None) -> None:
    """Launch on the current device and stream."""
    if type(plan.kernel) is not JITFunction or _hooked():  # an interpreted kernel is no JITFunction
        plan.kernel[plan.grid](*pointers, *plan.numbers, **plan.constants)
        return
    device = torch.cuda.current_device()
    addresses: list[Any] = []
    key: list[Any] = [device]
    for pointer in pointers:
        if pointer is None:
            addresses.append(None)
            key.append(None)
        elif isinstance(pointer, TensorDescriptor):
            addresses.append(pointer)
            key.append(pointer.base.dtype)
        else:
            address = pointer.data_ptr()
            addresses.append(address)
            key += (pointer.dtype, address & 15)
    ready = plan.ready.get(found := tuple(key))
    if ready is None:
        ready = _find(plan, pointers, found)
        if ready is None:
            return
    stream = torch._C._cuda_getCurrentRawStream(device)
    ready.run(*ready.grid, stream, *ready.handles, *addresses, *ready.tail)


def _find(plan: Plan, pointers: tuple[Any, ...], found: Key) -> Ready | None:
    """What the plan is to launch from now on; None where Triton has just launched it."""
    kernel = _kernels.get(id(plan.kernel))
    if kernel is None:
        kernel = _kernels[id(plan.kernel)] = _Kernel.of(plan.kernel, len(pointers))
    told: list[Any] = [found[0], *plan.constants.items(), *(plan.numbers[i] for i in kernel.sizes)]
    for pointer, loose in zip(pointers, kernel.loose, strict=True):
        if pointer is None:
            told.append(None)
        elif isinstance(pointer, TensorDescriptor):
            told += (pointer.base.dtype, *pointer.block_shape)
        else:
            told += (pointer.dtype, loose or pointer.data_ptr() % 16)
    key = tuple(told)
    compiled = kernel.compiled.get(key)
    launched = compiled is None
    if compiled is None:
        first = plan.kernel[plan.grid](*pointers, *plan.numbers, **plan.constants)
        compiled = kernel.compiled[key] = _without_spills(first, plan, pointers)
    grid = (*plan.grid, 1, 1)[:3]
    handles = (compiled.function, compiled.packed_metadata, None, None, None)
    tail = (*plan.numbers, *(plan.constants[name] for name in kernel.constants))
    plan.ready[found] = ready = Ready(compiled.run, grid, handles, tail)
    return None if launched else ready
