"""Run what of a study is not done yet: learning rates first, then the seeds with the rate that validation rows picked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import torch

from igulora.errors import first_line, nearest

from .. import allocator
from ..machine import circumstances
from .book import Book, Record
from .configuring import check
from .plan import Budget, Run, Study, row_name
from .tasks import Prepared
from .training import train


class Progress(NamedTuple):
    """What a study tells after each run: the run, its record, and how many are done, of how many."""

    run: Run
    record: Record
    done: int
    count: int


Say = Callable[[Progress], None]


def picked(study: Study, book: Book, metric: str, task: str, method: str, budget: Budget) -> float | None:
    """The learning rate that validation rows pick; None where a search is not done.

    It is the lowest whose metric is within the study's tolerance of the best: of rates that differ by no more than seeds do, the one
    farthest from those at which training fails, so that it holds for seeds that picked nothing.
    """
    found: dict[float, float] = {}
    for run in study.searches(task, method, budget):
        record = book.find(study, run)
        if record is None:
            return None
        found[run.learning_rate] = record["validation"][metric]
    return min(rate for rate in found if found[rate] >= max(found.values()) - study.tolerance)


def runs_of(study: Study, book: Book, task: str, method: str, budget: Budget) -> list[Run]:
    """The runs of a group whose learning rates are known: its searches, and once they are done its seeds."""
    searches = study.searches(task, method, budget)
    first = book.find(study, searches[0])
    rate = None if first is None else picked(study, book, first["metric"], task, method, budget)
    return searches if rate is None else [*searches, *study.repeats(task, method, budget, rate)]


def conduct(study: Study, book: Book, say: Say, jobs: int = 1) -> None:
    """Do all runs that the book lacks.

    Args:
        study, book: what to do and what is done; a finished run is in the book at once.
        say: called after each run.
        jobs: runs at the same time, each in a process of its own with its share of this process's threads; 1 runs them in this process.

    Raises:
        ValueError: a method's options do not fit, the book holds a run with other settings, another process writes to it, or a run failed.
        ImportError: a method's library is not installed.
    """
    check(study)
    where = {**circumstances(), "threads": max(torch.get_num_threads() // jobs, 1), "jobs": jobs}
    if jobs > 1:
        for spec in study.tasks.values():  # what data lack is said here, before there are processes
            Prepared(spec)
    with book.writing(), _workers(jobs, where["threads"]) as executor:
        underway: dict[Future[Record], Run] = {}

        def keep(future: Future[Record]) -> None:
            run = underway.pop(future)
            record = book.add(study, run, {**_result(future, run), **where})
            say(Progress(run, record, done(study, book), study.count))

        try:
            while True:
                for run in _missing(study, book, set(underway.values()), jobs - len(underway)):
                    underway[executor.submit(_train, *_work(study, run))] = run
                if not underway:
                    return
                for future in wait(underway, return_when=FIRST_COMPLETED).done:
                    keep(future)
        except BaseException:
            # Ctrl-C, or a run that failed: what is under way beside it is finished and kept; a second Ctrl-C leaves it.
            for future in wait(underway).done:
                if future.exception() is None:
                    keep(future)
            raise


def _result(future: Future[Record], run: Run) -> Record:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"expected {run.key}, or what ran beside it, to end, but its process was stopped: out of memory? Lower --jobs"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"expected {run.key} to train, got {type(error).__name__}: {first_line(error)}") from error


def _work(study: Study, run: Run) -> tuple[Run, Any, Any, Any]:
    return run, study.methods[run.method], study.training_of(run.method), study.tasks[run.task]


def done(study: Study, book: Book) -> int:
    """How many of a study's runs the book has."""
    return len({run for group in study.groups() for run in runs_of(study, book, *group) if book.find(study, run)})


def row(study: Study, book: Book, key: str) -> list[Run]:
    """The recorded runs that count in a row of the tables, "TASK/METHOD/R-TARGET", or the one of a whole key.

    Raises:
        ValueError: the book has no such run, or the study no longer has it.
    """
    known = {key.rsplit("/", 2)[0] for key in book.records} | book.records.keys()
    if key not in known:
        raise ValueError(
            f"expected the key of a recorded run, or its first three parts, got {key!r}.{nearest(key, known)}"
        )
    runs = study.possible()
    if key in book.records:
        if key not in runs:
            raise ValueError(
                f"expected a run that the study's file still asks for, got {key!r}; put its method, budget, rate and seed back"
            )
        return [runs[key]]
    group = next((group for group in study.groups() if row_name(*group) == key), None)
    if group is None:
        raise ValueError(
            f"expected a row that the study's file still asks for, got {key!r}; put its method and budget back"
        )
    counting = runs_of(study, book, *group)[len(study.learning_rates) :]
    return [run for run in counting if book.find(study, run)]


def again(study: Study, book: Book, run: Run) -> tuple[Record, Record]:
    """A recorded run and what it gives now, on this machine and with this code, with as many threads."""
    record = book.find(study, run)
    assert record is not None
    torch.set_num_threads(record["threads"])
    return record, _train(*_work(study, run))


def _missing(study: Study, book: Book, underway: set[Run], most: int) -> list[Run]:
    """The next runs, at most so many."""
    found: list[Run] = []
    for group in study.groups():
        for run in runs_of(study, book, *group):
            if len(found) >= most:
                return found
            if run not in underway and run not in found and book.find(study, run) is None:
                found.append(run)
    return found


@cache
def _prepared(task: Any) -> Prepared:
    return Prepared(task)


def _train(run: Run, method: Any, training: Any, task: Any) -> Record:
    return train(run, method, training, _prepared(task))


class _Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _workers(jobs: int, threads: int) -> AbstractContextManager[Executor]:
    if jobs == 1:
        return _Here()
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(threads,))


def _end_with_parent() -> None:
    """A pool's process whose parent was killed waits for work for ever, and keeps its memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _begin(threads: int) -> None:
    from igulora.cli.finetune import quieten_transformers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    allocator.keep_freed_memory(large=False)
    quieten_transformers()
