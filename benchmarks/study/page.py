"""A study's records as Markdown: by task and budget the spread over seeds, and the paired differences that say who is better."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from ..pages import place, table
from .book import Book, Record
from .conduct import picked
from .extras_page import sections
from .intervals import LEVEL, RESAMPLES, Difference, Spread, bootstrap
from .plan import Budget, Study

Pair = tuple[str, Budget, int]
Found = dict[str, dict[Pair, Record]]


def results(study: Study, book: Book, method: str) -> dict[Pair, Record]:
    """The finished runs of a method with the learning rate that was picked, by task, budget and seed."""
    found: dict[Pair, Record] = {}
    for task in study.tasks:
        for budget in study.budgets_of(method):
            search = book.find(study, study.searches(task, method, budget)[0])
            rate = None if search is None else picked(study, book, search["metric"], task, method, budget)
            for run in () if rate is None else study.repeats(task, method, budget, rate):
                record = book.find(study, run)
                if record is not None:
                    found[task, budget, run.seed] = record
    return found


def value(study: Study, record: Record) -> float:
    """What a run is judged by: the task's metric on the study's rows."""
    return record[study.judged_by][record["metric"]]


def difference(study: Study, ours: dict[Pair, Record], theirs: dict[Pair, Record]) -> Difference | None:
    """Of the runs that both have done; None without any.

    Runs of one task and seed share rows, their order and the head, whatever their budget: their differences are averaged first, and the
    interval is one of tasks and seeds.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for pair in sorted(ours.keys() & theirs.keys()):
        task, _, seed = pair
        found.setdefault((task, seed), []).append(value(study, ours[pair]) - value(study, theirs[pair]))
    return bootstrap([statistics.fmean(part) for part in found.values()]) if found else None


def found_by_method(study: Study, book: Book) -> Found:
    """The finished runs that count, by method."""
    return {method: results(study, book, method) for method in study.methods}


def page(study: Study, book: Book, pictures: Iterable[Path] = ()) -> str:
    """The page; ``pictures`` lie beside it."""
    found = found_by_method(study, book)
    every = [record for records in found.values() for record in records.values()]
    done = sum(len(records) for records in found.values())
    what = {
        "test": "test rows, which nothing was chosen by",
        "validation": "validation rows: the outcome chooses defaults",
    }
    at = "" if study.pick_at is None else f" at r {study.pick_at.r} to {study.pick_at.target}"
    lines = [
        f"# Study: {study.name}",
        "",
        f"Made by `igulora study`; {done} of {len(study.groups()) * len(study.seeds)} runs that count, {len(study.seeds)} seeds. Learning "
        f"rates from one grid for all ({', '.join(f'{rate:g}' for rate in study.learning_rates)}), picked{at} on validation rows with the "
        f"first seed; values are of {what[study.judged_by]}: median (quartiles) over seeds.",
        "",
        *_places(every),
    ]
    for task in study.tasks:
        for budget in study.budgets:
            lines += _table(study, found, task, budget)
    lines += _differences(study, found)
    lines += sections({method: list(records.values()) for method, records in found.items()})
    lines += [f"\n![{path.stem}]({path.name})" for path in pictures]
    return "\n".join(lines).rstrip() + "\n"


def _places(records: Iterable[Record]) -> list[str]:
    places = dict.fromkeys(
        f"{place({**record, 'results': [{}]})} Runs at a time: {record['jobs']}." for record in records
    )
    return [line for text in places for line in (text, "")]


def _table(study: Study, found: Found, task: str, budget: Budget) -> list[str]:
    rows: list[list[str]] = []
    metric = ""
    reference = next(iter(study.against), None)
    for method, records in found.items():
        here = {pair: record for pair, record in records.items() if pair[:2] == (task, budget)}
        if not here:
            continue
        first = next(iter(here.values()))
        metric = first["metric"]
        spread = Spread.of([value(study, record) for record in here.values()])
        row = [f"`{method}`", f"{spread.median:.3f} ({spread.q1:.3f} to {spread.q3:.3f})"]
        if reference is not None:
            gap = None if method == reference else difference(study, here, found[reference])
            row.append("" if gap is None else _shown(gap))
        seconds = statistics.median(record["seconds"] for record in here.values())
        row += [str(len(here)), f"{first['settings']['learning_rate']:g}", f"{first['trainable']:,}", f"{seconds:.0f}"]
        rows.append(row)
    if not rows:
        return []
    minus = [] if reference is None else [f"minus `{reference}`"]
    header = ["method", metric, *minus, "seeds", "learning rate", "trained at the start", "training, s"]
    return [f"## {task}, r {budget.r} to {budget.target}", "", table(header, rows)]


def _shown(gap: Difference) -> str:
    text = f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
    return f"**{text}**" if gap.clear else text


def comparisons(study: Study, found: Found) -> dict[tuple[str, str], Difference]:
    """Every method minus each of those the study compares with (without any: each with each)."""
    names = [name for name in study.methods if found[name]]
    others = study.against or names
    gaps = {
        (one, other): difference(study, found[one], found[other]) for other in others for one in names if one != other
    }
    return {pair: gap for pair, gap in gaps.items() if gap is not None}


def _differences(study: Study, found: Found) -> list[str]:
    gaps = comparisons(study, found)
    return ["## Who is better", "", *_compared(gaps)] if gaps else []


def summary(study: Study, book: Book, link: str) -> str:
    """The comparison alone, for another document, with a ``link`` to the page."""
    found = found_by_method(study, book)
    gaps = comparisons(study, found)
    every = [record for records in found.values() for record in records.values()]
    metrics = dict.fromkeys(f"{record['metric']} of {record['settings']['task']['data']}" for record in every)
    budgets = " and ".join(f"{budget.r} to {budget.target}" for budget in study.budgets)
    what = f"{', '.join(metrics)}, r {budgets}, {len(study.seeds)} seeds, {study.judged_by} rows; {link}."
    return "\n".join([what, "", *(_compared(gaps) if gaps else ["Nothing has been compared yet."])]).rstrip() + "\n"


def _compared(gaps: dict[tuple[str, str], Difference]) -> list[str]:
    columns = list(dict.fromkeys(other for _, other in gaps))
    rows = [
        [f"`{one}`", *(_shown(gaps[one, other]) if (one, other) in gaps else "" for other in columns)]
        for one in dict.fromkeys(one for one, _ in gaps)
    ]
    looked_at = len({frozenset(pair) for pair in gaps})
    return [
        f"Mean of paired differences over all tasks and budgets (row minus column) and the interval of {LEVEL:.0%} of {RESAMPLES:,} "
        "bootstrap resamples of tasks and seeds; bold where it leaves out zero. "
        f"Of {looked_at} comparisons of equals about {looked_at * (1 - LEVEL):.0f} would be bold by chance.",
        "",
        table(["", *(f"minus `{name}`" for name in columns)], rows),
        *(_sentences(gaps) or ["No difference is clear."]),
    ]


def _sentences(gaps: dict[tuple[str, str], Difference]) -> list[str]:
    found: dict[tuple[str, str], str] = {}
    for (one, other), gap in gaps.items():
        if gap.clear:
            better, worse = (one, other) if gap.mean > 0 else (other, one)
            found[better, worse] = (
                f"- `{better}` is better than `{worse}`: {abs(gap.mean):+.3f} over {gap.pairs} pairs of task and seed."
            )
    return list(found.values())
