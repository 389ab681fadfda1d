"""Peak memory of one training step beyond the frozen model, on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from baselines import Method
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


def step_peak(method: Method, batch: dict[str, Tensor], small: dict[str, Tensor], kind: str) -> int:
    """High-water mark of one step above what is allocated before it, in bytes, from the allocator's own events.

    The profiler knows only what was allocated under it, so a cheap step goes first: state that every step replaces is
    then known when it is freed.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        method.step(small)
        method.seek(kind, small)
        with record_function(_MARK):
            method.step(batch)
    events = profiler.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in events if e.name() == _MARK)
    now = start = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        if event.start_ns() < begin:
            start = peak = now
        peak = max(peak, now)
    return peak - start


def saved_bytes(method: Method, batch: dict[str, Tensor]) -> int:
    """Bytes that one step's forward keeps for its backward, parameters and buffers not counted, each storage once.

    The method is not to be used afterwards: the pass is never stepped.
    """
    own = {t.untyped_storage().data_ptr() for t in (*method.model.parameters(), *method.model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        method.backward(batch)
    return sum(kept.values())


def peak_memory(
    make: Callable[[nn.Module], Method], model: nn.Module, batch: dict[str, Tensor], small: dict[str, Tensor]
) -> dict[str, int]:
    """Bytes beyond ``model``, which exists already, that one method needs for its most expensive kind of step.

    Args:
        make: builds the method on the model. Everything that lives from then on counts: adapters, gradients, optimizer
            and score states, activations, and temporaries inside operators.

    Returns:
        ``held``: what lives between steps; ``peak``: that and the high-water mark of a step; ``saved``: see
        :func:`saved_bytes`.
    """
    before = live_storages()
    method = make(model)
    method.prepare(small)
    dearest = max(method.kinds(), key=lambda kind: ("path" in kind, "score" in kind))
    held = sum(size for address, size in live_storages().items() if address not in before)
    peak = held + step_peak(method, batch, small, dearest)
    method.seek(dearest, small)
    return {"peak": peak, "held": held, "saved": saved_bytes(method, batch)}
