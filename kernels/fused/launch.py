"""Launches of kernels at a fraction of the host's time that Triton's own call takes.

Triton binds each call's arguments anew to find out which compiled kernel they need. Here that kernel is looked up by a key that tells
apart at least what Triton does: the pointers' types and alignment, the value of every integer that is specialised on, and what is None.
What is not found is launched by Triton, which returns the kernel it found or compiled. Pointers are passed on as addresses.

NVIDIA's assembler aims at an occupancy of its own choice, for which it puts a few bytes on the stack now and then: in which kernels depends
on trifles. A kernel where it does is assembled once more, with all registers that its threads can have, and launched so from then on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from triton import knobs
from triton.runtime.jit import JITFunction


@dataclass
class _Launched:
    """A kernel's compiled variants, and where in its arguments lies what tells them apart.

    Attributes:
        aligned, loose: positions of pointers that are specialised on alignment, and of those that are not. descriptors, sizes: of tensor
            descriptors, and of integers that are specialised on.
        constants: names of the arguments behind the runtime ones.
    """

    aligned: list[int]
    loose: list[int]
    descriptors: list[int]
    sizes: list[int]
    constants: list[str]
    variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = field(default_factory=dict)

    @classmethod
    def of(cls, kernel: JITFunction) -> _Launched:
        """By the names of its parameters: ``_ptr``, ``_desc``, and for the rest what it declares."""
        runtime = [p for p in kernel.params if not p.is_constexpr]
        pointers = [(i, p) for i, p in enumerate(runtime) if p.name.endswith("_ptr")]
        numbers = [(i, p) for i, p in enumerate(runtime) if not p.name.endswith(("_ptr", "_desc"))]
        return cls(
            [i for i, p in pointers if not p.do_not_specialize_on_alignment],
            [i for i, p in pointers if p.do_not_specialize_on_alignment],
            [i for i, p in enumerate(runtime) if p.name.endswith("_desc")],
            [i for i, p in numbers if not p.do_not_specialize],
            [p.name for p in kernel.params if p.is_constexpr],
        )


_kernels: dict[JITFunction, _Launched] = {}


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches from Triton."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def all_registers(num_warps: int) -> int:
    """Registers per thread that a program of so many warps can have: 255, or its share of a multiprocessor's 65536."""
    return min(255, 65_536 // (32 * num_warps))


def _without_spills(
    compiled: Any, kernel: JITFunction, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> Any:
    """The kernel that was compiled, or the same with all registers where that leaves less on the stack. Nothing is launched."""
    if not compiled.n_spills:
        return compiled
    limit = all_registers(compiled.metadata.num_warps)
    other = kernel.warmup(*arguments, grid=grid, **constants, maxnreg=limit)
    other.run  # noqa: B018 - loads it, which tells what it spills
    return other if other.n_spills < compiled.n_spills else compiled


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the current device.

    Args:
        arguments: the runtime arguments in their order: tensors, descriptors, integers of 32 bits, floats, or None for a pointer.
        constants: the constexpr arguments and launch options.
    """
    # Interpreted kernels are no JITFunction. On AMD, where nothing is launched yet, Triton's own key holds more (sizes of allocations).
    if type(kernel) is not JITFunction or _hooked():
        kernel[grid](*arguments, **constants)
        return
    known = _kernels.get(kernel)
    if known is None:
        known = _kernels[kernel] = _Launched.of(kernel)
    device = torch.cuda.current_device()
    values = list(arguments)
    key: list[Any] = [device, *constants.values()]
    for i in known.aligned:
        tensor = arguments[i]
        if tensor is None:
            key.append(None)
        else:
            values[i] = address = tensor.data_ptr()
            key += (tensor.dtype, address & 15)
    for i in known.loose:
        tensor = arguments[i]
        if tensor is None:
            key.append(None)
        else:
            values[i] = tensor.data_ptr()
            key.append(tensor.dtype)
    for i in known.descriptors:
        key.append(arguments[i].base.dtype)
    for i in known.sizes:
        key.append(arguments[i])
    variant = known.variants.get(found := tuple(key))
    if variant is None:
        compiled = _without_spills(kernel[grid](*arguments, **constants), kernel, grid, arguments, constants)
        known.variants[found] = compiled, tuple(constants[name] for name in known.constants)
        return
    compiled, trailing = variant
    stream = torch._C._cuda_getCurrentRawStream(device)
    across, down = grid if len(grid) == 2 else (grid[0], 1)
    compiled.run(
        across, down, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *trailing
    )
