"""Memory of a training step on the CPU: what is allocated, the high-water mark, and what autograd keeps."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "igulora: the measured step"


def live_storages() -> dict[int, int]:
    """Address and bytes of every CPU storage that a tensor in this process refers to, gradients included."""
    gc.collect()
    found: dict[int, int] = {}
    # `type`, not `isinstance`: the latter asks lazy modules for their __class__, which imports them.
    for tensor in [o for o in gc.get_objects() if issubclass(type(o), Tensor)]:
        for each in (tensor, tensor.grad if tensor.is_leaf else None):
            if each is not None and each.device.type == "cpu" and each.layout == torch.strided:
                storage = each.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def high_water(step: Callable[[], object], before: Callable[[], object] | None = None) -> int:
    """High-water mark of ``step`` above what is allocated before it, in bytes, from the allocator's own events.

    Args:
        before: run first, under the same profiler, which knows only what was allocated under it: a cheap step here makes state that every
            step replaces known when it is freed.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        if before is not None:
            before()
        with record_function(_MARK):
            step()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in events if e.name() == _MARK)
    now = start = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        if event.start_ns() < begin:
            start = peak = now
        peak = max(peak, now)
    return peak - start


def saved_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes that the forwards inside ``run`` keep for their backward, each storage once, ``model``'s own tensors not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())
