"""Which implementation of an operator runs: the Triton kernels in ``fused/`` or the PyTorch reference.

On a CUDA device the kernels run where they can; elsewhere, and where they cannot, the reference does, after one warning that names the
reason. ``IGULORA_BACKEND=triton`` or ``=reference`` forces one of them for a whole process, :func:`use_backend` for a block; a backend
that was forced and cannot run raises. On a CPU the kernels run under Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Any]
BACKENDS = ("triton", "reference")
MAX_RANK = 256
_MIN_CAPABILITY = (8, 0)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_forced: list[str | None] = []  # innermost use_backend last
_AS_IT_IS = nullcontext()


class ReferenceWarning(UserWarning):
    """The PyTorch reference runs where a Triton kernel was to be expected."""


@cache
def _from_environment() -> str | None:
    name = os.environ.get("IGULORA_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"expected IGULORA_BACKEND to be one of {', '.join(BACKENDS)} or unset, got {name!r}")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force ``"triton"`` or ``"reference"`` inside the block; None chooses by device, whatever the environment says.

    Raises:
        ValueError: unknown name.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"expected a backend of {', '.join(BACKENDS)} or None, got {name!r}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a type of device."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def as_given(like: Tensor) -> AbstractContextManager[object]:
    """What an operator runs in: the operands' device is the current one, where Triton launches, and their dtype that of the computation."""
    device = like.device
    kind = device.type
    elsewhere = kind == "cuda" and device.index != torch.cuda.current_device()
    casts = autocasts(kind)
    if not elsewhere and not casts:
        return _AS_IT_IS
    stack = ExitStack()
    if elsewhere:
        stack.enter_context(torch.cuda.device(device))
    if casts:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def eager(like: Tensor) -> bool:
    """Whether nothing but a profiler could listen at PyTorch's dispatcher, or stand in for tensors, in a call on ``like``."""
    return (
        type(like) in (Tensor, torch.nn.Parameter)
        and like.device.type in ("cuda", "cpu")
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def past_dispatcher(like: Tensor, operator: Operator, implementation: Operator) -> Operator:
    """What an eager call runs: the implementation itself, since PyTorch's dispatcher takes longer than a small layer's kernels.

    The operator where something listens there or stands in for tensors: subclasses, dispatch modes, function transforms, the profiler.
    """
    return implementation if eager(like) and not torch.autograd._profiler_enabled() else operator


@cache
def interpreting() -> bool:
    """Whether Triton interprets kernels instead of compiling them, which it decides when they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def _missing(device: torch.device) -> str | None:
    """Why no kernel can run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        if torch.version.hip is not None:
            return f"{name} is an AMD GPU, for which the kernels have no tiles yet"
        if capability < _MIN_CAPABILITY:
            return f"{name} has compute capability {capability[0]}.{capability[1]}, below 8.0"
        return None
    if device.type == "cpu":
        return None if interpreting() else "tensors lie on a CPU, where Triton kernels run only with TRITON_INTERPRET=1"
    return f"tensors lie on a device of type {device.type!r}"


def obstacle(like: Tensor, rank: int, dropped: int = 0) -> str | None:
    """Why no kernel can run on tensors of this device and dtype, of this rank, with dropout in windows of ``dropped`` columns; or None."""
    missing = _missing(like.device)
    if missing is not None:
        return missing
    if like.dtype not in _DTYPES:
        return f"the dtype is {like.dtype}, not bfloat16, float16 or float32"
    if like.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter computes products of bfloat16 wrongly"
    if rank > MAX_RANK:
        return f"the rank is {rank}, above {MAX_RANK}"
    if dropped % 4:
        return f"dropout's words come for 4 columns each, and blocks have windows of {dropped}"
    return None


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"igulora runs the PyTorch reference instead of a Triton kernel: {reason}", ReferenceWarning, stacklevel=4
    )


def _expected(kind: str) -> bool:
    """Whether the reference is what a device of this type is there to run."""
    return kind == "meta" or (kind == "cpu" and not interpreting())


def runs_fused(like: Tensor, rank: int = 0, dropped: int = 0) -> bool:
    """Whether an operator on tensors of this device and dtype runs as a Triton kernel.

    Args:
        rank: the largest among its layers, of one block of a block-diagonal adapter.
        dropped: columns of the windows of x in which dropout drops, 0 where it does not or where the window is all of x.

    Raises:
        ValueError: kernels were asked for by name and cannot run.
    """
    forced = _forced[-1] if _forced else _from_environment()
    if forced == "reference" or (forced is None and _expected(like.device.type)):
        return False
    reason = obstacle(like, rank, dropped)
    if reason is None:
        return True
    if forced == "triton":
        raise ValueError(
            f"expected to run Triton kernels (backend 'triton' was asked for), got a case they cannot run: {reason}; "
            "unset IGULORA_BACKEND to let the reference take such cases"
        )
    _warn_once(reason)
    return False
