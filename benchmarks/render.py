"""Writes the measured tables of README.md and benchmarks/README.md from a committed result file, between markers.

python benchmarks/render.py                 # from the newest file in benchmarks/results
python benchmarks/render.py FILE.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from igulora.benchmarks.cases import TARGETS, Target
from igulora.benchmarks.pages import replace, table

HERE = Path(__file__).resolve().parent
MARKERS = ("<!-- benchmark:begin -->", "<!-- benchmark:end -->")
NOTHING = (
    "Nothing has been measured yet: `make bench` writes a result file, `python benchmarks/render.py` this table.\n"
)


def figure(result: dict[str, Any], target: Target) -> dict[str, float] | None:
    """A target's measured value: ``median``, and ``q1``, ``q3`` where it was repeated; None if not measured."""
    kind, _, what = target.key.partition(":")
    if kind == "ratio":
        return result["ratios"].get(what)
    if kind == "memory":
        ours, _, theirs = what.partition("/")
        memory = result.get("memory", {})
        return {"median": memory[ours]["peak"] / memory[theirs]["peak"]} if {ours, theirs} <= set(memory) else None
    counts = result["counts"].get("instantaneous")
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


def setting(record: dict[str, Any]) -> str:
    """One paragraph: what was measured, on what, how."""
    case, place, versions = record["results"][0]["case"], record["machine"], record["versions"]
    shapes = " and ".join(shape(r) for r in record["results"])
    extensions = ", ".join(place["bf16"]) or "no vector extensions recorded"
    return (
        f"{case['model_title']}, all linears but the output head, r = {case['rank']}, {case['dtype']}, batches of "
        f"{shapes} tokens; {record['date']}, {place['cpu']}, {place['cores']} cores ({extensions}), "
        f"{record['threads']} threads, Python {place['python']}, torch {versions['torch']}, PEFT {versions['peft']}, "
        f"commit {versions['commit']}. Medians [quartiles] of {record['results'][0]['rounds']} paired ratios, methods "
        "interleaved in one process; PEFT with its defaults, fused AdamW for all. Floor: forward and input gradient "
        "of the frozen model.\n"
    )


def targets_table(record: dict[str, Any]) -> str:
    """Targets beside what was measured."""
    rows = [
        [
            t.what,
            "–" if t.limit is None else f"≤ {t.limit:g}",
            *(cell(figure(result, t), t.limit) for result in record["results"]),
        ]
        for t in TARGETS
    ]
    return table(["what", "target", *(shape(r) for r in record["results"])], rows)


def steps_table(result: dict[str, Any]) -> str:
    """Absolute step times, ratios to the floor, memory and launches of every method."""
    rows = []
    for name, method in result["methods"].items():
        step, ratio = result["step"][name], result["ratios"].get(f"{name}/floor")
        memory, counts = result.get("memory", {}).get(name), result["counts"].get(name)
        rows.append(
            [
                method["title"],
                f"{step['median']:.3f} [{step['q1']:.3f}–{step['q3']:.3f}]",
                f"{ratio['median']:.2f}" if ratio else "1",
                f"{memory['peak'] / 2**20:.0f}" if memory else "–",
                f"{memory['held'] / 2**20:.0f}" if memory else "–",
                f"{memory['saved'] / 2**20:.0f}" if memory else "–",
                f"{counts['step']}" if counts else "–",
                f"{counts['bookkeeping']}" if counts else "–",
                f"{counts['syncs']}" if counts else "–",
            ]
        )
    header = [
        "method",
        "step, s",
        "over floor",
        "peak, MiB",
        "held, MiB",
        "saved, MiB",
        "launches",
        "of which bookkeeping",
        "syncs",
    ]
    return table(header, rows)


def kinds_table(result: dict[str, Any]) -> str:
    """Step times of ours by kind of step, for methods that have several."""
    rows = [
        [f"`{name}`", kind, f"{share:.3f}", f"{result['step'][f'{name}:{kind}']['median']:.3f}"]
        for name, method in result["methods"].items()
        if len(method["kinds"]) > 1
        for kind, share in method["kinds"].items()
    ]
    return table(["method", "kind of step", "share", "median, s"], rows) if rows else ""


def profile_table(result: dict[str, Any]) -> str:
    """Self times of the most expensive operators, ours beside the floor's."""
    profiles = result.get("profile", {})
    if not {"floor", "instantaneous"} <= set(profiles):
        return ""
    floor = {row["operator"]: row for row in profiles["floor"]}
    rows = [
        [
            f"`{row['operator']}`",
            f"{row['ms']:.0f} ({row['calls']})",
            f"{floor[row['operator']]['ms']:.0f} ({floor[row['operator']]['calls']})"
            if row["operator"] in floor
            else "–",
        ]
        for row in profiles["instantaneous"]
    ]
    return table(["operator", "`instantaneous`, ms (calls)", "floor, ms (calls)"], rows)


def details(record: dict[str, Any]) -> str:
    """The text of benchmarks/README.md between its markers."""
    parts = [setting(record), targets_table(record)]
    for result in record["results"]:
        parts += [f"### {shape(result)} tokens\n", steps_table(result), kinds_table(result)]
        profile = profile_table(result)
        if profile:
            parts += [
                "Where the time of one profiled step goes (self time by operator; profiling itself adds some):\n",
                profile,
            ]
    return "\n".join(part for part in parts if part)


def probes_table(root: Path) -> str:
    """What was tried beside the shipped CPU path, from the newest file of ``probes.py``; empty when there is none."""
    files = sorted((root / "results" / "probes").glob("*.json"))
    if not files:
        return ""
    record = json.loads(files[-1].read_text(encoding="utf-8"))
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
    """Render the newest result file, or the one named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="result file (default: the newest in benchmarks/results)")
    parser.add_argument(
        "--root", type=Path, default=HERE.parent, help="root of the repository whose documents are written"
    )
    options = parser.parse_args(arguments)
    files = sorted(
        (HERE / "results").glob("*.json"), key=lambda f: (json.loads(f.read_text(encoding="utf-8"))["date"], f.name)
    )
    file = options.file or (files[-1] if files else None)
    record = json.loads(file.read_text(encoding="utf-8")) if file else None
    summary = setting(record) + "\n" + targets_table(record) if record else NOTHING
    replace(options.root / "README.md", summary, MARKERS)
    page = details(record) + "\n" + probes_table(HERE) if record else NOTHING
    replace(options.root / "benchmarks" / "README.md", page, MARKERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
