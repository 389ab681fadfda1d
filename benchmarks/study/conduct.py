"""Run what of a study is not done yet: learning rates first, then the seeds with the rate that validation rows picked."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache

from igulora.errors import nearest

from ..machine import circumstances
from .book import Book, Record
from .plan import Budget, Run, Study
from .tasks import Prepared
from .training import train

Say = Callable[[str], None]


def picked(study: Study, book: Book, metric: str, task: str, method: str, budget: Budget) -> float | None:
    """The learning rate of the grid with the best validation metric, the lower of equal ones; None where a search is not done."""
    found: dict[float, float] = {}
    for run in study.searches(task, method, budget):
        record = book.find(study, run)
        if record is None:
            return None
        found[run.learning_rate] = record["validation"][metric]
    return max(sorted(found), key=lambda rate: found[rate])


def conduct(study: Study, book: Book, say: Say) -> None:
    """Do all runs that the book lacks; a line of ``say`` after each, with the time that is left as the runs before it took."""
    when = circumstances()  # once, now: what is committed while a study runs is not what runs
    done, taken = 0, [record["seconds_in_all"] for record in book.records.values() if "seconds_in_all" in record]
    tasks = cache(lambda name: Prepared(study.tasks[name]))

    def one(run: Run) -> Record:
        nonlocal done
        record = book.find(study, run)
        if record is None:
            found = train(run, study.methods[run.method], study.training, tasks(run.task))
            taken.append(found["seconds_in_all"])
            record = book.add(study, run, {**found, **when})
            metric = record["metric"]
            left = (study.count - done - 1) * statistics.median(taken)
            value = record["validation"][metric]
            say(f"{done + 1}/{study.count} {run.key}: validation {metric} {value:.4f}, about {_minutes(left)} left")
        done += 1
        return record

    for task, method, budget in study.groups():
        searched = [one(run) for run in study.searches(task, method, budget)]
        rate = picked(study, book, searched[0]["metric"], task, method, budget)
        assert rate is not None
        for run in study.repeats(task, method, budget, rate):
            if run.seed != study.seeds[0]:
                one(run)


def again(study: Study, book: Book, key: str) -> tuple[Record, Record]:
    """A recorded run and what it gives now, on this machine and with this code.

    Raises:
        ValueError: the book has no such run, or the study no longer has it.
    """
    runs = {
        run.key: run for group in study.groups() for rate in study.learning_rates for run in study.repeats(*group, rate)
    }
    if key not in book.records or key not in runs:
        raise ValueError(f"expected the key of a recorded run, got {key!r}.{nearest(key, book.records)}")
    run = runs[key]
    record = book.find(study, run)
    assert record is not None
    return record, train(run, study.methods[run.method], study.training, Prepared(study.tasks[run.task]))


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
