"""Launches of kernels at a fraction of the host's time that Triton's own call takes.

Triton binds each call's arguments anew to find out which compiled kernel they need. Here that kernel is looked up by a key that tells
apart at least what Triton does: the pointers' types and alignment, the value of every integer that is specialised on, and what is None.
What is not found is launched by Triton, which returns the kernel it found or compiled. Pointers are passed on as addresses.
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
    variants: dict[tuple[Any, ...], tuple[Any, ...]] = field(default_factory=dict)

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


_kernels: dict[int, _Launched] = {}  # by id: kernels live as long as their modules, and their own hash is slow


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches from Triton."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the current device.

    Args:
        arguments: the runtime arguments in their order: tensors, descriptors, integers of 32 bits, floats, or None for a pointer.
        constants: the constexpr arguments and launch options.
    """
    # Interpreted kernels are no JITFunction. AMD's compiler specialises on more than the key knows (sizes of allocations).
    if type(kernel) is not JITFunction or torch.version.hip is not None or _hooked():
        kernel[grid](*arguments, **constants)
        return
    known = _kernels.get(id(kernel))
    if known is None:
        known = _kernels[id(kernel)] = _Launched.of(kernel)
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
        compiled = kernel[grid](*arguments, **constants)
        trailing = [constants[name] for name in known.constants]
        known.variants[found] = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None), trailing
        return
    run, handles, trailing = variant
    across, down = grid if len(grid) == 2 else (grid[0], 1)
    run(across, down, 1, torch._C._cuda_getCurrentRawStream(device), *handles, *values, *trailing)
