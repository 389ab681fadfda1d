"""A study's records as Markdown: by task and budget the spread over seeds, and the paired differences that say who is better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from ..pages import place, table
from .book import Book, Record
from .conduct import picked
from .inspection_page import sections
from .intervals import LEVEL, RESAMPLES, Difference, Spread, bootstrap
from .plan import Budget, Study

Pair = tuple[str, Budget, int]
Found = dict[str, dict[Pair, Record]]


def results(study: Study, book: Book, method: str) -> dict[Pair, Record]:
    """The finished runs of a method that count, with the learning rate that was picked, by task, budget and seed.

    Where validation rows judge, the first seed does not count: they have picked its learning rate.
    """
    found: dict[Pair, Record] = {}
    for task in study.tasks:
        for budget in study.budgets_of(method):
            search = book.find(study, study.searches(task, method, budget)[0])
            rate = None if search is None else picked(study, book, search["metric"], task, method, budget)
            for run in () if rate is None else study.repeats(task, method, budget, rate):
                record = book.find(study, run)
                if record is not None and run.seed in study.judged_seeds:
                    found[task, budget, run.seed] = record
    return found


def value(study: Study, record: Record) -> float:
    """What a run is judged by: the task's metric on the study's rows."""
    return record[study.judged_by][record["metric"]]


def difference(study: Study, ours: dict[Pair, Record], theirs: dict[Pair, Record]) -> Difference | None:
    """Of the runs that both have done; None without any.

    Runs of one task and seed share rows, their order and the head, whatever their budget: their differences are averaged first. Seeds are
    resampled within each task.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for pair in sorted(ours.keys() & theirs.keys()):
        task, _, seed = pair
        found.setdefault(task, {}).setdefault(seed, []).append(value(study, ours[pair]) - value(study, theirs[pair]))
    return (
        bootstrap([[statistics.fmean(part) for part in seeds.values()] for seeds in found.values()]) if found else None
    )


def found_by_method(study: Study, book: Book) -> Found:
    """The finished runs that count, by method."""
    return {method: results(study, book, method) for method in study.methods}


def page(study: Study, book: Book, pictures: Iterable[Path] = ()) -> str:
    """The page; ``pictures`` lie beside it."""
    found = found_by_method(study, book)
    every = [record for records in found.values() for record in records.values()]
    done = sum(len(records) for records in found.values())
    seeds = len(study.judged_seeds)
    what = {
        "test": "test rows, which nothing was chosen by",
        "validation": "validation rows, since the outcome chooses defaults; the first seed, whose learning rates they picked, is left out",
    }
    at = "" if study.pick_at is None else f" at r {study.pick_at.r} to {study.pick_at.target}"
    count = len(study.groups()) * seeds
    lines = [
        f"# Study: {study.name}",
        "",
        f"Made by `igulora study`; {done} of {count} runs that count, {seeds} seeds. Learning rates from one grid for all "
        f"({', '.join(f'{rate:g}' for rate in study.learning_rates)}), picked{at} on validation rows with the first seed (*: an end of the "
        f"grid was picked). Values are of {what[study.judged_by]}: median (quartiles) over seeds. Parameters: what trains, at the start "
        "and with the triplets that live at the end. Any row is run again by `igulora study FILE.toml --again "
        "TASK/METHOD/R-TARGET/lrRATE/seedSEED`, the key of its line in records.jsonl.",
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
        row = [f"`{method}`", spread.shown()]
        if reference is not None:
            gap = None if method == reference else difference(study, here, found[reference])
            row.append("" if gap is None else _shown(gap))
        seconds = statistics.median(record["seconds"] for record in here.values())
        live = statistics.median(record["trained_at_end"] for record in here.values())
        row += [
            str(len(here)),
            _rate(study, method, first),
            f"{first['trained_at_start']:,}",
            f"{live:,.0f}",
            f"{seconds:.0f}",
        ]
        rows.append(row)
    if not rows:
        return []
    minus = [] if reference is None else [f"minus `{reference}`"]
    header = ["method", metric, *minus, "seeds", "learning rate", "parameters", "at the end", "training, s"]
    return [f"## {task}, r {budget.r} to {budget.target}", "", table(header, rows)]


def _rate(study: Study, method: str, record: Record) -> str:
    """The learning rate, whether it lies at an end of the grid, and whose it is where it was borrowed."""
    rate, lender = record["settings"]["learning_rate"], study.methods[method].rate_of
    edge = len(study.learning_rates) > 1 and rate in (min(study.learning_rates), max(study.learning_rates))
    return f"{rate:g}{'*' if edge else ''}" + ("" if lender is None else f", that of `{lender}`")


def _shown(gap: Difference) -> str:
    if not math.isfinite(gap.low):
        return f"{gap.mean:+.3f}"
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
    what = f"{', '.join(metrics)}, r {budgets}, {len(study.judged_seeds)} seeds, {study.judged_by} rows; {link}."
    return "\n".join([what, "", *(_compared(gaps) if gaps else ["Nothing has been compared yet."])]).rstrip() + "\n"


def _compared(gaps: dict[tuple[str, str], Difference]) -> list[str]:
    columns = list(dict.fromkeys(other for _, other in gaps))
    rows = [
        [f"`{one}`", *(_shown(gaps[one, other]) if (one, other) in gaps else "" for other in columns)]
        for one in dict.fromkeys(one for one, _ in gaps)
    ]
    looked_at = len({frozenset(pair) for pair in gaps})
    return [
        "Mean of paired differences over the tasks and budgets that both ran at (row minus column), each task in its own metric, and its "
        f"{LEVEL:.0%} interval by {RESAMPLES:,} bootstrap resamples of the seeds of each task, expanded for few pairs; bold where it "
        f"leaves out zero. Of {looked_at} comparisons of equals {looked_at * (1 - LEVEL):.0f} or a few more would be bold by chance. Other "
        "seeds are what the interval speaks of, not other rows.",
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
                f"- `{better}` is better than `{worse}`: {abs(gap.mean):+.3f} over {gap.pairs} pairs."
            )
    return list(found.values())
