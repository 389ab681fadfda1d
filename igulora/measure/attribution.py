"""From the events of torch's profiler to the parts of a step: which part each operator, and each kernel it launched, belongs to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch.autograd import DeviceType

from .parts import ADAPTER, BASE, REST, PartTracker, State, split
from .seams import adapter_parameters

STEP = "igulora: step"
UNATTRIBUTED = "unattributed"
PYTHON = "(Python between operators)"
_NODE = "autograd::engine::evaluate_function: "
_ACCUMULATE = "torch::autograd::AccumulateGrad"
# igulora's operators that hold the base product, and which of their inputs are the rows and the base weight.
_LAYERS = {"igulora::svd_linear_fwd": (0, 1), "igulora::svd_linear_bwd": (0, 3)}
_PRODUCTS = {"aten::mm": 1, "aten::addmm": 2, "aten::addmm_": 2}  # and their right operand
# Triton kernels (kernels/fused/gemm.py) that add the rank term in the base product's accumulator.
BASE_KERNELS = ("_gemm_rank_kernel", "_gemm_rank_descriptor_kernel")
_WAITS = {
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
    "hipStreamSynchronize", "hipDeviceSynchronize", "hipEventSynchronize", "hipMemcpy",
}  # fmt: skip


class Segment(NamedTuple):
    """A stretch of the step's thread, microseconds on the profiler's clock, in one state."""

    start: float
    end: float
    state: State


@dataclass
class Attribution:
    """What was found, times in seconds.

    Attributes:
        host, device: CPU self time and kernel time by part. kernels, waits: counts by part.
        step_seconds: of the step's range. unattributed: of both kinds of time, what "rest" holds because no part was found.
        operators: by part, calls and CPU self time by operator; the time of a part's own code under :data:`PYTHON`.
        shares: of path rows in mixed batches. fused_base: whether kernels did base product and rank term in one.
        segments: the step's thread as stretches of one state. events: state by the profiler's number of the operator.
    """

    host: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    device: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    kernels: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    waits: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    step_seconds: float = 0.0
    unattributed: float = 0.0
    operators: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)
    shares: set[float] = field(default_factory=set)
    fused_base: bool = False
    segments: list[Segment] = field(default_factory=list)
    events: dict[int, State] = field(default_factory=dict)

    def dearest(self, part: str) -> Iterator[tuple[str, tuple[int, float]]]:
        """Operators of a part with calls and seconds, dearest first."""
        yield from sorted(self.operators.get(part, {}).items(), key=lambda item: -item[1][1])


class _Context(NamedTuple):
    """What an event hands down to those inside of it: the state, and inside igulora's layers the operands (M, K) and (K, N) of the base
    product."""

    state: State
    product: tuple[tuple[int, ...], ...] = ()


def attribute(events: Iterable[Any], tracker: PartTracker) -> Attribution:
    """Split the range :data:`STEP` of a profile by part.

    Args:
        events: ``profiler.events()``, recorded with shapes while ``tracker`` (with ``mark=True``) was open.
    """
    return _Splitter(tracker).run(list(events))


class _Splitter:
    def __init__(self, tracker: PartTracker) -> None:
        self.tracker = tracker
        self.found = Attribution()
        adapters = adapter_parameters(tracker.model)
        ours = {id(p) for p in adapters}
        self._adapter_shapes = {tuple(p.shape) for p in adapters}
        # Shapes of gradients that are surely no adapter's.
        others = {tuple(p.shape) for p in tracker.model.parameters() if p.requires_grad and id(p) not in ours}
        self._other_shapes = others - self._adapter_shapes

    def run(self, events: list[Any]) -> Attribution:
        found = self.found
        step = next(e for e in events if e.name == STEP and e.device_type == DeviceType.CPU)
        found.step_seconds = step.cpu_time_total * 1e-6
        self._walk(step, _Context(State(REST)), main=True)
        on_main = sum(found.host.values())
        # On a GPU the backward runs in a thread of autograd's, while the step's own thread waits for it under "rest".
        for event in events:
            inside = step.time_range.start <= event.time_range.start < step.time_range.end
            if event.cpu_parent is None and event.thread != step.thread and inside and _on_cpu(event):
                self._walk(event, _Context(State(REST)), main=False)
        found.host[REST] -= min(sum(found.host.values()) - on_main, max(found.host[REST], 0.0))
        self._orphans(events)
        for times in (found.host, found.device):
            times[REST] += times.pop(UNATTRIBUTED, 0.0)
        for counts in (found.kernels, found.waits):
            counts[REST] += counts.pop(UNATTRIBUTED, 0)
        unattributed = found.operators.pop(UNATTRIBUTED, {})
        for name, (calls, seconds) in unattributed.items():
            self._operator(REST, name, calls, seconds)
        return found

    def _walk(self, event: Any, around: _Context, main: bool) -> None:
        context = self._context(event, around)
        self._book(event, context)
        cursor = event.time_range.start
        for child in sorted(event.cpu_children, key=lambda e: e.time_range.start):
            if main:
                self._segment(cursor, child.time_range.start, context.state)
            self._walk(child, context, main)
            cursor = child.time_range.end
        if main:
            self._segment(cursor, event.time_range.end, context.state)

    def _context(self, event: Any, around: _Context) -> _Context:
        name, state = event.name, around.state
        if name in self.tracker.names:
            return _Context(self.tracker.names[name])
        if name.startswith(_NODE):
            return _Context(self._node(event, name.removeprefix(_NODE), state))
        if name in _LAYERS:
            return _Context(state, _base_product(name, event.input_shapes or []))
        if around.product and state.share < 1 and _is_product(event, around.product):
            return _Context(State(BASE, state.share))
        return around

    def _node(self, event: Any, name: str, around: State) -> State:
        if around.share == 1.0:
            return around
        if name == _ACCUMULATE:
            shapes = {tuple(shape) for child in event.cpu_children for shape in child.input_shapes or [] if shape}
            return State(ADAPTER) if self._adapter_shapes and not shapes & self._other_shapes else State(REST)
        return self.tracker.made_in(event.sequence_nr) or State(UNATTRIBUTED)

    def _book(self, event: Any, context: _Context) -> None:
        found, state = self.found, context.state
        seconds = event.self_cpu_time_total * 1e-6
        found.events[event.id] = state
        if 0 < state.share < 1:
            found.shares.add(state.share)
        for part, share in split(seconds, state):
            found.host[part] += share
        name = PYTHON if event.name == STEP or event.name in self.tracker.names else event.name
        self._operator(state.part, name, 1, seconds)
        if state.part == UNATTRIBUTED:
            found.unattributed += seconds
        if event.name in _WAITS:
            found.waits[state.part] += 1
        if event.is_user_annotation:  # the span of a range on the device is no kernel
            return
        for kernel in event.kernels:
            of = state
            if context.product and kernel.name.startswith(BASE_KERNELS) and state.share < 1:
                of, found.fused_base = State(BASE, state.share), True
            found.kernels[of.part] += 1
            for part, share in split(kernel.duration * 1e-6, of):
                found.device[part] += share

    def _operator(self, part: str, name: str, calls: int, seconds: float) -> None:
        of_part = self.found.operators.setdefault(part, {})
        before = of_part.get(name, (0, 0.0))
        of_part[name] = (before[0] + calls, before[1] + seconds)

    def _segment(self, start: float, end: float, state: State) -> None:
        segments = self.found.segments
        if end <= start:
            return
        if segments and segments[-1].state == state:
            start = segments.pop().start
        segments.append(Segment(start, end, state))

    def _orphans(self, events: list[Any]) -> None:
        """Kernels that no operator of the step launched."""
        found = self.found
        annotations = {e.name for e in events if e.is_user_annotation}
        whole = sum(
            e.time_range.end - e.time_range.start for e in events if not _on_cpu(e) and e.name not in annotations
        )
        orphaned = whole * 1e-6 - sum(found.device.values())
        if orphaned > 1e-9:
            found.device[UNATTRIBUTED] += orphaned
            found.unattributed += orphaned


def _base_product(name: str, shapes: list[Any]) -> tuple[tuple[int, ...], ...]:
    """Both operands of the base product in a call of igulora's layer, or nothing where the base runs itself."""
    rows, weight = (tuple(shapes[i]) if i < len(shapes) else () for i in _LAYERS[name])
    if not rows or len(weight) != 2:
        return ()
    right = weight[::-1] if name.endswith("_fwd") else weight
    return (math.prod(rows[:-1]), rows[-1]), right


def _is_product(event: Any, operands: tuple[tuple[int, ...], ...]) -> bool:
    """Whether an operator multiplies these two: the rank is a dimension of every other product of a layer. (A rank as large as the layer
    itself would be mistaken.)"""
    at, shapes = _PRODUCTS.get(event.name), event.input_shapes or []
    return at is not None and at < len(shapes) and tuple(map(tuple, shapes[at - 1 : at + 1])) == operands


def _on_cpu(event: Any) -> bool:
    return event.device_type == DeviceType.CPU and not event.is_async
