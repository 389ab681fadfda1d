"""What a training step of each method would cost on a model and a card that are not here: a projection, not a measurement.

The methods are those that are timed, each on the meta device (``meta.py``): counters note launches, waits, bytes and FLOPs of a step of
each kind, and a roofline makes a time of them (``igulora/measure/roofline.py``). Where the blocks of a model are alike, two shallow
models say what each block adds, and what does not grow evenly is worked out for the full depth; else all blocks are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from igulora.errors import check_choice, first_line
from igulora.measure.costs import Cost, multi_tensor_launches
from igulora.measure.counting import Counting, MultiTensor
from igulora.measure.operators import Architecture
from igulora.measure.roofline import PROJECTION, Roofline

from ..cases import Case
from ..methods import METHODS, Method
from .meta import MetaDevice, comparisons_of_a_sort
from .shapes import WORKING, Shape, linears_of

DEFAULTS = ("floor", "instantaneous", "default", "peft-lora", "peft-dora", "peft-adalora", "release")
DEPTHS = (1, 2)
# What ratios are taken to.
OVER = ("floor", "peft-lora", "peft-adalora")


@dataclass(frozen=True)
class StepCount:
    """What one step costs.

    Attributes:
        cost: launches of kernels, bytes, FLOPs.
        syncs: waits, by operator.
        calls: how often each cost occurs.
        operators: calls by operator, one of igulora's counting once.
        multi_tensor: calls whose launches do not grow evenly with the depth.
        comparisons: of two scalars of the device, by the host: a sort's, which do not grow evenly either.
        triplets: of all adapted matrices.
    """

    cost: Cost
    syncs: Counter[str]
    calls: Counter[Cost]
    operators: Counter[str] = field(default_factory=Counter)
    multi_tensor: tuple[MultiTensor, ...] = ()
    comparisons: int = 0
    triplets: int = 0

    @classmethod
    def of(cls, counting: Counting, comparisons: int = 0, triplets: int = 0) -> StepCount:
        """What was counted."""
        calls: Counter[Cost] = Counter()
        for (_, _, cost), count in counting.calls.items():
            calls[cost] += count
        operators, lists = Counter(counting.launches), tuple(counting.multi_tensor)
        return cls(counting.total, Counter(counting.syncs), calls, operators, lists, comparisons, triplets)

    def device_seconds(self, roofline: Roofline) -> float:
        """By the roofline."""
        return roofline.device_time(self.calls)


@dataclass(frozen=True)
class Projected:
    """One kind of step of the whole model: counts, and the time that a roofline makes of them.

    Attributes:
        share: of all steps of the method.
        device_s, host_s, step_s: seconds, by the rule of ``roofline.py``.
    """

    share: float
    cost: Cost
    syncs: dict[str, int]
    device_s: float
    host_s: float
    step_s: float


def count_steps(
    name: str, shape: Shape, case: Case, layers: int, where: Architecture, **changes: Any
) -> dict[str, tuple[float, StepCount]]:
    """One step of each kind of a method on the meta device: its share among all steps, and what it costs.

    Raises:
        ValueError: the model's step depends on values, or see :func:`linears_of`.
    """
    try:
        return _counted(name, shape, case, layers, where, **changes)
    except NotImplementedError as error:
        raise ValueError(
            f"expected a model whose step can run without values, got {shape.title}: {first_line(error)}; {WORKING}"
        ) from error


def _counted(
    name: str, shape: Shape, case: Case, layers: int, where: Architecture, **changes: Any
) -> dict[str, tuple[float, StepCount]]:
    with MetaDevice() as device:
        method = _method(name, shape, case, layers, **changes)
        small, batch = shape.batch(case.rows, 8), shape.batch(case.rows, case.length)
        method.prepare(small)
        found = {}
        for kind, share in method.kinds().items():
            method.seek(kind, small)
            before = device.comparisons
            with Counting(device="meta", where=where) as counting:
                method.step(batch)
            triplets = case.rank * layers * len(method.case.targets)
            found[kind] = (share, StepCount.of(counting, device.comparisons - before, triplets))
    return found


def _method(name: str, shape: Shape, case: Case, layers: int, **changes: Any) -> Method:
    torch.manual_seed(0)
    model = shape.build(layers, **changes)
    adapted = Case(
        case.name, case.model, case.rows, case.length, case.rank, case.target_rank, targets=linears_of(model)
    )
    return METHODS[name](model, adapted)


# -- from two depths to all -------------------------------------------------------------------------------------------


def grown(first: Sequence[Any], second: Sequence[Any], times: int) -> list[Any]:
    """The sequence whose beginnings are ``first`` and, with one block more, ``second``, with ``times`` blocks more than the first.

    Raises:
        ValueError: the second is not the first with a block put in.
    """
    added = len(second) - len(first)
    for at in range(len(first) + 1):
        if added >= 0 and list(second[:at]) == list(first[:at]) and list(second[at + added :]) == list(first[at:]):
            return [*first[:at], *list(second[at : at + added]) * times, *first[at:]]
    raise ValueError(f"expected {len(second)} entries that are the first {len(first)} with a block put in, got others")


def extrapolated(
    first: StepCount, second: StepCount, more: int, roofline: Roofline
) -> tuple[Cost, Counter[str], float]:
    """Cost, waits and device's seconds with ``more`` blocks more than the first, of which the second has one more."""

    def straight(a: float, b: float) -> Any:
        return a + (b - a) * more

    pairs = list(zip(first.multi_tensor, second.multi_tensor, strict=True))
    exact = sum(multi_tensor_launches(grown(a.sizes, b.sizes, more), a.lists) for a, b in pairs)
    even = [sum(m.launches for m in count.multi_tensor) for count in (first, second)]
    uneven = exact - straight(*even)
    a, b = first.cost, second.cost
    cost = Cost(
        straight(a.launches, b.launches) + uneven,
        straight(a.read, b.read),
        straight(a.written, b.written),
        straight(a.flops, b.flops),
    )
    syncs = Counter({k: straight(first.syncs[k], second.syncs[k]) for k in {*first.syncs, *second.syncs}})
    device = straight(first.device_seconds(roofline), second.device_seconds(roofline)) + uneven * roofline.launch_s
    if first.comparisons:
        # One sort of all triplets: each comparison launches a kernel and waits.
        missing = comparisons_of_a_sort(straight(first.triplets, second.triplets)) - straight(
            first.comparisons, second.comparisons
        )
        cost += Cost(missing)
        syncs["aten::_local_scalar_dense"] += missing
        device += missing * roofline.launch_s
    return cost, syncs, device


def project_method(name: str, shape: Shape, case: Case, roofline: Roofline, **changes: Any) -> dict[str, Projected]:
    """Each kind of step of a method, of the whole model."""
    where, full = roofline.card.where, shape.layers
    depths = DEPTHS if full > DEPTHS[-1] and shape.even else (full,)
    counts = [count_steps(name, shape, case, layers, where, **changes) for layers in depths]
    result = {}
    for kind, (share, first) in counts[0].items():
        if len(counts) == 1:
            cost, syncs, device = first.cost, first.syncs, first.device_seconds(roofline)
        else:
            cost, syncs, device = extrapolated(first, counts[1][kind][1], full - DEPTHS[0], roofline)
        host = cost.launches * roofline.host_s
        step = roofline.step_time(device, cost.launches, sum(syncs.values()))
        result[kind] = Projected(share, cost, dict(syncs), device, host, step)
    return result


# -- a whole comparison -----------------------------------------------------------------------------------------------


def mean_of(kinds: dict[str, Projected]) -> dict[str, float]:
    """Averages over the kinds of step, by their share."""

    def mean(value: Callable[[Projected], float]) -> float:
        return sum(k.share * value(k) for k in kinds.values())

    return {
        "launches": mean(lambda k: k.cost.launches),
        "syncs": mean(lambda k: sum(k.syncs.values())),
        "read": mean(lambda k: k.cost.read),
        "written": mean(lambda k: k.cost.written),
        "flops": mean(lambda k: k.cost.flops),
        "device_s": mean(lambda k: k.device_s),
        "host_s": mean(lambda k: k.host_s),
        "step_s": mean(lambda k: k.step_s),
    }


def check_methods(names: Sequence[str]) -> None:
    """Raise ValueError for a name that no method has; the message names the nearest."""
    for name in names:
        check_choice("method", name, METHODS)


def project(
    shape: Shape,
    case: Case,
    roofline: Roofline,
    names: Sequence[str] = DEFAULTS,
    say: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> dict[str, Any]:
    """All methods on one model and card, as a record.

    Args:
        names: methods; of the defaults those that this version lacks are passed over.
        say: is told which method is under way.
        changes: of the model's configuration.

    Raises:
        ValueError: an unknown method.
    """
    names = [n for n in names if n in METHODS] if names == DEFAULTS else list(names)
    check_methods(names)
    methods: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in names:
        missing = METHODS[name].available()
        if missing is not None:
            skipped[name] = missing
            continue
        say(METHODS[name].title)
        kinds = project_method(name, shape, case, roofline, **changes)
        mean = mean_of(kinds)
        methods[name] = {
            "title": METHODS[name].title,
            "mean": mean,
            "kinds": {kind: _as_dict(step) for kind, step in kinds.items()},
        }
    for entry in methods.values():
        own = entry["mean"]["step_s"]
        entry["over"] = {other: own / methods[other]["mean"]["step_s"] for other in OVER if other in methods}
    return {
        "what": PROJECTION,
        "model": {"name": shape.name, "title": shape.title, "layers": shape.layers, "parameters": shape.parameters},
        "case": {"rows": case.rows, "length": case.length, "rank": case.rank, "target_rank": case.target_rank},
        "roofline": roofline.as_dict(),
        "methods": methods,
        "skipped": skipped,
    }


def _as_dict(step: Projected) -> dict[str, Any]:
    cost = step.cost
    return {
        "share": step.share,
        "launches": cost.launches,
        "syncs": step.syncs,
        "read": cost.read,
        "written": cost.written,
        "flops": cost.flops,
        "device_s": step.device_s,
        "host_s": step.host_s,
        "step_s": step.step_s,
    }
