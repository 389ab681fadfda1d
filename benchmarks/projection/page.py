"""Writes the record of projections and their checks, and the page of tables made from it.

python -m igulora.benchmarks.projection.page            # minutes: projects every frozen model, runs the checks, writes record and page
python -m igulora.benchmarks.projection.page --render   # only the page, from the newest record
python -m igulora.benchmarks.projection.page --check    # exit code 1 if the page is not what the newest record renders to
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from typing import Any

from igulora.files import write_json
from igulora.measure.roofline import PROJECTION, Roofline, card

from ..cases import Case
from ..machine import RESULTS, machine, versions
from ..methods import quiet_peft
from ..pages import table
from ..record import newest, newest_of
from .checks import FIGURES, against_record, validate
from .project import project
from .shapes import frozen

FOLDER = RESULTS / "projection"
PAGE = FOLDER / "README.md"
FORMAT = 1
CARD = "H100"
OTHER_CARDS = ("A100", "H200", "L40", "L40S", "4090")
OTHER_MODEL = "llama-3-8b"
ROWS, LENGTH, RANK = 4, 512, 32


def _say(text: str) -> None:
    print(text, flush=True)


def make(models: list[str], checked: tuple[str, ...]) -> dict[str, Any]:
    """Project, check, and put it into one record."""
    projections = []
    for name in models:
        shape = frozen()[name]
        for of in (CARD, *(OTHER_CARDS if name == OTHER_MODEL else ())):
            _say(f"{shape.title} on {of}")
            case = Case(name, name, ROWS, LENGTH, RANK, RANK // 2)
            projections.append(project(shape, case, Roofline(card=card(of))))
    _say("checks on models with weights")
    checks = validate(checked)
    _say("against the newest record of a card")
    steps = newest_of(RESULTS / "gpu", "steps")
    records = [] if steps is None else [against_record(steps)]
    return {
        "format": FORMAT,
        "what": PROJECTION,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "projections": projections,
        "checks": checks,
        "cards": records,
    }


# -- the page ---------------------------------------------------------------------------------------------------------


def _ratio(entry: dict[str, Any], other: str) -> str:
    return f"{entry['over'][other]:.2f}" if other in entry["over"] else "–"


def _percent(error: float) -> str:
    """A relative error; what is equal says so."""
    return "0" if error == 0 else f"{100 * error:+.2g}%"


def comparison(made: dict[str, Any]) -> str:
    """The table of one model on one card."""
    rows = []
    for entry in made["methods"].values():
        mean = entry["mean"]
        rows.append(
            [
                entry["title"],
                f"{mean['launches']:,.0f}",
                f"{mean['syncs']:,.0f}",
                f"{(mean['read'] + mean['written']) / 1e9:,.1f}",
                f"{mean['flops'] / 1e12:,.2f}",
                f"{1e3 * mean['device_s']:,.1f}",
                f"{1e3 * mean['host_s']:,.1f}",
                f"{1e3 * mean['step_s']:,.1f}",
                *(_ratio(entry, other) for other in ("floor", "peft-lora", "peft-adalora")),
            ]
        )
    header = ["method (projected)", "launches", "syncs", "GB", "TFLOP", "device, ms", "host, ms", "step, ms"]
    return table([*header, "over floor", "over PEFT LoRA", "over PEFT AdaLoRA"], rows)


def _rule(roofline: dict[str, Any]) -> str:
    on = roofline["card"]
    return (
        f"{on['name']}: {on['bandwidth']} TB/s, {on['rate']} TFLOP/s dense bf16 of which products sustain {roofline['sustained']:.0%}, "
        f"{1e6 * roofline['launch_s']:g} µs for each launch on the device, {1e6 * roofline['host_s']:g} µs for each on the host, "
        f"{1e6 * roofline['sync_s']:g} µs for each wait."
    )


def _counted(checks: dict[str, Any]) -> list[str]:
    lines = []
    for model, entry in checks.items():
        rows = []
        for method, kinds in entry["counted"].items():
            for kind, found in kinds.items():
                differ = "; ".join(f"`{k}` {a} for {b}" for k, (a, b) in found["operators_that_differ"].items())
                counted = found["counted"]
                errors = [_percent(found["error"][key]) for key in FIGURES]
                rows.append(
                    [
                        f"`{method}`, {kind}",
                        f"{counted['launches']:,}",
                        f"{counted['syncs']:,}",
                        *errors,
                        differ or "none",
                    ]
                )
        header = ["method, kind of step", "launches counted", "syncs counted", *(f"error of {key}" for key in FIGURES)]
        lines += [f"### {model}, case {entry['case']}", "", table([*header, "calls that differ"], rows)]
    return lines


def _pytorch(checks: dict[str, Any]) -> list[str]:
    rows = []
    for entry in checks.values():
        for method, found in entry.get("pytorch", {}).items():
            differ = "; ".join(f"`{k}` {a} for {b}" for k, (a, b) in found["operators_that_differ"].items())
            figures = [found[k] for k in ("calls", "calls_by_profiler", "product_flops", "product_flops_by_profiler")]
            figures += [found[k] for k in ("flops", "flops_by_counter")]
            rows.append([f"`{method}`, {found['kind']}", *(f"{n:,}" for n in figures), differ or "none"])
    header = ["method, kind of step", "calls", "by profiler", "FLOPs of mm, bmm, addmm", "by profiler"]
    return [table([*header, "with attention", "by FlopCounterMode", "operators that differ"], rows)]


_OVER = "over floor, projected for measured"
GRAPHS = ("device projected, ms", "CUDA graph measured, ms", "error", _OVER)
EAGER = ("step projected, ms", "eager measured, ms", "error", _OVER, "eager µs per launch")


def _cards(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for made in records:
        rows = []
        for method, row in made["methods"].items():
            graphs = ["–"] * 3
            if "graphs" in row:
                graphs = [f"{1e3 * row['graphs']:.1f}", _percent(row["graphs_error"])]
                graphs.append(f"{row['graphs_over_floor_projected']:.2f} for {row['graphs_over_floor']:.2f}")
            eager = ["–"] * 4
            if "eager" in row:
                eager = [f"{1e3 * row['eager']:.1f}", _percent(row["eager_error"])]
                eager.append(f"{row['eager_over_floor_projected']:.2f} for {row['eager_over_floor']:.2f}")
                eager.append(f"{1e6 * row['eager_s_per_launch']:.0f}")
            rows.append([f"`{method}`", f"{1e3 * row['device_s']:.1f}", *graphs, f"{1e3 * row['step_s']:.1f}", *eager])
        case = made["case"]
        lines += [
            f"{made['model']}, {case['rows']}×{case['length']} tokens, r = {case['rank']}, {made['card']}, measured in "
            f"[{made['record']}](../gpu/{made['record'].replace('.json', '.md')}). {_rule(made['roofline'])}",
            "",
            table(
                ["method", *GRAPHS, *EAGER],
                rows,
            ),
        ]
    return lines


HOW = """\
Every method takes its own training step on the meta device, where tensors have shapes and no values. Counters note the launches of
kernels (a lower bound: an operator of PyTorch counts as one), waits for the device, bytes that must move and FLOPs of products. The rule of
the roofline: a call takes the longer of its bytes over the bandwidth and its FLOPs over the sustained rate, and a fixed time for each
launch; a step takes the longer of that sum and of the host's time for its launches, and the waits. Weights are bf16, all linear layers of
the blocks are adapted, heads are frozen; attention is a fused kernel. A method with several kinds of step is averaged over them."""
COUNTED = """\
Steps on the meta device, extrapolated from models of one and two layers, against the same steps of the whole model with weights, counted
as they ran on this machine's CPU. The tiny model's rotary frequencies were cast to bf16 with its weights, which makes one copy more.
The release compares scores on the host until they are sorted: projected are comparisons of shuffled numbers that differ, while few steps
leave scores of 16 bits that are partly equal or in order, which Python's sort sees sooner."""
COUNTERS = """\
A real step of the tiny model: calls of operators that no other operator made, by torch.profiler, and FLOPs by it and by
torch.utils.flop_counter. What igulora's operators compute inside is left out on all sides. `add_` counts as `add`."""
ON_CARDS = """\
The device's time against the same step replayed as a CUDA graph, and the whole step against eager steps. No constant was fitted to these
errors. What a host takes per launch is its own, and more where Python works between launches: `--host-cost` takes what was measured."""


def render(record: dict[str, Any]) -> str:
    """The page."""
    place, packages = record["machine"], record["versions"]
    made_with = ", ".join(f"{k} {packages[k]}" for k in ("torch", "triton", "transformers", "peft") if k in packages)
    lines = [
        "# Projections, not measurements",
        "",
        "Made by `python -m igulora.benchmarks.projection.page`; nothing here is typed by hand, and no time in the tables of models was",
        "measured. `igulora project MODEL` makes such a table for any model and card.",
        f"{record['date']}, Python {place['python']}, {made_with}, commit {packages['commit']}.",
        "",
        HOW,
        "",
    ]
    for made in record["projections"]:
        model, case = made["model"], made["case"]
        lines += [
            f"## {model['title']} on {made['roofline']['card']['name']}",
            "",
            f"A {made['what']}. {case['rows']}×{case['length']} tokens, r = {case['rank']}, {model['layers']} layers. "
            + _rule(made["roofline"]),
            "",
            comparison(made),
        ]
        skipped = [f"`{name}`: {why}" for name, why in made["skipped"].items()]
        lines += ["Not projected: " + "; ".join(skipped) + ".", ""] if skipped else []
    lines += ["## Projected against counted", "", COUNTED, "", *_counted(record["checks"])]
    lines += ["## Counters against PyTorch's own", "", COUNTERS, "", *_pytorch(record["checks"])]
    lines += ["## Projected against measured on a card", "", ON_CARDS, "", *_cards(record["cards"])]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Make the record and the page, or only the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--render", action="store_true", help="only the page, from the newest record")
    parser.add_argument("--check", action="store_true", help="say whether the page is up to date")
    options = parser.parse_args(arguments)
    if options.check:
        current = PAGE.read_text(encoding="utf-8") == render(json.loads(newest(FOLDER).read_text(encoding="utf-8")))
        print(
            "up to date"
            if current
            else f"{PAGE.name} is out of date: run python -m igulora.benchmarks.projection.page --render"
        )
        return int(not current)
    if not options.render:
        with quiet_peft():
            record = make(list(frozen()), ("tiny", "smollm2-135m"))
        write_json(FOLDER / f"{record['date']}.json", record)
    PAGE.write_text(render(json.loads(newest(FOLDER).read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
