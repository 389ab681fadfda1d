"""Training steps whose models run under torch.compile with CUDA graphs of their passes; minutes of compiling, so only when asked for."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_machine import Deadline, Setting, Times
from gpu_steps import METHODS, Steps

from igulora.benchmarks.methods import Method
from igulora.benchmarks.ratios import paired_ratios, quartiles

_COMPILING = 60  # seconds that a model takes to compile, at least
_COMPILED = ("instantaneous", "peft-lora")


def measure(steps: Steps, deadline: Deadline) -> dict[str, Any]:
    """Steps whose model runs under torch.compile with CUDA graphs of its passes, which leave little to the host."""
    if not steps.clock.cuda:
        return {"skipped": "needs a CUDA device"}
    result: dict[str, Any] = {}
    running: dict[str, Method] = {}
    for name in [name for name in _COMPILED if name in steps.methods]:
        if deadline.left < _COMPILING:
            result[name] = {"cut": "the part's time was over"}
            continue
        method = steps.methods[name]
        method.model = torch.compile(method.model, mode="reduce-overhead", dynamic=False)
        start = time.perf_counter()
        try:
            steps.block(method, steps.batch, 4)  # compiles, warms up, records
            running[name] = method
            result[name] = {"compiling_s": round(time.perf_counter() - start, 1)}
        except Exception:
            result[name] = {"error": traceback.format_exc()}
            steps.clock.synchronize()
    times: Times = {name: [] for name in running}
    while running and (len(next(iter(times.values()))) < 3 or deadline.left > 10):
        for name, method in running.items():
            times[name].append(steps.block(method, steps.batch, 8))
        if len(times[name]) == 12:
            break
    step = {name: quartiles(series) for name, series in times.items()}
    return {"methods": result, "step": step, "ratios": paired_ratios(times)}


def items(setting: Setting) -> Iterator[tuple[str, Callable[[Deadline], dict[str, Any]]]]:
    """Building, and the compiled steps of the short batch."""
    steps = Steps(setting, {name: METHODS[name] for name in _COMPILED})
    yield "methods", steps.build
    yield "compiled", lambda deadline: measure(steps, deadline)
