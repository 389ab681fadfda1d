"""A study's records as Markdown: by task and budget the spread over seeds, and the paired differences that say who is better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from ..pages import place, table
from .book import Book, Record
from .comparing import Found, comparisons, difference, found_by_method, value
from .inspection_page import sections
from .intervals import Spread
from .plan import Budget, Study
from .summaries import compared, core_hours, shown


def page(study: Study, book: Book, pictures: Iterable[Path] = ()) -> str:
    """The page; ``pictures`` lie beside it."""
    found = found_by_method(study, book)
    every = [record for records in found.values() for record in records.values()]
    done = sum(len(records) for records in found.values())
    lines = [f"# Study: {study.name}", "", _head(study, book, done), "", *_places(every)]
    for task in study.tasks:
        for budget in study.budgets:
            lines += _table(study, found, task, budget)
    if every:
        lines += ["## Who is better", "", *compared(study, found, comparisons(study, found)), ""]
    lines += _searches(study, book)
    lines += sections({method: list(records.values()) for method, records in found.items()})
    lines += [f"\n![{path.stem}]({path.name})" for path in pictures]
    return "\n".join(lines).rstrip() + "\n"


def _head(study: Study, book: Book, done: int) -> str:
    """What was compared, how, and what it took; ``done`` of its runs count."""
    seeds = len(study.judged_seeds)
    what = {
        "test": "test rows, which nothing was chosen by",
        "validation": "validation rows, since the outcome chooses defaults",
    }
    return (
        f"Made by `igulora study`; {done} of {len(study.groups()) * seeds} runs that count, {seeds} seeds. {_grid(study)} Values are of "
        f"{what[study.judged_by]}: median (quartiles) and least over seeds. Parameters: what trains, at the start and with the triplets "
        f"that live at the end. {len(book.records)} trainings took {core_hours(book.records.values()):.1f} hours of one core, those "
        "that pick rates included. Any row is run again by `igulora study FILE.toml --again TASK/METHOD/R-TARGET`, any run with the whole "
        "key of its line in records.jsonl."
    )


def _grid(study: Study) -> str:
    rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    if len(study.learning_rates) == 1:
        return f"The learning rate of all is {rates}."
    at = "" if study.pick_at is None else f" at r {study.pick_at.r} to {study.pick_at.target}"
    near = f": the lowest within {study.tolerance:g} of the best" if study.tolerance else ""
    return (
        f"Learning rates from one grid for all ({rates}), picked{at} on validation rows with a seed that does not count otherwise{near} "
        "(*: an end of the grid was picked)."
    )


def _places(records: Iterable[Record]) -> list[str]:
    """A line for each day and machine, with the commits of its runs."""
    places: dict[str, list[Record]] = {}
    for record in records:
        unversioned = {**record, "results": [{"commit": ""}]}
        places.setdefault(f"{place(unversioned)} {record['jobs']}", []).append(record)
    lines = []
    for same in places.values():
        commits = [{"commit": commit} for commit in dict.fromkeys(record["versions"]["commit"] for record in same)]
        lines += [f"{place({**same[0], 'results': commits})} Runs at a time: {same[0]['jobs']}.", ""]
    return lines


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
        reached = [value(study, record) for record in here.values()]
        row = [f"`{method}`", Spread.of(reached).shown(), f"{min(reached):.3f}"]
        if reference is not None:
            gap = None if method == reference else difference(study, here, found[reference])
            row.append("" if gap is None else shown(gap, emphasis=False))
        seconds = statistics.median(record["seconds"] for record in here.values())
        live = statistics.median(record["trained_at_end"] for record in here.values())
        failed = sum(not math.isfinite(record[study.judged_by]["loss"]) for record in here.values())
        row += [
            f"{len(here)}, {failed} diverged" if failed else str(len(here)),
            _rate(study, method, first),
            f"{first['trained_at_start']:,}",
            f"{live:,.0f}",
            f"{seconds:.0f}",
        ]
        rows.append(row)
    if not rows:
        return []
    minus = [] if reference is None else [f"minus `{reference}`"]
    header = ["method", metric, "least", *minus, "seeds", "learning rate", "parameters", "at the end", "training, s"]
    return [f"## {task}, r {budget.r} to {budget.target}", "", table(header, rows)]


def _rate(study: Study, method: str, record: Record) -> str:
    """The learning rate, whether it lies at an end of the grid, and whose it is where it was borrowed."""
    rate, lender = record["settings"]["learning_rate"], study.methods[method].rate_of
    edge = len(study.learning_rates) > 1 and rate in (min(study.learning_rates), max(study.learning_rates))
    return f"{rate:g}{'*' if edge else ''}" + ("" if lender is None else f", that of `{lender}`")


def _searches(study: Study, book: Book) -> list[str]:
    """What every learning rate reached with the first seed: how near the one that was picked lies to others that fail."""
    rows: list[list[str]] = []
    for task, method, budget in study.groups():
        runs = study.searches(task, method, budget)
        records = [book.find(study, run) for run in runs]
        if (runs[0].method, runs[0].budget) == (method, budget) and any(records):
            reached = ["" if record is None else f"{record['validation'][record['metric']]:.3f}" for record in records]
            rows.append([f"`{method}`", task, str(budget).replace("-", " to "), *reached])
    if not rows or len(study.learning_rates) == 1:
        return []
    header = ["method", "task", "r", *(f"{rate:g}" for rate in study.learning_rates)]
    return ["## Learning rates", "", "Validation rows, first seed.", "", table(header, rows)]
