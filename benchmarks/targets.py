"""The design's targets beside what the committed records say: steps on the CPU, and what other studies found."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from igulora.measure.roofline import PROJECTION

from .cases import MEMORY, TARGETS, Target
from .fidelity.choice import ALLOWED, DEFAULT_MEASURE, WANTED, choose
from .fidelity.page import FOLDER as FIDELITY
from .fidelity.page import read as read_fidelity
from .machine import RESULTS
from .pages import table
from .ratios import quartiles
from .record import agreement, newest, newest_of, read

REPEAT = RESULTS / "repeat"
_DRAWS = 5_000


def figure(result: dict[str, Any], target: Target) -> dict[str, float] | None:
    """A target's measured value: ``median``, and ``q1``, ``q3`` where it was repeated; None if not measured."""
    kind, _, what = target.key.partition(":")
    if kind == "ratio":
        return result["ratios"].get(what)
    if kind == "memory":
        ours, _, theirs = what.partition("/")
        memory = result.get("memory", {})
        return {"median": memory[ours]["peak"] / memory[theirs]["peak"]} if {ours, theirs} <= set(memory) else None
    counts = result.get("counts", {}).get("instantaneous")
    return {"median": counts["bookkeeping" if what == "launches" else what]} if counts else None


def cell(value: dict[str, float] | None, limit: float | None) -> str:
    """A measured value, with its spread, and by how much it misses the target if it does."""
    if value is None:
        return "not measured"
    median = value["median"]
    missed = limit is not None and median > limit
    if isinstance(median, int):
        return f"{median}, missed" if missed else f"{median}"
    text = f"{median:.2f}" + (f" [{value['q1']:.2f}–{value['q3']:.2f}]" if "q1" in value else "")
    return f"{text}, missed by {100 * (median / limit - 1):.0f}%" if missed else text


def shape(result: dict[str, Any]) -> str:
    """Batch shape, as a column title."""
    return f"{result['case']['rows']}×{result['case']['length']}"


def steps(record: dict[str, Any]) -> str:
    """Targets of whole steps beside what was measured."""
    rows = [
        [
            t.what,
            "–" if t.limit is None else f"≤ {t.limit:g}",
            *(cell(figure(result, t), t.limit) for result in record["results"]),
        ]
        for t in TARGETS
    ]
    return table(["what", "target", *(shape(r) for r in record["results"])], rows)


@dataclass(frozen=True)
class Finding:
    """One target of another study: what was found, whether that meets it, and the page that says more."""

    what: str
    target: str
    found: str
    met: bool | None
    page: str


def fidelity() -> list[Finding]:
    """Agreement with the exact integral of the settings that the rule picks among those that sample the path."""
    target, page = f"≥ {WANTED:g} at ≤ {100 * ALLOWED:.0f}% extra time", "results/fidelity/README.md"
    found = []
    for measure, name in (
        (DEFAULT_MEASURE, "the score that allocation ranks by"),
        ("sensitivity", "one window's sensitivity"),
    ):
        what = f"path estimator: top-b agreement with the exact integral, by {name}"
        choice = choose(read_fidelity(FIDELITY), measure, path_only=True)
        if choice is None:
            found.append(Finding(what, target, "not measured", None, page))
            continue
        how = "extra time" if choice.timed else "extra sequences"
        text = f"{choice.agreement:.3f} at {100 * choice.cost:.1f}% {how} ({choice.key})"
        found.append(Finding(what, target, text, choice.reached, page))
    return found


def compiled() -> Finding:
    """The rules that compiled kernels are held to."""
    records = [json.loads(f.read_text(encoding="utf-8")) for f in sorted((RESULTS / "compile").glob("*.json"))]
    broken = sum(len(record["breaches"]) for record in records)
    versions = ", ".join(record["versions"]["triton"] for record in records)
    count = sum(len(record["rows"]) for record in records)
    return Finding(
        "every Triton kernel, sm_80 to sm_120: no spills, dots on tensor cores, 16-byte accesses",
        "no rule broken",
        f"{broken} broken in {count:,} compilations (Triton {versions})",
        broken == 0 if records else None,
        "results/compile/README.md",
    )


def traffic() -> Finding:
    """What the fused kernels of a layer move, as a share of its base product's time: the worst of the cards."""
    from . import traffic_page as page  # asks the kernels for their tiles, so it needs Triton

    worst = {way: max(page.totals(c, "pointers", 1, partial=False)[way] for c in page.CARDS) for way in page.LIMITS}
    return Finding(
        f"{PROJECTION}: adapter traffic per layer over one base product, forward / backward, {page.M} tokens, {page.WIDTH}²",
        " / ".join(f"≤ {100 * limit:.0f}%" for limit in page.LIMITS.values()),
        " / ".join(f"{100 * value:.1f}%" for value in worst.values()) + f" (the worst of {len(page.CARDS)} cards)",
        all(worst[way] <= limit for way, limit in page.LIMITS.items()),
        "../kernels/README.md",
    )


def repeated() -> list[Finding]:
    """Whether a second run of the newest record's cases says the same."""
    if not any(REPEAT.glob("*.json")):
        return []
    try:
        again = read(newest(REPEAT))
        rows = agreement(read(newest(RESULTS)), again)
    except ValueError:  # of another machine: nobody has repeated the newest
        return []
    agreeing = sum(row["agrees"] for row in rows)
    apart = max(abs(row["now"]["median"] / row["before"]["median"] - 1) for row in rows)
    share, wanted = agreeing / len(rows), by_chance(again["results"][0]["rounds"])
    text = f"{agreeing} of {len(rows)} ratios ({100 * share:.0f}%); medians at most {100 * apart:.0f}% apart"
    what = "a second run agrees: share of ratios whose quartiles meet, as often as those of two samples of one distribution"
    return [Finding(what, f"≥ {100 * wanted:.0f}%", text, share >= wanted, "results/repeat")]


def by_chance(rounds: int) -> float:
    """How often the quartiles of two samples of ``rounds`` values from one normal distribution meet."""
    generator = random.Random(0)
    met = 0
    for _ in range(_DRAWS):
        a, b = (quartiles([generator.gauss(0, 1) for _ in range(rounds)]) for _ in range(2))
        met += a["q1"] <= b["q3"] and b["q1"] <= a["q3"]
    return met / _DRAWS


def scaling() -> list[Finding]:
    """How the cost of scoring and allocation grows."""
    from .scaling import page as curves  # draws, too

    if not any(curves.FOLDER.glob("*.json")):
        return []
    record = read(newest(curves.FOLDER))
    last, grown = record["allocation"][-1], curves.growth(record["allocation"])
    flat = max(curves.spread(record["scoring"], key) for key in ("scores_s", "orthogonality_s"))
    return [
        Finding(what, f"≤ {limit:g}", f"{value:.2f}", value <= limit, "results/scaling/README.md")
        for what, limit, value in (
            (
                f"allocation of {last['triplets']:,} triplets on the CPU, s",
                curves.ALLOCATION_LIMIT,
                last["seconds"]["median"],
            ),
            ("its growth from 10⁴ triplets on, over that of n log n", curves.GROWTH_LIMIT, grown),
            ("scoring for each parameter, 10⁶ parameters and more, dearest over cheapest", curves.FLAT_LIMIT, flat),
        )
    ]


class _GpuRecord:
    """The newest GPU record that holds a part of the suite.

    Attributes:
        items: of the part; empty where there is no record. device: its name. page: of the record.
    """

    def __init__(self, part: str) -> None:
        file = newest_of(RESULTS / "gpu", part)
        self.items: dict[str, Any] = {}
        if file is not None:
            record = json.loads(file.read_text(encoding="utf-8"))
            self.items = record["parts"][part]["items"]
            self.device, self.page = record["environment"]["machine"]["name"], f"results/gpu/{file.stem}.md"

    def finding(self, what: str, value: dict[str, float], limit: float) -> Finding:
        """A measured value that has a limit."""
        text = cell(value, limit)
        return Finding(f"{self.device}: {what}", f"≤ {limit:g}", text, "missed" not in text, self.page)


def on_a_gpu() -> list[Finding]:
    """Whole steps on the newest records: eager on both batches, as CUDA graphs where both were captured, compiled; memory; layers."""
    steps, compiled_models = _GpuRecord("steps"), _GpuRecord("compiled")
    found = []
    for name, title, limit in (("peft-adalora", "PEFT AdaLoRA", 0.6), ("peft-lora", "PEFT LoRA", 0.9)):
        for record, item, how in (
            (steps, "eager", "eager"),
            (steps, "eager, long", "eager"),
            (steps, "graphs", "as a CUDA graph"),
            (compiled_models, "compiled", "both compiled"),
        ):
            ratio = record.items.get(item, {}).get("ratios", {}).get(f"instantaneous/{name}")
            if ratio is not None:
                case = record.items["methods"]["case"]
                rows, length = record.items[item].get("batch", (case["rows"], case["length"]))
                found.append(record.finding(f"whole step over {title}, {rows}×{length} tokens, {how}", ratio, limit))
    return found + _gpu_memory(steps) + _lorafusion(_GpuRecord("layers"))


def _gpu_memory(record: _GpuRecord) -> list[Finding]:
    """Peaks of steps beyond the frozen model, of both batches, without path rows and with them."""
    found = []
    for name, title in (("instantaneous", "a step"), ("default", "a step with path rows")):
        for item in ("eager", "eager, long"):
            eager = record.items.get(item, {})
            memory = eager.get("memory", {})
            if {name, "peft-adalora"} <= set(memory):
                rows, length = eager["batch"]
                what = f"peak memory of {title} beyond the frozen model, over PEFT AdaLoRA's, {rows}×{length} tokens"
                value = {"median": memory[name]["peak"] / memory["peft-adalora"]["peak"]}
                found.append(record.finding(what, value, MEMORY))
    return found


def _lorafusion(record: _GpuRecord) -> list[Finding]:
    variants = next(iter(record.items.values()), {}).get("variants", {})
    if "skipped" not in variants.get("LoRAFusion", {}):
        return []
    what = f"{record.device}: over LoRAFusion's layer"
    return [Finding(what, "≤ 1", "not measured (not installed there)", None, record.page)]


def others() -> str:
    """Targets that other records speak of."""
    rows = []
    for finding in (*repeated(), *fidelity(), *scaling(), compiled(), traffic(), *on_a_gpu()):
        verdict = "–" if finding.met is None else "met" if finding.met else "missed"
        rows.append([finding.what, finding.target, finding.found, verdict, f"[page]({finding.page})"])
    return table(["what", "target", "found", "", ""], rows)
