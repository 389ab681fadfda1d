"""What a study tells while it runs: a line per run, and on a terminal a bar with the time that is left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from igulora.training.extras import require

from .book import Book
from .conduct import Progress, done
from .plan import Study


class Telling:
    """Says to a ``rich.console.Console`` what each run reached, and how long the rest takes at the pace of this session's runs."""

    def __init__(self, console: Any, study: Study, book: Book) -> None:
        self._console, self._before, self._started = console, done(study, book), time.perf_counter()
        self._bar: Any = None
        if console.is_terminal:
            rich = require("rich.progress", "demo", "the progress bar")
            columns = (
                rich.TextColumn(study.name),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TextColumn("{task.description}"),
            )
            self._bar = rich.Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=study.count, completed=self._before)

    def __enter__(self) -> Telling:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """One run is done."""
        pace = (time.perf_counter() - self._started) / max(progress.done - self._before, 1)
        left = f"about {_minutes((progress.count - progress.done) * pace)} left"
        metric = progress.record["metric"]
        value = progress.record["validation"][metric]
        text = f"{progress.done}/{progress.count} {progress.run.key}: validation {metric} {value:.4f}, {left}"
        self._console.print(text, highlight=False, soft_wrap=True)
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.done, description=left)


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
