"""What a run tells while it goes: a progress bar on the console and one JSON line per logged event."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import to_json
from .extras import require


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, each with ``kind`` and ``step``."""

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        """Start a new file, or with ``resume_at`` keep the lines up to that step: later ones will be written again."""
        self.path = path
        lines = []
        if resume_at is not None and path.exists():
            lines = [to_json(event) + "\n" for event in read_metrics(path) if event["step"] <= resume_at]
        path.write_text("".join(lines), encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one event; complete on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json({"kind": kind, "step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


class Progress:
    """Progress bar with loss, budget, live triplets and steps per second; plain lines where the output is no terminal.

    ``console`` is a ``rich.console.Console``, or None to say nothing.
    """

    def __init__(self, console: Any, total: int, start: int = 0) -> None:
        self._console = console
        self._bar: Any = None
        self._total = total
        if console is not None and console.is_terminal:
            rich = require("rich.progress", "demo", "the progress bar")
            self._bar = rich.Progress(
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TextColumn("{task.fields[text]}"),
                rich.TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("Training", total=total, completed=start, text="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        """Move the bar; reads nothing from the device."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, loss: float, budget: int, live: int, rate: float) -> None:
        """Refresh the figures beside the bar, or print a line."""
        text = f"loss {loss:.3f}  budget {budget}  live {live}  {rate:.2f} it/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif self._console is not None:
            self._console.print(f"step {step}/{self._total}  {text}", highlight=False)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._console is not None:
            self._console.print(text, highlight=False)
