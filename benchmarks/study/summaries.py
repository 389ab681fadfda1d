"""What a study found, as Markdown: the comparison of its page, and the summary that other documents hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from ..pages import table
from .book import Book, Record
from .comparing import Found, comparisons, found_by_method, value
from .intervals import LEVEL, RESAMPLES, Difference, surely_different
from .plan import Study

Gaps = dict[tuple[str, str], Difference]


def summary(study: Study, book: Book, link: str, short: bool = False) -> str:
    """Medians and differences, for a document that has a ``link`` to the page.

    Args:
        study, book: what was asked for, and what is done.
        link: Markdown.
        short: leave out what :func:`compared` says.
    """
    found = found_by_method(study, book)
    gaps = comparisons(study, found)
    every = [record for records in found.values() for record in records.values()]
    if not every:
        return "Nothing has run yet.\n"
    metrics = dict.fromkeys(f"{record['metric']} of {record['settings']['task']['data']}" for record in every)
    what = (
        f"{', '.join(metrics)}; triplets per matrix {', '.join(f'{b.r} to {b.target}' for b in study.budgets)}; "
        f"{len(study.judged_seeds)} seeds, {study.judged_by} rows; {link}."
    )
    return "\n".join([what, "", *compared(study, found, gaps, short)]).rstrip() + "\n"


def compared(study: Study, found: Found, gaps: Gaps, short: bool = False) -> list[str]:
    """Lines of Markdown: each method's medians and its paired differences, then who is better than whom.

    ``short`` leaves out methods that run at one of several budgets, and differences to others than the first of ``against``. What is better
    still is so among all.
    """
    places = [(task, budget) for task in study.tasks for budget in study.budgets]
    compared_with = {other for _, other in gaps}
    columns = [name for name in dict.fromkeys((*study.against, *study.methods)) if name in compared_with]
    methods = list(found)
    if short:
        columns = columns[:1]
        methods = [name for name in found if len(study.budgets_of(name)) > 1 or len(study.budgets) == 1]
    rows = []
    for method in methods:
        records = found[method]
        parts = [[record for pair, record in records.items() if pair[:2] == at] for at in places]
        if records:
            medians = ["" if not part else f"{median(value(study, record) for record in part):.3f}" for part in parts]
            cells = [_cell(gaps, method, other) for other in columns]
            rows.append([f"`{method}`", *medians, *cells, _live(parts)])
    several = len(study.tasks) > 1
    heads = [f"{f'{task}, ' * several}{budget.r} to {budget.target}" for task, budget in places]
    lines = [table(["median", *heads, *(f"minus `{name}`" for name in columns), "parameters at the end"], rows)]
    if not gaps:
        return lines
    return [
        _explained(gaps),
        "",
        *lines,
        *(_sentences(gaps, methods, columns) or ["No difference is clear for all comparisons together."]),
    ]


def shown(gap: Difference, emphasis: bool = True) -> str:
    """Mean and interval, bold where it leaves out zero."""
    if gap.high - gap.low > 1.0:  # wider than metrics are: too few runs, or too different ones
        return f"{gap.mean:+.3f} (no bounds)"
    text = f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
    return f"**{text}**" if gap.clear and emphasis else text


def core_hours(records: Iterable[Record]) -> float:
    """What runs took, evaluation included: wall time by the cores that each had."""
    return sum(record["seconds_in_all"] * record["threads"] for record in records) / 3600


def _live(parts: Sequence[Sequence[Record]]) -> str:
    """What trains at the end, place by place; once where it is the same."""
    counts = [f"{median(record['trained_at_end'] for record in part):,.0f}" for part in parts if part]
    return " / ".join(dict.fromkeys(counts))


def _cell(gaps: Gaps, one: str, other: str) -> str:
    return shown(gaps[one, other]) if (one, other) in gaps else ""


def _once(gaps: Gaps) -> dict[frozenset[str], tuple[str, str]]:
    """Every two methods once, whichever of them was taken from the other."""
    return {frozenset(pair): pair for pair in gaps}


def _explained(gaps: Gaps) -> str:
    looked_at = len(_once(gaps))
    return (
        "Differences are means over the pairs of runs that both methods did (row minus column), each task in its own metric, with the "
        f"{LEVEL:.0%} bootstrap-t interval of {RESAMPLES:,} resamples of the seeds of each task and budget; bold where it leaves out zero. "
        f"Of comparisons of equals one in {1 / (1 - LEVEL):.0f}, or a few more, would be bold by chance; what is said in words below holds "
        f"for all {looked_at} together (Holm's correction). Other seeds are what the interval speaks of, not other rows."
    )


def _sentences(gaps: Gaps, methods: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Who is better than whom among all, said of pairs whose difference is shown."""
    pairs = list(_once(gaps).values())
    sure = surely_different([gaps[pair] for pair in pairs])
    found = []
    for (one, other), said in zip(pairs, sure, strict=True):
        gap = gaps[one, other]
        better, worse = (one, other) if gap.mean > 0 else (other, one)
        if said and {one, other} <= set(methods) and {one, other} & set(columns):
            found.append(f"- `{better}` is better than `{worse}`: {abs(gap.mean):+.3f} over {gap.pairs} pairs.")
    return found
