"""Pictures of a study, from its records: differences with their intervals, the metric along budgets, and where the ranks went."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from igulora.training.plots import heat, heat_size, new_figure, plot_series, saved

from .book import Book
from .comparing import Found, comparisons, found_by_method, value
from .intervals import Spread
from .plan import Budget, Study

_GREY, _BLUE = "0.6", "tab:blue"


def draw(study: Study, book: Book, folder: Path) -> list[Path]:
    """All pictures for which there are records, in the order of the page."""
    found = found_by_method(study, book)
    maps = [_ranks(study, found, task, folder) for task in study.tasks]
    made = [_differences(study, found, folder), _budgets(study, found, folder), *maps, _series(found, folder)]
    return [path for path in made if path is not None]


def _differences(study: Study, found: Found, folder: Path) -> Path | None:
    """Every method minus those that the study compares with: a panel for each of these."""
    gaps = comparisons(study, found) if study.against else {}
    if not gaps:
        return None
    others = list(dict.fromkeys(other for _, other in gaps))
    names = list(dict.fromkeys(one for one, _ in gaps))
    figure, axes = new_figure([0.22 * len(names) + 1.2], len(others), 3.2 * len(others) + 1.8)
    for axis, other in zip(axes[0], others, strict=True):
        for row, one in enumerate(names):
            gap = gaps.get((one, other))
            if gap is not None:
                axis.errorbar(gap.mean, row, xerr=[[gap.mean - gap.low], [gap.high - gap.mean]], fmt="o", ms=4, lw=1.2,
                              color=_BLUE if gap.clear else _GREY)  # fmt: skip
        axis.axvline(0, color="black", lw=0.8)
        axis.set_yticks(range(len(names)), names if axis is axes[0][0] else [""] * len(names), fontsize=7)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(f"minus {other}", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="x", labelsize=7)
        axis.locator_params(axis="x", nbins=5)
    return saved(figure, folder / "differences.png")


def _budgets(study: Study, found: Found, folder: Path) -> Path | None:
    """A panel per method: its metric along the budgets, median and quartiles, before the first method of ``against`` in grey."""
    if len(study.budgets) < 2:
        return None
    names = [name for name in study.methods if found[name]]
    if not names:
        return None
    columns = min(6, len(names))
    lines = -(-len(names) // columns)
    made = []
    figure, axes = new_figure([1.9] * lines * len(study.tasks), columns, 2.1 * columns + 0.6)
    for block, task in enumerate(study.tasks):
        flat = [axis for line in axes[block * lines : (block + 1) * lines] for axis in line]
        for axis, name in zip(flat, names, strict=False):
            for other in dict.fromkeys([*study.against[:1], name]):
                made.append(_curve(axis, study, found, task, other, _BLUE if other == name else _GREY))
            axis.set_title(f"{name}\n{task}", fontsize=7)
            axis.tick_params(labelsize=6)
            axis.grid(alpha=0.3)
        for axis in flat[1:]:
            axis.sharey(flat[0])
        for axis in flat[len(names) :]:
            axis.set_visible(False)
    return saved(figure, folder / "budgets.png") if any(made) else None


def _curve(axis: Any, study: Study, found: Found, task: str, name: str, colour: str) -> bool:
    points: dict[int, Spread] = {}
    for budget in study.budgets:
        values = [value(study, record) for pair, record in found[name].items() if pair[:2] == (task, budget)]
        if values:
            points[budget.target] = Spread.of(values)
    ranks = sorted(points)
    axis.plot(ranks, [points[rank].median for rank in ranks], color=colour, marker="o", ms=3, lw=1.2)
    axis.fill_between(
        ranks, [points[rank].q1 for rank in ranks], [points[rank].q3 for rank in ranks], color=colour, alpha=0.2, lw=0
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    return bool(points)


def _ranks(study: Study, found: Found, task: str, folder: Path) -> Path | None:
    """Mean rank of each matrix at the end, for the methods that the study maps (paper, figure 5)."""
    maps = {
        (name, budget): ranks
        for name in study.maps
        for budget in study.budgets
        if (ranks := _mean_ranks(found, task, name, budget))
    }
    if not maps:
        return None
    names, budgets = (list(dict.fromkeys(keys)) for keys in zip(*maps, strict=True))
    width, height = heat_size(next(iter(maps.values())))
    figure, axes = new_figure([height] * len(names), len(budgets), width * len(budgets))
    for line, name in zip(axes, names, strict=True):
        for axis, budget in zip(line, budgets, strict=True):
            ranks = maps.get((name, budget))
            axis.set_visible(ranks is not None)
            if ranks is not None:
                title = f"{name}, {task}, r {budget.r} to {budget.target}"
                heat(figure, axis, ranks, max(ranks.values()), "rank", title, ".1f")
    return saved(figure, folder / f"ranks-{task}.png")


def _series(found: Found, folder: Path) -> Path | None:
    """Score series of the first run that kept some."""
    every = (record.get("series", {}) for records in found.values() for record in records.values())
    series = next((series for series in every if any(series.values())), None)
    return None if series is None else plot_series(series, folder / "series.png")


def _mean_ranks(found: Found, task: str, name: str, budget: Budget) -> dict[str, float]:
    """Mean over seeds of each matrix's rank at the end; empty without runs."""
    every = [record["ranks"] for pair, record in found[name].items() if pair[:2] == (task, budget)]
    return {matrix: statistics.fmean(ranks[matrix] for ranks in every) for matrix in every[0]} if every else {}
