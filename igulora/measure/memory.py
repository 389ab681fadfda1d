"""Memory of a training step: what is allocated, the high-water mark, and what is kept for the backward."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

_STEP, _BACKWARD = "igulora: the measured step", "igulora: a backward pass begins"


def live_storages() -> dict[int, int]:
    """Address and bytes of every CPU storage that a tensor in this process refers to, gradients included."""
    gc.collect()
    found: dict[int, int] = {}
    # `type`, not `isinstance`: the latter asks lazy modules for their __class__, which imports them.
    for tensor in [o for o in gc.get_objects() if issubclass(type(o), Tensor)]:
        for each in (tensor, tensor.grad if tensor.is_leaf else None):
            if each is not None and each.device.type == "cpu" and each.layout == torch.strided:
                with suppress(RuntimeError):  # functional tensors, which tracing leaves behind, have no storage
                    storage = each.untyped_storage()
                    # That of fake tensors, which say that they lie here, is on no device.
                    if storage.device.type == "cpu":
                        found[storage.data_ptr()] = storage.nbytes()
    return found


@dataclass(frozen=True)
class Water:
    """Bytes beyond what was allocated before a step.

    Attributes:
        peak: the high-water mark. kept: what was still allocated when a backward pass began: activations that autograd keeps, and whatever
            else the forward left; the largest of several passes.
    """

    peak: int
    kept: int


@contextmanager
def _backwards(called: Callable[[], None]) -> Iterator[None]:
    """Call ``called`` whenever a backward pass begins."""
    original = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        called()
        original(*args, **kwargs)

    with mock.patch.object(torch.autograd, "backward", backward):
        yield


def water_of(step: Callable[[], object], before: Callable[[], object] | None = None) -> Water:
    """Memory of ``step`` on the CPU, from the allocator's own events.

    Args:
        before: run first, under the same profiler, which knows only what was allocated under it: a cheap step here makes state that every
            step replaces known when it is freed.
    """

    def mark() -> None:
        with record_function(_BACKWARD):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        if before is not None:
            before()
        with record_function(_STEP), _backwards(mark):
            step()
    assert profiler.profiler is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    now = start = peak = kept = 0
    stepping = False
    for event in events:
        if event.name() == _STEP:
            stepping, start = True, now
            peak = kept = now
        elif event.name() == _BACKWARD and stepping:
            kept = max(kept, now)
        elif event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return Water(peak - start, kept - start)


def water_of_cuda(step: Callable[[], object], device: torch.device) -> Water:
    """The same on a CUDA device, from its allocator's statistics."""
    kept = [0]
    start = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with _backwards(lambda: kept.append(torch.cuda.memory_allocated(device) - start)):
        step()
    return Water(torch.cuda.max_memory_allocated(device) - start, max(kept))
