"""Pictures of a run: ranks by layer and module, budget and loss over time, and the score series of single modules.

After figure 5 and appendix G (figure 7) of the IGU-LoRA paper.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .extras import require

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_LEFT, _RIGHT = "tab:blue", "tab:orange"


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """Layer number and kind of an adapted module, read off its name.

    ``model.layers.3.self_attn.q_proj`` is ``(3, "self_attn.q_proj")``; a name without a number is ``(None, name)``.
    """
    found = _LAYER.search(name)
    return (int(found.group(1)), name[found.end() :]) if found else (None, name)


def module_grid(values: Mapping[str, float]) -> tuple[list[str], list[int | None], list[list[float | None]]]:
    """Kinds of modules, layers, and ``grid[kind][layer]``; None where a layer has no such module.

    Modules that share kind and layer (experts, towers with a second number in their names) are told apart by their kind.
    """
    places = {name: layer_and_kind(name) for name in values}
    if len(set(places.values())) < len(places):  # several stacks of layers: their names stay whole
        places = {name: (None, name) for name in values}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    layers = sorted({layer for layer, _ in places.values()}, key=lambda layer: (layer is None, layer or 0))
    grid: list[list[float | None]] = [[None] * len(layers) for _ in kinds]
    for name, (layer, kind) in places.items():
        grid[kinds.index(kind)][layers.index(layer)] = values[name]
    return kinds, layers, grid


def new_figure(heights: Sequence[float], columns: int, width: float) -> tuple[Any, Any]:
    """A figure of its own on the Agg canvas: neither pyplot's state nor a display is touched."""
    figure = require("matplotlib.figure", "demo", "drawing pictures").Figure(
        figsize=(width, sum(heights)), layout="constrained"
    )
    require("matplotlib.backends.backend_agg", "demo", "drawing pictures").FigureCanvasAgg(figure)
    return figure, figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)


def heat_size(values: Mapping[str, float]) -> tuple[float, float]:
    """Width and height in inches of a readable heat map."""
    kinds, layers, _ = module_grid(values)
    return max(6.0, 0.32 * len(layers) + 3.8), max(2.0, 0.3 * len(kinds) + 1.2)


def heat(
    figure: Any, axis: Any, values: Mapping[str, float], top: float, label: str, title: str, form: str = "d"
) -> None:
    kinds, layers, cells = module_grid(values)
    grid = [[None if v is None or v != v else v for v in row] for row in cells]  # NaN: nothing to show
    shown = [[float("nan") if v is None else float(v) for v in row] for row in grid]
    image = axis.imshow(shown, aspect="auto", cmap="viridis", vmin=0, vmax=top or 1.0, interpolation="nearest")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            if value is not None:
                colour = "white" if value < 0.6 * top else "black"
                axis.text(j, i, format(value, form), ha="center", va="center", fontsize=7, color=colour)
    means = [sum(v for v in row if v is not None) / max(1, sum(v is not None for v in row)) for row in grid]
    axis.set_yticks(
        range(len(kinds)), [f"{kind}  (mean {m:.1f})" for kind, m in zip(kinds, means, strict=True)], fontsize=8
    )
    axis.set_xticks(range(len(layers)), ["–" if layer is None else str(layer) for layer in layers], fontsize=7)
    axis.set_xlabel("layer", fontsize=8)
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axis, label=label, pad=0.01)


def _heat_ranks(figure: Any, axis: Any, ranks: Mapping[str, int], start: Mapping[str, int]) -> None:
    now, before = sum(ranks.values()), sum(start.values())
    title = f"Rank by layer and module: {now:,} triplets live, {before:,} at the start"
    heat(figure, axis, ranks, max([1, *start.values(), *ranks.values()]), "live triplets", title)


def plot_ranks(ranks: Mapping[str, int], start: Mapping[str, int], path: Path) -> Path:
    """Heat map of the live ranks, modules by layers; ``start``: those that the run started from (paper, figure 5)."""
    width, height = heat_size(ranks)
    figure, axes = new_figure([height], 1, width)
    _heat_ranks(figure, axes[0][0], ranks, start)
    return saved(figure, path)


def plot_adapter(
    ranks: Mapping[str, int],
    start: Mapping[str, int],
    scores: Mapping[str, float],
    history: Sequence[Mapping[str, Any]],
    path: Path,
) -> Path:
    """What an adapter's folder holds: ranks, mean scores of the live triplets (when known; NaN for none) and the history of the budget."""
    width, height = heat_size(ranks)
    figure, axes = new_figure([height] * (2 if scores else 1) + [2.4] * bool(history), 1, width)
    _heat_ranks(figure, axes[0][0], ranks, start)
    if scores:
        heat(
            figure,
            axes[1][0],
            scores,
            max((v for v in scores.values() if v == v), default=1.0),
            "score",
            "Mean score of the live triplets",
            ".1f",
        )
    if history:
        axis = axes[-1][0]
        axis.step([e["step"] for e in history], [e["budget"] for e in history], where="post", color=_LEFT)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("budget")
        axis.set_xlabel("optimizer step")
        axis.set_title("Budget at each allocation", fontsize=10)
        axis.grid(alpha=0.3)
    return saved(figure, path)


def plot_budget(events: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Loss above, budget and live triplets below, over the optimizer steps; ``events`` are the lines of ``metrics.jsonl``."""
    train = [event for event in events if event["kind"] == "train"]
    evaluated = [event for event in events if event["kind"] == "eval" and "loss" in event]
    figure, axes = new_figure([2.6, 2.6], 1, 7.0)
    top, bottom = axes[0][0], axes[1][0]
    bottom.sharex(top)
    top.plot([e["step"] for e in train], [e["loss"] for e in train], color=_LEFT, marker=".", label="training")
    if evaluated:  # two points, before and after, say nothing about the way between them
        line = "-" if len(evaluated) > 2 else ""
        points = [e["step"] for e in evaluated], [e["loss"] for e in evaluated]
        top.plot(*points, color=_RIGHT, marker="o", linestyle=line, label="held out")
    top.set_ylabel("loss")
    top.set_title("Loss and budget over time", fontsize=10)
    top.legend()
    steps = sorted({e["step"]: e["budget"] for e in [*train, *history]}.items())
    bottom.step([s for s, _ in steps], [b for _, b in steps], where="post", color=_LEFT, label="budget")
    if history:
        live = [sum(event["ranks"].values()) for event in history]
        bottom.plot([e["step"] for e in history], live, ".", color=_RIGHT, label="live triplets at each allocation")
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("budget")
    bottom.set_xlabel("optimizer step")
    bottom.legend(loc="lower left")
    whole_numbers = require("matplotlib.ticker", "demo", "drawing pictures").MaxNLocator(integer=True)
    bottom.xaxis.set_major_locator(whole_numbers)
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    return saved(figure, path)


def running_statistics(values: Sequence[float], window: int = 10) -> dict[str, list[float]]:
    """Mean, variance and lag-1 autocorrelation of the last ``window`` values at every position.

    The autocorrelation is NaN where there are fewer than three values, or all of them are equal.
    """
    out: dict[str, list[float]] = {"mean": [], "variance": [], "autocorrelation": []}
    for end in range(1, len(values) + 1):
        part = list(values[max(0, end - window) : end])
        mean = sum(part) / len(part)
        centred = [value - mean for value in part]
        power = sum(value * value for value in centred)
        lagged = sum(a * b for a, b in pairwise(centred))
        out["mean"].append(mean)
        out["variance"].append(power / len(part))
        out["autocorrelation"].append(lagged / power if len(part) >= 3 and power > 0 else float("nan"))
    return out


def plot_series(series: Mapping[str, Sequence[Mapping[str, float]]], path: Path, window: int = 10) -> Path:
    """For each module: y_t with its running mean, running variance, lag-1 autocorrelation and SNR_t (paper, appendix G).

    Raises:
        ValueError: no module was traced, or no score update was made.
    """
    names = [name for name, points in series.items() if points]
    if not names:
        raise ValueError(
            "expected a score series, got none; name modules with --trace, and train through a few score updates"
        )
    figure, axes = new_figure([2.0] * 4, len(names), max(6.0, 4.2 * len(names)))
    for axis in axes.flat[1:]:
        axis.sharex(axes[0][0])
    for column, name in enumerate(names):
        points = series[name]
        steps, y = [p["step"] for p in points], [p["y"] for p in points]
        running = running_statistics(y, window)
        panels: list[tuple[str, list[tuple[str, Sequence[float]]]]] = [
            (
                "y_t",
                [("y_t", y), (f"mean of the last {window}", running["mean"]), ("Ī_t", [p["mean"] for p in points])],
            ),
            (
                "variance",
                [
                    (f"variance of the last {window}", running["variance"]),
                    ("Ū_t²", [p["deviation"] ** 2 for p in points]),
                ],
            ),
            ("lag-1 autocorrelation", [("", running["autocorrelation"])]),
            ("SNR_t = Ī / Ū", [("", [p["snr"] for p in points])]),
        ]
        for row, (label, lines) in enumerate(panels):
            axis = axes[row][column]
            for line_name, values in lines:
                axis.plot(steps, values, marker=".", label=line_name or None)
            if len(lines) > 1:
                axis.legend(fontsize=7)
            if column == 0:
                axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[2][column].axhline(0.0, color="grey", linewidth=0.8)
        axes[2][column].set_ylim(-1.05, 1.05)
        axes[0][column].set_title(name, fontsize=8)
        axes[3][column].set_xlabel("optimizer step")
    return saved(figure, path)


def saved(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path
