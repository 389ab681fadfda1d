"""The frontier picture of the fidelity study: agreement with the exact integral against extra cost, one column per model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from igulora.training.extras import require

from .choice import ALLOWED, WANTED, Line, Record, frontier, lines

# Measure -> how the row of panels is called.
ROWS = {"sensitivity": "sensitivity |w·T|", "snr": "score (SNR, smoothed)"}
_FAMILIES = {
    "instantaneous": ("tab:gray", "s"),
    "trapezoid": ("tab:red", "^"),
    "on-path": ("tab:brown", "v"),
    "gauss": ("tab:blue", "o"),
    "stratified": ("tab:green", "D"),
    "control": ("tab:purple", "P"),
}
_CONTROLS = {
    "other data": ("black", "exact, other data"),
    "magnitude": ("tab:olive", "|λ|"),
    "random": ("silver", "chance"),
}
_TICKS = (0, 1, 2, 5, 10, 20, 50, 100, 200)


def _family(line: Line) -> str:
    if line.proposed:
        return "control"
    return next(name for name in _FAMILIES if line.title.startswith(name))


def _panel(axes: Any, record: Record, measure: str) -> None:
    found = [line for line in lines(record) if line.aggregate == "signed"]
    for line in found:
        color, marker = _FAMILIES[_family(line)]
        axes.plot(100 * line.cost, line.top[measure], marker, color=color, markersize=5, alpha=0.8)
    best = frontier([line for line in found if not line.trains_apart], measure)
    axes.plot(
        [100 * line.cost for line in best], [line.top[measure] for line in best], "-", color="tab:orange", zorder=0
    )
    for name, (color, label) in _CONTROLS.items():
        values = record["controls"][name][measure]["top"]
        level = sum(values) / len(values)
        axes.axhline(level, color=color, linestyle="--", linewidth=0.8)
        axes.annotate(label, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=7)
    axes.axvline(100 * ALLOWED, color="tab:orange", linewidth=0.6, linestyle=":")
    axes.axhline(WANTED, color="tab:orange", linewidth=0.6, linestyle=":")
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xticks(_TICKS, [str(tick) for tick in _TICKS])
    axes.set_xlim(left=min([-0.5, *(110 * line.cost for line in found)]))
    axes.set_ylim(0.35, 1.02)
    timed = "time" in record
    axes.set_xlabel(f"extra {'time of training, measured' if timed else 'sequences (not timed)'}, %")


def draw(records: list[Record], file: Path) -> None:
    """Write the picture; one column per record.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure = require("matplotlib.figure", "bench", "drawing pictures").Figure(
        figsize=(4.8 * len(records), 7.2), layout="constrained"
    )
    require("matplotlib.backends.backend_agg", "bench", "drawing pictures").FigureCanvasAgg(figure)
    handles = require("matplotlib.lines", "bench", "drawing pictures")
    panels = figure.subplots(len(ROWS), len(records), squeeze=False)
    for column, record in enumerate(records):
        for row, (measure, title) in enumerate(ROWS.items()):
            axes = panels[row][column]
            _panel(axes, record, measure)
            axes.set_title(f"{record['study']['name']}: {title}", fontsize=9)
            if column == 0:
                axes.set_ylabel("top-b agreement with the exact integral")
    shown = [
        handles.Line2D([], [], color=color, marker=marker, linestyle="", label=name)
        for name, (color, marker) in _FAMILIES.items()
    ]
    shown.append(handles.Line2D([], [], color="tab:orange", label="frontier"))
    figure.legend(handles=shown, loc="outside lower center", ncols=4, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130, metadata={"Software": None})
