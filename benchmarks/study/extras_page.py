"""The sections of a study's page for what runs measured beside their metrics."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from ..pages import table
from .book import Record
from .extras import rank_correlation, settled
from .intervals import Spread


def sections(records: dict[str, list[Record]]) -> list[str]:
    """Lines of Markdown for the runs of each method; none where nothing was measured."""
    return [*_removed(records), *_settled(records)]


def _removed(records: dict[str, list[Record]]) -> list[str]:
    rows: list[list[str]] = []
    for method, runs in records.items():
        measured = [_drops(run) for run in runs if "removed" in run]
        if measured:
            columns = (
                [rank_correlation(ranks, drops) for ranks, drops in measured],
                [_third(ranks, drops, highest=True) for ranks, drops in measured],
                [_third(ranks, drops, highest=False) for ranks, drops in measured],
            )
            rows.append([f"`{method}`", *map(_median, columns), str(len(measured))])
    if not rows:
        return []
    header = ["method", "rank correlation of rank and loss", "lost, highest third", "lost, lowest third", "runs"]
    return [
        "## Matrices removed one at a time",
        "",
        "What the metric on validation rows loses without the update of one matrix, against the rank that the method gave it (IGU-LoRA, "
        "Table 8): median (quartiles) over runs. A third is one of the matrices in the order of their ranks.",
        "",
        table(header, rows),
    ]


def _drops(run: Record) -> tuple[list[float], list[float]]:
    """Rank and loss of every matrix."""
    removed, ranks = run["removed"], run["ranks"]
    names = [name for name in removed if name]
    return [float(ranks[name]) for name in names], [removed[""] - removed[name] for name in names]


def _third(ranks: list[float], drops: list[float], highest: bool) -> float:
    """Mean loss over the third of the matrices with the highest or the lowest ranks, equal ones in the model's order."""
    order = sorted(range(len(ranks)), key=lambda i: -ranks[i] if highest else ranks[i])
    return statistics.fmean(drops[i] for i in order[: max(len(order) // 3, 1)])


def _settled(records: dict[str, list[Record]]) -> list[str]:
    names = ("mean", "variance", "snr", "autocorrelation")
    rows: list[list[str]] = []
    for method, runs in records.items():
        points = [settled(points) for run in runs for points in run.get("series", {}).values() if len(points) >= _LEAST]
        if points:
            rows.append(
                [f"`{method}`", *(_median([point[name] for point in points]) for name in names), str(len(points))]
            )
    if not rows:
        return []
    return [
        "## How steady the sensitivities are",
        "",
        "Of y_t of single matrices (IGU-LoRA, figure 7): its mean, its variance and SNR_t in the last quarter of the score updates over "
        "those in the quarter before, and its autocorrelation at lag 1 over both; median (quartiles) over matrices and runs. Ratios of 1 "
        "and no autocorrelation are what a stationary, independent series has.",
        "",
        table(["method", "mean", "variance", "SNR", "autocorrelation", "series"], rows),
    ]


_LEAST = 16  # score updates of a series of which quarters are looked at


def _median(values: Iterable[float]) -> str:
    spread = Spread.of([value for value in values if value == value])
    return f"{spread.median:+.3f} ({spread.q1:+.3f} to {spread.q3:+.3f})"
