"""Picture and page of the scaling curves, from the newest record in results/scaling.

python -m igulora.benchmarks.scaling.page
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from igulora.training.extras import require

from ..pages import place, table
from ..record import newest, read
from .curves import FOLDER

TITLES = {"rank": "rank", "tokens": "tokens in a batch", "layers": "layers", "matrices": "adapted matrices"}
ALLOCATION_LIMIT = 0.2  # seconds for 10^6 triplets
FLAT_LIMIT = 1.5
GROWTH_LIMIT = 1.1  # of n log n's growth; the rest is what a measurement may be off
_METHODS = {
    "instantaneous": "igulora, no path rows",
    "default": "igulora, default",
    "peft-lora": "PEFT LoRA",
    "peft-adalora": "PEFT AdaLoRA",
}


def growth(points: list[dict[str, Any]]) -> float:
    """How allocation grows from the first point of at least 10^4 triplets to the last, as a multiple of n log n's growth."""
    chosen = [p for p in points if p["triplets"] >= 10**4] or points
    first, last = chosen[0], chosen[-1]
    work = [p["triplets"] * math.log(p["triplets"]) for p in (first, last)]
    return last["seconds"]["median"] / first["seconds"]["median"] / (work[1] / work[0])


def page(record: dict[str, Any]) -> str:
    """results/scaling/README.md."""
    parts = [f"# How cost grows\n\n{place(record)}\n\n![curves]({picture_name(record)})\n"]
    for curve, title in TITLES.items():
        points = [p for p in record["results"] if p["curve"] == curve]
        rows = [
            [f"{p['value']:,}", f"{p['adapter_parameters']:,}", f"{p['step']['floor']['median']:.3f}"]
            + [_ratio(p["ratios"].get(f"{name}/floor")) for name in _METHODS]
            for p in points
        ]
        parts.append(f"## Step over the floor, by {title}\n")
        parts.append(table([title, "adapter parameters", "floor, s", *_METHODS.values()], rows))
    rows = [
        [
            f"{p['parameters']:,}",
            *(f"{1e9 * p[k]['median'] / p['parameters']:.2f}" for k in ("scores_s", "orthogonality_s")),
        ]
        for p in record["scoring"]
    ]
    flat = {key: spread(record["scoring"], key) for key in ("scores_s", "orthogonality_s")}
    parts.append(
        "## Scoring, for each parameter\n\nA score update and the orthogonality gradient over one bank. From 10⁶ parameters on, the "
        f"dearest over the cheapest: {flat['scores_s']:.2f} and {flat['orthogonality_s']:.2f} (target: flat, at most {FLAT_LIMIT}: "
        f"{'met' if max(flat.values()) <= FLAT_LIMIT else 'missed'}).\n"
    )
    parts.append(table(["adapter parameters", "score update, ns", "orthogonality, ns"], rows))
    rows = [
        [
            f"{p['triplets']:,}",
            f"{1e3 * p['seconds']['median']:.2f}",
            f"{1e3 * p['seconds']['q1']:.2f}–{1e3 * p['seconds']['q3']:.2f}",
        ]
        for p in record["allocation"]
    ]
    last, grown = record["allocation"][-1], growth(record["allocation"])
    verdict = "met" if last["seconds"]["median"] <= ALLOCATION_LIMIT else "missed"
    parts.append(
        f"## Allocation\n\n{last['triplets']:,} triplets take {last['seconds']['median']:.3f} s (target {ALLOCATION_LIMIT} s: {verdict}). "
        f"From 10⁴ triplets on it grows by {grown:.2f} of what n log n grows by (target: no faster; "
        f"{'met' if grown <= GROWTH_LIMIT else 'missed'}).\n"
    )
    parts.append(table(["triplets", "ms", "quartiles"], rows))
    return "\n".join(parts)


def spread(points: list[dict[str, Any]], key: str) -> float:
    """Time for each parameter, the largest over the smallest, where a bank is larger than the caches of a core."""
    chosen = [p for p in points if p["parameters"] >= 10**6] or points
    each = [p[key]["median"] / p["parameters"] for p in chosen]
    return max(each) / min(each)


def _ratio(value: dict[str, float] | None) -> str:
    return "–" if value is None else f"{value['median']:.2f} [{value['q1']:.2f}–{value['q3']:.2f}]"


def picture_name(record: dict[str, Any]) -> str:
    """The picture's file, beside the page."""
    return f"{record['date']}.png"


def draw(record: dict[str, Any], file: Path) -> None:
    """Curves of steps with their quartiles, of scoring and of allocation."""
    figure = require("matplotlib.figure", "bench", "drawing pictures").Figure(figsize=(11, 6.5), layout="constrained")
    require("matplotlib.backends.backend_agg", "bench", "drawing pictures").FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    for axis, (curve, title) in zip(axes, TITLES.items(), strict=False):
        points = [p for p in record["results"] if p["curve"] == curve]
        for name, label in _METHODS.items():
            found = [(p["value"], p["ratios"][f"{name}/floor"]) for p in points if f"{name}/floor" in p["ratios"]]
            x, y = [v for v, _ in found], [r["median"] for _, r in found]
            axis.plot(x, y, marker="o", markersize=3, label=label)
            axis.fill_between(x, [r["q1"] for _, r in found], [r["q3"] for _, r in found], alpha=0.2)
        axis.set(xscale="log", xlabel=title, ylabel="step over floor", ylim=(1, None))
        axis.set_xticks([p["value"] for p in points], [f"{p['value']:,}" for p in points])
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    sizes = [p["parameters"] for p in record["scoring"]]
    for key, label in (("scores_s", "score update"), ("orthogonality_s", "orthogonality")):
        axes[4].plot(
            sizes, [1e9 * p[key]["median"] / p["parameters"] for p in record["scoring"]], marker="o", label=label
        )
    axes[4].set(xscale="log", xlabel="adapter parameters", ylabel="ns for each parameter", ylim=(0, None))
    axes[4].legend(fontsize=8)
    n = [p["triplets"] for p in record["allocation"]]
    seconds = [p["seconds"]["median"] for p in record["allocation"]]
    axes[5].plot(n, seconds, marker="o", label="allocation")
    scale = seconds[-1] / (n[-1] * math.log(n[-1]))
    axes[5].plot(
        n, [scale * v * math.log(v) for v in n], linestyle="--", color="grey", label="n log n through the last point"
    )
    axes[5].set(xscale="log", yscale="log", xlabel="triplets", ylabel="seconds")
    axes[5].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Write picture and page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="record (default: the newest in results/scaling)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where page and picture go")
    options = parser.parse_args(arguments)
    record = read(options.file or newest(FOLDER))
    draw(record, options.folder / picture_name(record))
    (options.folder / "README.md").write_text(page(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
