"""The sections of a study's page for what runs measured beside their metrics."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from ..pages import table
from .book import Record
from .inspection import rank_correlation, settled
from .intervals import Spread


def sections(records: dict[str, list[Record]]) -> list[str]:
    """Lines of Markdown for the runs of each method; none where nothing was measured."""
    return [*_removed(records), *_settled(records)]


def _removed(records: dict[str, list[Record]]) -> list[str]:
    rows: list[list[str]] = []
    for method, runs in records.items():
        measured = [(run, _lost(run)) for run in runs if "removed" in run]
        if not measured:
            continue
        by_rank = [([float(run["ranks"][name]) for name in lost], list(lost.values())) for run, lost in measured]
        by_score = [
            ([run["scores"][name] for name in lost], list(lost.values())) for run, lost in measured if "scores" in run
        ]
        row = [f"`{method}`", _median([rank_correlation(*pair) for pair in by_rank])]
        row += [_median([rank_correlation(*pair) for pair in by_score]) if by_score else "–"]
        row += [_median([_third(*pair, highest=highest) for pair in by_rank]) for highest in (True, False)]
        rows.append([*row, str(len(measured))])
    if not rows:
        return []
    header = ["method", "correlation with rank", "with mean score", "lost, highest third", "lost, lowest third", "runs"]
    return [
        "## Matrices removed one at a time",
        "",
        "What the metric on validation rows loses without the update of one matrix (IGU-LoRA, Table 8): Spearman's correlation of the loss "
        "with the matrix's rank and with its mean score, and the mean loss over the third of the matrices with the highest and with the "
        "lowest ranks (those of equal rank included); median (quartiles) over runs. More rank loses more whatever it was given for, and "
        "rank 0 loses nothing: what `random` shows is that alone.",
        "",
        table(header, rows),
    ]


def _lost(run: Record) -> dict[str, float]:
    """What the metric loses without each matrix."""
    return {name: run["removed"][""] - value for name, value in run["removed"].items() if name}


def _third(ranks: list[float], drops: list[float], highest: bool) -> float:
    """Mean loss over the matrices whose rank is at least, or at most, that of the last one in the third."""
    ordered = sorted(ranks, reverse=highest)
    bound = ordered[max(len(ordered) // 3, 1) - 1]
    return statistics.fmean(
        drop for rank, drop in zip(ranks, drops, strict=True) if (rank >= bound if highest else rank <= bound)
    )


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
    return Spread.of([value for value in values if value == value]).shown("+.3f")
