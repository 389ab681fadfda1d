"""What a study's finished runs say: those that count, by method, and the paired differences between methods."""

from __future__ import annotations

from .book import Book, Record
from .conduct import picked
from .intervals import Difference, bootstrap
from .plan import Budget, Study

Pair = tuple[str, Budget, int]
Found = dict[str, dict[Pair, Record]]


def results(study: Study, book: Book, method: str) -> dict[Pair, Record]:
    """The finished runs of a method that count, with the learning rate that was picked, by task, budget and seed."""
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
    """Of the runs that both have done; None without any. Seeds are resampled within each task and budget."""
    found: dict[tuple[str, Budget], list[float]] = {}
    for pair in sorted(ours.keys() & theirs.keys()):
        found.setdefault(pair[:2], []).append(value(study, ours[pair]) - value(study, theirs[pair]))
    return bootstrap(list(found.values())) if found else None


def found_by_method(study: Study, book: Book) -> Found:
    """The finished runs that count, by method."""
    return {method: results(study, book, method) for method in study.methods}


def comparisons(study: Study, found: Found) -> dict[tuple[str, str], Difference]:
    """Every method minus those that it, or its study, is compared with; without any in the whole study each is compared with each."""
    names = [name for name in study.methods if found[name]]
    gaps = {
        (one, other): difference(study, found[one], found[other])
        for one in names
        for other in study.against_of(one)
        if one != other
    }
    return {pair: gap for pair, gap in gaps.items() if gap is not None}
