"""A study's records as Markdown: by task and budget the spread over seeds, and the paired differences that say who is better."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from ..pages import place, table
from .book import Book, Record
from .conduct import picked
from .intervals import LEVEL, RESAMPLES, Difference, Spread, paired
from .plan import Budget, Study

Pair = tuple[str, Budget, int]


def results(study: Study, book: Book, method: str) -> dict[Pair, Record]:
    """The finished runs of a method with the learning rate that was picked, by task, budget and seed."""
    found: dict[Pair, Record] = {}
    for task in study.tasks:
        for budget in study.budgets:
            search = book.find(study, study.searches(task, method, budget)[0])
            rate = None if search is None else picked(study, book, search["metric"], task, method, budget)
            for run in () if rate is None else study.repeats(task, method, budget, rate):
                record = book.find(study, run)
                if record is not None:
                    found[task, budget, run.seed] = record
    return found


def value(record: Record) -> float:
    """What a run is judged by: the task's metric on test rows."""
    return record["test"][record["metric"]]


def difference(ours: dict[Pair, Record], theirs: dict[Pair, Record]) -> Difference | None:
    """Of the runs that both have done, pair by pair; None without any."""
    pairs = sorted(ours.keys() & theirs.keys())
    if not pairs:
        return None
    return paired([value(ours[pair]) for pair in pairs], [value(theirs[pair]) for pair in pairs])


def page(study: Study, book: Book) -> str:
    """The page."""
    found = {method: results(study, book, method) for method in study.methods}
    every = [record for records in found.values() for record in records.values()]
    done = sum(len(records) for records in found.values())
    lines = [
        f"# Study: {study.name}",
        "",
        f"Made by `igulora study`; {done} of {len(study.groups()) * len(study.seeds)} runs that count, {len(study.seeds)} seeds. Learning "
        f"rates from one grid for all ({', '.join(f'{rate:g}' for rate in study.learning_rates)}), picked on validation rows with the "
        "first seed; values are of test rows, which nothing was chosen by: median (quartiles) over seeds.",
        "",
        *_places(every),
    ]
    for task in study.tasks:
        for budget in study.budgets:
            lines += _table(study, found, task, budget)
    return "\n".join([*lines, *_differences(study, found)]).rstrip() + "\n"


def _places(records: Iterable[Record]) -> list[str]:
    places = dict.fromkeys(place({**record, "results": [{}]}) for record in records)
    return [line for text in places for line in (text, "")]


def _table(study: Study, found: dict[str, dict[Pair, Record]], task: str, budget: Budget) -> list[str]:
    rows: list[list[str]] = []
    metric = ""
    for method, records in found.items():
        here = [records[task, budget, seed] for seed in study.seeds if (task, budget, seed) in records]
        if not here:
            continue
        metric = here[0]["metric"]
        spread = Spread.of([value(record) for record in here])
        step = statistics.median(record["seconds"] / study.training.steps for record in here)
        rows.append(
            [f"`{method}`", f"{spread.median:.3f} ({spread.q1:.3f} to {spread.q3:.3f})", str(len(here)),
             f"{here[0]['settings']['learning_rate']:g}", f"{here[0]['trainable']:,}", f"{step * 1e3:.0f}"]
        )  # fmt: skip
    if not rows:
        return []
    header = ["method", metric, "seeds", "learning rate", "trained at the start", "ms per step"]
    return [f"## {task}, r {budget.r} to {budget.target}", "", table(header, rows)]


def _differences(study: Study, found: dict[str, dict[Pair, Record]]) -> list[str]:
    names = [name for name in study.methods if found[name]]
    rows: list[list[str]] = []
    sentences: list[str] = []
    for one in names:
        row = [f"`{one}`"]
        for other in names:
            gap = None if one == other else difference(found[one], found[other])
            if gap is None:
                row.append("")
                continue
            text = f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
            row.append(f"**{text}**" if gap.clear else text)
            if gap.clear and gap.mean > 0:
                sentences.append(f"- `{one}` is better than `{other}`: {gap.mean:+.3f} over {gap.pairs} pairs.")
        rows.append(row)
    if len(rows) < 2:
        return []
    return [
        "## Who is better",
        "",
        f"Mean of paired differences (row minus column; pairs of one task, budget and seed) and the interval of {LEVEL:.0%} of "
        f"{RESAMPLES:,} bootstrap resamples; bold where it leaves out zero.",
        "",
        table(["", *(f"`{name}`" for name in names)], rows),
        *(sentences or ["No difference is clear."]),
    ]
