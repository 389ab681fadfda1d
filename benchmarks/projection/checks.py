"""Whether projections can be believed: projected against counted, counters against PyTorch's own, and times against a card's record.

What is compared, each with its error: a step on the meta device, extrapolated from two depths, against the same step counted where it runs
with values; the counters against torch.profiler and torch.utils.flop_counter on a real step; and projected times against those measured on
an H100 (``results/gpu``). No constant is fitted to any of it.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from igulora.measure.costs import FLOPS
from igulora.measure.counting import Counting
from igulora.measure.operators import Architecture
from igulora.measure.roofline import Roofline, card

from ..cases import CASES, MODELS, Case
from ..methods import METHODS, Method
from ..models import load_model
from .project import DEFAULTS, StepCount, count_steps, extrapolated, project
from .shapes import Shape, linears_of

FIGURES = ("launches", "read", "written", "flops", "syncs")
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")


def shape_of(model: nn.Module, name: str) -> Shape:
    """The shape of a model that has weights."""
    return Shape(name, name, {**model.config.to_dict(), "architectures": [type(model).__name__]})


def _real(name: str, base: nn.Module, case: Case) -> tuple[Method, dict[str, Any], dict[str, Any]]:
    """A prepared method on a copy of the model, the batch, and the small one it was prepared with."""
    torch.manual_seed(0)
    adapted = Case(case.name, case.model, case.rows, case.length, case.rank, case.target_rank, targets=linears_of(base))
    method = METHODS[name](copy.deepcopy(base), adapted)
    shape = shape_of(base, case.model)
    small = shape.batch(case.rows, 8, "cpu")
    method.prepare(small)
    return method, shape.batch(case.rows, case.length, "cpu"), small


def _figures(count: StepCount | tuple[Any, Counter[str]]) -> dict[str, int]:
    cost, syncs = (count.cost, count.syncs) if isinstance(count, StepCount) else count
    values = (cost.launches, cost.read, cost.written, cost.flops, sum(syncs.values()))
    return dict(zip(FIGURES, values, strict=True))


def _error(projected: float, real: float) -> float:
    return projected / real - 1 if real else float(projected != real)


# -- projected against counted ----------------------------------------------------------------------------------------


def against_counted(base: nn.Module, case: Case, names: Iterable[str], where: Architecture) -> dict[str, Any]:
    """Every method and kind of step: projected from two depths, counted on the real model, relative error, and operators that differ."""
    shape = shape_of(base, case.model)
    result: dict[str, Any] = {}
    for name in names:
        shallow = [count_steps(name, shape, case, depth, where) for depth in (1, 2)]
        method, batch, small = _real(name, base, case)
        kinds = {}
        for kind in method.kinds():
            method.seek(kind, small)
            with Counting(where=where) as counting:
                method.step(batch)
            first, second = shallow[0][kind][1], shallow[1][kind][1]
            cost, syncs, _ = extrapolated(first, second, shape.layers - 1, Roofline())
            projected, counted = _figures((cost, syncs)), _figures(StepCount.of(counting))
            operators = Counter(
                {
                    k: _straight_line(first.operators[k], second.operators[k], shape.layers)
                    for k in {*first.operators, *second.operators}
                }
            )
            waits = "aten::_local_scalar_dense"
            operators["aten::lt"] += syncs[waits] - _straight_line(
                first.syncs[waits], second.syncs[waits], shape.layers
            )  # a sort's
            differ = {
                k: [operators[k], counting.launches[k]]
                for k in sorted({*operators, *counting.launches})
                if operators[k] != counting.launches[k]
            }
            kinds[kind] = {
                "projected": projected,
                "counted": counted,
                "error": {k: _error(projected[k], counted[k]) for k in FIGURES},
                "operators_that_differ": differ,
            }
        result[name] = kinds
    return result


def _straight_line(first: int, second: int, layers: int) -> int:
    return first + (second - first) * (layers - 1)


# -- counters against PyTorch's own -----------------------------------------------------------------------------------


class _Names(TorchDispatchMode):
    """Every operator that a dispatch mode sees, views and allocations with them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def _profiled(step: Callable[[], object], seen: set[str]) -> tuple[Counter[str], int]:
    """Calls by operator that no other operator made, and FLOPs of products, by torch.profiler."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, acc_events=True) as profiler:
        step()
    calls: Counter[str] = Counter()
    flops = 0
    for event in profiler.events():
        if event.name not in seen:
            continue
        parent = event.cpu_parent
        while parent is not None and parent.name not in seen:
            parent = parent.cpu_parent
        if parent is None:
            calls[event.name] += 1
            flops += event.flops if event.name in PRODUCTS and event.flops else 0
    return calls, flops


def against_pytorch(base: nn.Module, case: Case, names: Iterable[str]) -> dict[str, Any]:
    """Three real steps of each method: counted, profiled by torch.profiler, and under its FLOP counter."""
    result = {}
    for name in names:
        method, batch, small = _real(name, base, case)
        kind = method.dearest()

        def step(method: Method = method, kind: str = kind, small: Any = small) -> Callable[[], object]:
            method.seek(kind, small)
            return lambda: method.step(batch)  # noqa: B023 - called before the next turn

        run = step()
        with _Names() as names_seen:
            run()
        run = step()
        with Counting() as counting:
            run()
        calls, flops = _profiled(step(), {*names_seen.seen, "aten::add_"})
        run = step()
        attention = {
            getattr(torch.ops.aten, k.split("::")[1]): _for_counter(v) for k, v in FLOPS.items() if "flash" in k
        }
        with FlopCounterMode(display=False, custom_mapping=attention) as flop_counter:
            run()
        own = sum(cost.flops * n for (_, operator, cost), n in counting.calls.items() if operator in PRODUCTS)
        ours, theirs = _accumulations(counting.launches), _accumulations(calls)
        result[name] = {
            "kind": kind,
            "calls": sum(ours.values()),
            "calls_by_profiler": sum(theirs[k] for k in ours),
            "operators_that_differ": {k: [n, theirs[k]] for k, n in sorted(ours.items()) if n != theirs[k]},
            "product_flops": own,
            "product_flops_by_profiler": flops,
            "flops": _pytorch_flops(counting),
            "flops_by_counter": flop_counter.get_total_flops(),
        }
    return result


def _accumulations(calls: Counter[str]) -> Counter[str]:
    """With ``add_`` counted as ``add``: autograd adds two gradients in place only where no dispatch mode watches, at the same cost."""
    merged = Counter(calls)
    merged["aten::add"] += merged.pop("aten::add_", 0)
    return merged


def _for_counter(formula: Callable[..., int]) -> Callable[..., int]:
    """As FlopCounterMode calls it: with the result beside the arguments, and tensors for shapes where it is told so."""

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


def _pytorch_flops(counting: Counting) -> int:
    """Of operators that PyTorch's counter knows: neither igulora's nor products in place."""
    known = (*PRODUCTS, *(k for k in FLOPS if "flash" in k))
    return sum(cost.flops * n for (_, operator, cost), n in counting.calls.items() if operator in known)


# -- projected times against measured ---------------------------------------------------------------------------------


def against_record(file: Path) -> dict[str, Any]:
    """Step times that the suite measured on a card, eager and as a CUDA graph (the device's work alone), against those projected."""
    import transformers

    record = json.loads(file.read_text(encoding="utf-8"))
    steps = record["parts"]["steps"]["items"]
    name = record["environment"]["machine"]["name"]
    # As the suite measured it: attention asks for no mask.
    transformers.AttentionInterface.register("causal-sdpa", transformers.AttentionInterface()["sdpa"])
    told = {k: v for k, v in steps["methods"]["model"].items() if k not in ("parameters", "linears")}
    shape = Shape(file.stem, f"Llama of {steps['methods']['model']['parameters'] / 1e6:.0f}M parameters", told)
    measured = steps["methods"]["case"]
    case = Case(file.stem, shape.name, measured["rows"], measured["length"], measured["r"], measured["r"] // 2)
    names = [n for n in steps["eager"]["step"] if n in METHODS]
    roofline = Roofline(card=next(card(k) for k in ("H100", "H200", "A100", "L40S", "L40", "4090") if k in name))
    made = project(shape, case, roofline, names, attn_implementation="causal-sdpa")
    rows = {}
    for method, entry in made["methods"].items():
        mean = entry["mean"]
        row: dict[str, Any] = {key: mean[key] for key in ("launches", "device_s", "host_s", "step_s")}
        for kind, projected in (("graphs", mean["device_s"]), ("eager", mean["step_s"])):
            if method in steps[kind]["step"]:
                row[kind] = steps[kind]["step"][method]["median"]
                row[f"{kind}_error"] = projected / row[kind] - 1
        rows[method] = row
    floor = {kind: steps[kind]["step"]["floor"]["median"] for kind in ("eager", "graphs")}
    for row in rows.values():
        for kind, key in (("graphs", "device_s"), ("eager", "step_s")):
            if kind in row:
                row[f"{kind}_over_floor"] = row[kind] / floor[kind]
                row[f"{kind}_over_floor_projected"] = row[key] / rows["floor"][key]
        if "eager" in row:
            row["eager_s_per_launch"] = row["eager"] / row["launches"]
    facts = {key: made[key] for key in ("what", "case", "roofline")}
    return {"record": file.name, "card": name, "model": shape.title, **facts, "methods": rows}


def validate(models: Iterable[str] = ("tiny", "smollm2-135m"), names: Iterable[str] = DEFAULTS) -> dict[str, Any]:
    """All checks that need no card, on the suite's own models.

    Args:
        models: names of the registry's models; of each its shortest case is taken.
    """
    names = [n for n in names if n in METHODS and METHODS[n].available() is None]
    where = Roofline().card.where
    result: dict[str, Any] = {}
    for model in models:
        case = min((c for c in CASES.values() if c.model == model), key=lambda c: c.rows * c.length)
        base = load_model(MODELS[model])
        entry: dict[str, Any] = {"case": case.name, "counted": against_counted(base, case, names, where)}
        if model == "tiny":
            entry["pytorch"] = against_pytorch(base, case, names)
        result[model] = entry
    return result
