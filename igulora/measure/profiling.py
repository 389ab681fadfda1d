"""One training step under torch's profiler, split into the parts of :data:`igulora.measure.parts.PARTS`, with its counts beside the times.

The step runs several times: to warm up, undisturbed for its wall time, under the profiler for the times of its parts, and under
:class:`igulora.measure.counting.Counting` for launches, bytes, FLOPs and host syncs. On the CPU a part's time is the self time of
everything that runs in it; the parts add up to the profiled step. On a GPU it is the time of the kernels launched from it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from .attribution import STEP, Attribution, attribute
from .costs import Cost
from .counting import Counting
from .parts import PARTS, PATH, PartTracker
from .seams import adapted_layers
from .trace import write_trace

FORMAT = 1


@dataclass(frozen=True)
class PartCost:
    """What one part of a step costs.

    Attributes:
        seconds: of the device where there is one, else of the CPU; host_seconds: of the CPU.
        launches: kernels by the count of :mod:`igulora.measure.costs`; syncs: waits of the host for the device, counted the same way.
        read, written: bytes. flops: of matrix products.
        kernels, waits: what the device's profile shows of the two; 0 on the CPU.
    """

    seconds: float = 0.0
    host_seconds: float = 0.0
    launches: int = 0
    read: int = 0
    written: int = 0
    flops: int = 0
    syncs: int = 0
    kernels: int = 0
    waits: int = 0

    def __add__(self, other: PartCost) -> PartCost:
        return PartCost(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class OperatorTime:
    """Calls and self time (seconds) of one operator inside one part."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class StepProfile:
    """A profiled step.

    Attributes:
        title: of the method or model. device: where it ran.
        parts: cost of each of :data:`~igulora.measure.parts.PARTS`, all of them, in that order.
        wall_seconds: of the step undisturbed; profiled_seconds: of the step under the profiler, hooks and ranges included.
        unattributed_seconds: what no part could be found for; counted under "rest".
        operators: for each part its operators by self time on the CPU, dearest first.
        notes: what a reader of the table has to know.
    """

    title: str
    device: str
    parts: dict[str, PartCost]
    wall_seconds: float
    profiled_seconds: float
    unattributed_seconds: float
    operators: dict[str, tuple[OperatorTime, ...]]
    notes: tuple[str, ...]

    @property
    def total(self) -> PartCost:
        """All parts together."""
        return sum(self.parts.values(), PartCost())

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it; seconds, bytes, counts."""
        return {"format": FORMAT, **asdict(self), "total": asdict(self.total)}


def profile_step(
    step: Callable[[], object],
    model: nn.Module,
    *,
    optimizer: Any = None,
    controller: Any = None,
    before: Callable[[], object] | None = None,
    warmup: int = 1,
    adapted: bool = True,
    title: str = "",
    trace: str | Path | None = None,
) -> StepProfile:
    """Profile one training step of a loop of your own, split into its parts::

        profile = profile_step(lambda: train_on(batch), model, controller=ctl)

    The step is run ``warmup`` + 3 times and really trains: profile a copy of what you want to keep.

    Args:
        step: one whole training step, ``optimizer.zero_grad()`` included.
        model: adapted by igulora, by PEFT's LoRA or AdaLoRA, or by layers built like theirs. What it does beyond them (a regulariser,
            scores) is told apart for igulora's controller and PEFT's AdaLoRA; elsewhere mark it with :func:`igulora.measure.parts.part`.
        optimizer: needed only where it is no ``torch.optim.Optimizer``.
        controller: the ``igulora.Controller`` of the loop. Before every run of the step and at the end it is put back to where it was, so
            that each run is the same kind of step: with or without path rows, scores and an allocation.
        before: called before every run; brings other loops to the kind of step that is wanted.
        warmup: runs that are not measured; the first ones allocate.
        adapted: False for a model without adapters (a frozen floor, full fine-tuning).
        title: for tables and pictures; the model's class by default.
        trace: file for a Chrome trace (chrome://tracing, Perfetto), ``.json`` or ``.json.gz``, with a row of the parts as ranges.

    Raises:
        ValueError: the model has no adapters (and ``adapted``), is compiled, or ``warmup`` is negative.
    """
    if warmup < 0:
        raise ValueError(f"expected warmup >= 0 runs, got {warmup}")
    if adapted and not adapted_layers(model):
        raise ValueError(
            f"expected a model with adapters, got a plain {type(model).__name__}; adapt it with igulora.adapt or PEFT first, or say "
            "adapted=False to profile it as it is"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _same_kind(controller, before) as ready:
        for _ in range(warmup):
            ready()
            step()
        ready()
        wall = _seconds(step, device)
        ready()
        tracker = PartTracker(model, optimizer, mark=True)
        found, profiler = _profiled(step, tracker, device)
        if trace is not None:
            write_trace(profiler, found, Path(trace))
        ready()
        ledger = _Ledger(PartTracker(model, optimizer), device)
        with ledger.tracker, ledger.counting:
            step()
        ledger.settle()
    return _summary(title or type(model).__name__, device, wall, found, ledger)


@contextmanager
def _same_kind(controller: Any, before: Callable[[], object] | None) -> Iterator[Callable[[], None]]:
    """What brings the loop to the same kind of step before every run; the controller ends where it began."""
    kept = None if controller is None else controller.state_dict()

    def ready() -> None:
        if kept is not None:
            controller.load_state_dict(kept)
        if before is not None:
            before()

    try:
        yield ready
    finally:
        if kept is not None:
            controller.load_state_dict(kept)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profiled(step: Callable[[], object], tracker: PartTracker, device: torch.device) -> tuple[Attribution, profile]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    gc.collect()
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        with record_function("warm up the profiler"):  # its first range takes a millisecond
            torch.zeros(1).add_(1)
        with tracker, record_function(STEP):
            step()
        _wait(device)
    return attribute(profiler.events(), tracker), profiler


class _Ledger:
    """Counts by part, path rows' share of mixed batches split off: of bytes and FLOPs, since such rows take no launch of their own."""

    def __init__(self, tracker: PartTracker, device: torch.device) -> None:
        self.tracker = tracker
        self.counting = Counting(self._part, device)
        self.costs: dict[str, Cost] = {}
        self._settled: dict[str, Cost] = {}
        self._share = 0.0

    def _part(self) -> str:
        state = self.tracker.state()
        if state.share != self._share:
            self.settle()
            self._share = state.share
        return state.part

    def settle(self) -> None:
        """Book what was counted since the share of path rows last changed."""
        for part, cost in self.counting.costs.items():
            old = self._settled.get(part, Cost())
            new = [a - b for a, b in zip(_numbers(cost), _numbers(old), strict=True)]
            path = [0, *(round(n * self._share) for n in new[1:])] if 0 < self._share < 1 else [0, 0, 0, 0]
            self._book(part, [a - b for a, b in zip(new, path, strict=True)])
            self._book(PATH, path)
        self._settled = dict(self.counting.costs)

    def _book(self, part: str, numbers: list[int]) -> None:
        self.costs[part] = self.costs.get(part, Cost()) + Cost(*numbers)


def _numbers(cost: Cost) -> tuple[int, int, int, int]:
    return cost.launches, cost.read, cost.written, cost.flops


def _summary(title: str, device: torch.device, wall: float, found: Attribution, ledger: _Ledger) -> StepProfile:
    on_device = device.type == "cuda"
    parts = {}
    for name in PARTS:
        host, cost = found.host.get(name, 0.0), ledger.costs.get(name, Cost())
        parts[name] = PartCost(
            seconds=found.device.get(name, 0.0) if on_device else host,
            host_seconds=host,
            launches=cost.launches,
            read=cost.read,
            written=cost.written,
            flops=cost.flops,
            syncs=ledger.counting.syncs_by_part.get(name, 0),
            kernels=found.kernels.get(name, 0),
            waits=found.waits.get(name, 0),
        )
    operators = {
        name: tuple(OperatorTime(operator, calls, seconds) for operator, (calls, seconds) in found.dearest(name))
        for name in PARTS
    }
    where = torch.cuda.get_device_name(device) if on_device else _cpu()
    notes = _notes(wall, found, on_device)
    return StepProfile(title, where, parts, wall, found.step_seconds, found.unattributed, operators, notes)


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _notes(wall: float, found: Attribution, on_device: bool) -> tuple[str, ...]:
    kind = "time of the kernels launched from each part" if on_device else "CPU self time of each part, Python included"
    notes = [
        f"Time: {kind}. The step takes {1e3 * wall:.1f} ms undisturbed and {1e3 * found.step_seconds:.1f} ms under the profiler."
    ]
    if found.shares:
        shares = ", ".join(f"{share:.1%}" for share in sorted(found.shares))
        notes.append(
            f"Path rows ran in the training batch: their share of its rows ({shares}) counts as path pass in time, bytes and FLOPs of "
            "every part of the forward and backward; they take no launch of their own."
        )
    if found.fused_base:
        notes.append(
            "Kernels that add the rank term inside the base product count as base products, the rank term's time included."
        )
    if found.unattributed > 0:
        notes.append(
            f"{1e3 * found.unattributed:.2f} ms could not be attributed (a graph made before the step, or in another thread); "
            "counted under rest."
        )
    return tuple(notes)
