"""Writes the measured tables of README.md and benchmarks/README.md from the committed records, between markers.

python -m igulora.benchmarks.render                 # from the newest record in benchmarks/results
python -m igulora.benchmarks.render FILE.json       # several files of one machine are put together
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from igulora.measure.parts import ADAPTER

from . import targets
from .machine import RESULTS
from .pages import place, replace, table
from .record import merge, newest, read

MARKERS = ("<!-- benchmark:begin -->", "<!-- benchmark:end -->")
NOTHING = (
    "Nothing has been measured yet: `make bench` writes a record, `python -m igulora.benchmarks.render` this table.\n"
)
_KEYS = ("instantaneous", "default", "lean", "peft-lora", "peft-lora-16bit", "peft-dora", "peft-adalora", "release")


def setting(record: dict[str, Any]) -> str:
    """One paragraph: what was measured, on what, how."""
    case = record["results"][0]["case"]
    shapes = " and ".join(targets.shape(r) for r in record["results"])
    return (
        f"{case['model_title']}, all linears but the output head, r = {case['rank']}, {case['dtype']}, batches of "
        f"{shapes} tokens. {place(record)} Medians [quartiles] of {record['results'][0]['rounds']} paired ratios, methods "
        "interleaved in one process; PEFT with its defaults, fused AdamW for all. Floor: forward and input gradient "
        "of the frozen model.\n"
    )


def summary(record: dict[str, Any]) -> str:
    """The one table of README.md: time over the floor and peak memory of every method."""
    rows = []
    first = record["results"][0]
    for name in [name for name in _KEYS if name in first["methods"]]:
        row = [first["methods"][name]["title"]]
        for result in record["results"]:
            row.append(targets.cell(result["ratios"].get(f"{name}/floor"), None))
        for result in record["results"]:
            memory = result.get("memory", {})
            both = {name, "floor"} <= set(memory)
            row.append(f"{memory[name]['peak'] / memory['floor']['peak']:.2f}" if both else "–")
        rows.append(row)
    shapes = [targets.shape(r) for r in record["results"]]
    header = ["step over the floor", *(f"time, {s}" for s in shapes), *(f"peak memory, {s}" for s in shapes)]
    return f"{setting(record)}\n{table(header, rows)}"


def steps_table(result: dict[str, Any]) -> str:
    """Absolute step times, ratios to the floor, memory and launches of every method."""
    rows = []
    for name, method in result["methods"].items():
        if "error" in method:
            rows.append([method["title"], method["error"].partition(":")[0], *["–"] * 7])
            continue
        step, ratio = result["step"][name], result["ratios"].get(f"{name}/floor")
        memory, counts = result.get("memory", {}).get(name), result["counts"].get(name)
        rows.append(
            [
                method["title"],
                f"{step['median']:.3f} [{step['q1']:.3f}–{step['q3']:.3f}]",
                f"{ratio['median']:.2f} [{ratio['q1']:.2f}–{ratio['q3']:.2f}]" if ratio else "1",
                f"{memory['peak'] / 2**20:.0f}" if memory else "–",
                _held(memory) if memory else "–",
                f"{memory['saved'] / 2**20:.0f}" if memory else "–",
                *(f"{counts[key]:,.0f}" if counts else "–" for key in ("step", "bookkeeping", "syncs")),
            ]
        )
    memory_columns = ["peak, MiB", "held (optimizer, scores), MiB", "kept for backward, MiB"]
    header = ["method", "step, s", "over floor", *memory_columns, "launches", "of which bookkeeping", "syncs"]
    return table(header, rows)


def _held(memory: dict[str, int]) -> str:
    parts = ", ".join(f"{memory[key] / 2**20:.0f}" for key in ("optimizer", "scores"))
    return f"{memory['held'] / 2**20:.0f} ({parts})"


def kinds_table(result: dict[str, Any]) -> str:
    """Step times by kind of step, for methods that have several."""
    rows = [
        [f"`{name}`", kind, f"{share:.3f}", f"{result['step'][f'{name}:{kind}']['median']:.3f}"]
        for name, method in result["methods"].items()
        if len(method.get("kinds", ())) > 1 and "error" not in method
        for kind, share in method["kinds"].items()
    ]
    return table(["method", "kind of step", "share", "median, s"], rows) if rows else ""


def details(record: dict[str, Any]) -> str:
    """The text of benchmarks/README.md between its markers."""
    parts = [setting(record), targets.steps(record), "Other targets, each from its own record:\n", targets.others()]
    for result in record["results"]:
        parts += [f"### {targets.shape(result)} tokens\n", steps_table(result), kinds_table(result)]
    return "\n".join(part for part in (*parts, profiles(RESULTS / "profile"), probes(RESULTS / "probes")) if part)


def profiles(folder: Path) -> str:
    """Where a step's time goes, from every record of ``igulora profile`` in a folder."""
    out = []
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        options, found = record["options"], record["profiles"]
        names = [name for name in found[0]["parts"] if any(p["parts"][name]["seconds"] for p in found)]
        rows = [
            [
                p["title"],
                *(_ms(p["parts"][name]["seconds"]) for name in names),
                _ms(p["profiled_seconds"]),
                _ms(p["wall_seconds"]),
            ]
            for p in found
        ]
        head = (
            f"### Profile, {options['rows']}×{options['length']} tokens\n\n{place(record)} Milliseconds of one step by part, under the "
            "profiler (`igulora profile`), and of an undisturbed one; one step each, not paired.\n"
        )
        picture = (
            f"![parts](results/profile/{file.with_suffix('.png').name})\n" if file.with_suffix(".png").exists() else ""
        )
        out.append(
            f"{head}\n{table(['step', *names, 'sum', 'undisturbed'], rows)}\n{_adapter_operators(found)}\n{picture}"
        )
    return "\n".join(out)


_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


def _adapter_operators(found: list[dict[str, Any]]) -> str:
    """What adapter products are spent on: matrix products, other operators, and what runs between operators."""
    rows = []
    for profile in found:
        spent = dict.fromkeys(("products", "operators", "between"), 0.0)
        for operator in profile["operators"][ADAPTER]:
            aten = operator["name"].startswith("aten::")
            kind = "products" if operator["name"] in _PRODUCTS else "operators" if aten else "between"
            spent[kind] += operator["seconds"]
        if any(spent.values()):
            rows.append([profile["title"], *map(_ms, spent.values())])
    note = (
        "Of the adapter products: matrix products of rank r, all other operators (casts, copies, scalings), and what runs between "
        "operators (Python, autograd), which the profiler makes longer.\n"
    )
    return f"{note}\n{table(['step', 'matrix products', 'other operators', 'between operators'], rows)}" if rows else ""


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds else "–"


def probes(folder: Path) -> str:
    """What was tried beside the shipped CPU path, from the newest file of ``probes.py``; empty when there is none."""
    if not any(folder.glob("*.json")):
        return ""
    record = json.loads(newest(folder).read_text(encoding="utf-8"))
    rows = [
        [name, f"{p['ratio']:.2f} [{p['quartiles'][0]:.2f}–{p['quartiles'][1]:.2f}]", f"{p['reference_ms']:.2f}"]
        for name, p in record["probes"].items()
    ]
    head = (
        f"### Tried\n\n{record['date']}, {record['machine']['cpu']}, {record['threads']} threads; `probes.py` says what is compared. "
        "Medians [quartiles] of paired ratios of times, and the time of what it is compared with.\n"
    )
    return f"{head}\n{table(['what', 'ratio', 'compared with, ms'], rows)}"


def main(arguments: list[str] | None = None) -> int:
    """Render the newest record, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="records (default: the newest in benchmarks/results)")
    parser.add_argument(
        "--root", type=Path, default=RESULTS.parents[1], help="of the repository whose documents are written"
    )
    options = parser.parse_args(arguments)
    try:
        files = options.files or ([newest(RESULTS)] if any(RESULTS.glob("*.json")) else [])
        record = merge([read(file) for file in files]) if files else None
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    replace(options.root / "README.md", summary(record) if record else NOTHING, MARKERS)
    replace(options.root / "benchmarks" / "README.md", details(record) if record else NOTHING, MARKERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
