"""What a study found, as Markdown: the comparison of its page, and the summary that other documents hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..pages import table
from .book import Book, Record
from .comparing import Found, comparisons, found_by_method, value
from .intervals import LEVEL, RESAMPLES, Difference, Spread
from .plan import Study

Gaps = dict[tuple[str, str], Difference]


def summary(study: Study, book: Book, link: str, others: Sequence[str] | None = None) -> str:
    """Medians and differences, for a document that has a ``link`` to the page.

    Args:
        study, book: what was asked for, and what is done.
        link: Markdown.
        others: the methods that all are compared with; None for the study's own ``against``.
    """
    found = found_by_method(study, book)
    gaps = comparisons(study, found, others)
    every = [record for records in found.values() for record in records.values()]
    if not every:
        return "Nothing has run yet.\n"
    metrics = dict.fromkeys(f"{record['metric']} of {record['settings']['task']['data']}" for record in every)
    what = (
        f"{', '.join(metrics)}; triplets per matrix {', '.join(f'{b.r} to {b.target}' for b in study.budgets)}; "
        f"{len(study.judged_seeds)} seeds, {study.judged_by} rows; {link}."
    )
    return "\n".join([what, "", *compared(study, found, gaps)]).rstrip() + "\n"


def compared(study: Study, found: Found, gaps: Gaps) -> list[str]:
    """Lines of Markdown: each method's medians and its paired differences, then who is better than whom."""
    places = [(task, budget) for task in study.tasks for budget in study.budgets]
    columns = list(dict.fromkeys(other for _, other in gaps))
    rows = []
    for method, records in found.items():
        values = [[value(study, record) for pair, record in records.items() if pair[:2] == at] for at in places]
        if records:
            medians = ["" if not part else f"{Spread.of(part).median:.3f}" for part in values]
            rows.append([f"`{method}`", *medians, *(_cell(gaps, method, other) for other in columns)])
    several = len(study.tasks) > 1
    heads = [f"{f'{task}, ' * several}{budget.r} to {budget.target}" for task, budget in places]
    lines = [table(["median", *heads, *(f"minus `{name}`" for name in columns)], rows)]
    return lines if not gaps else [_explained(gaps), "", *lines, *(_sentences(gaps) or ["No difference is clear."])]


def shown(gap: Difference) -> str:
    """Mean and interval, bold where it leaves out zero."""
    if not math.isfinite(gap.low):
        return f"{gap.mean:+.3f}"
    text = f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
    return f"**{text}**" if gap.clear else text


def core_hours(records: Iterable[Record]) -> float:
    """What runs took, evaluation included: wall time by the cores that each had."""
    return sum(record["seconds_in_all"] * record["threads"] for record in records) / 3600


def _cell(gaps: Gaps, one: str, other: str) -> str:
    return shown(gaps[one, other]) if (one, other) in gaps else ""


def _explained(gaps: Gaps) -> str:
    looked_at = len({frozenset(pair) for pair in gaps})
    return (
        "Differences are means over the pairs of runs that both methods did (row minus column), each task in its own metric, with the "
        f"{LEVEL:.0%} interval of {RESAMPLES:,} bootstrap resamples of the seeds of each task, expanded for few pairs; bold where it "
        f"leaves out zero. Of {looked_at} comparisons of equals {looked_at * (1 - LEVEL):.0f} or a few more would be bold by chance. Other "
        "seeds are what the interval speaks of, not other rows."
    )


def _sentences(gaps: Gaps) -> list[str]:
    found: dict[tuple[str, str], str] = {}
    for (one, other), gap in gaps.items():
        if gap.clear:
            better, worse = (one, other) if gap.mean > 0 else (other, one)
            found[better, worse] = (
                f"- `{better}` is better than `{worse}`: {abs(gap.mean):+.3f} over {gap.pairs} pairs."
            )
    return list(found.values())
