"""The records of a study: one JSON line per finished run, appended at once, so that a study that was stopped goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from .plan import Run, Study, Training

Record = dict[str, Any]


def settings(study: Study, run: Run) -> dict[str, Any]:
    """All that a run's result depends on, JSON-able: kept in its line, and compared when a study goes on."""
    method = dataclasses.asdict(study.methods[run.method])
    return {
        "task": dataclasses.asdict(study.tasks[run.task]),
        "method": {name: value for name, value in method.items() if name not in ("rate_of", "budgets")},
        "training": dataclasses.asdict(study.training_of(run.method)),
        "budget": list(run.budget),
        "learning_rate": run.learning_rate,
        "seed": run.seed,
    }


class Book:
    """The lines of one file.

    Raises:
        ValueError: a line is damaged (but for a last one that was cut off, which is dropped).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole, _, cut = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"expected a JSON object with a key in line {number} of {self.path}, got {line!r:.100}; take it out to run it again"
                ) from error
        if cut:
            self.path.write_text(whole + "\n" if whole else "", encoding="utf-8")

    def find(self, study: Study, run: Run) -> Record | None:
        """The record of a run, if it is done.

        Raises:
            ValueError: it was done with other settings.
        """
        record = self.records.get(run.key)
        if record is None:
            return None
        wanted = json.loads(json.dumps(settings(study, run)))
        record["settings"]["training"] = (
            dataclasses.asdict(Training()) | record["settings"]["training"]
        )  # fields that came later
        if record["settings"] != wanted:
            different = [name for name in wanted if record["settings"].get(name) != wanted[name]]
            raise ValueError(
                f"expected {run.key} in {self.path} with the study's settings, got others for {', '.join(different)}; give the study "
                "another --output, or take its lines out"
            )
        return record

    def add(self, study: Study, run: Run, found: dict[str, Any]) -> Record:
        """Append the result of a run; it is on the disk when this returns."""
        record = {"key": run.key, "settings": settings(study, run), **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[run.key] = record
        return record
