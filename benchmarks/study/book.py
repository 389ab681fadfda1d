"""The records of a study: one JSON line per finished run, appended at once, so that a study that was stopped goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from igulora import IGUConfig

from ..recipes import resolved
from .configuring import recipe
from .plan import Run, Study, Training

try:
    import fcntl
except ImportError:  # not a Unix: two studies at work on one file are not noticed
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]


def settings(study: Study, run: Run) -> dict[str, Any]:
    """All that a run's result depends on, JSON-able: kept in its line, and compared when a study goes on."""
    method, training = study.methods[run.method], study.training_of(run.method)
    return {
        "task": dataclasses.asdict(study.tasks[run.task]),
        "method": {"name": method.name, "library": method.library, "method": method.method},
        "config": resolved(recipe(run, method, training)),
        "training": dataclasses.asdict(training),
        "budget": list(run.budget),
        "learning_rate": run.learning_rate,
        "seed": run.seed,
    }


class Book:
    """The lines of one file. Reading changes nothing; :meth:`writing` is for one process at a time.

    Raises:
        ValueError: a line is damaged (but for a last one that was cut off, which does not count).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self._known: set[str] = set()  # keys whose settings were compared
        self._file: BinaryIO | None = None
        if path.exists():
            self._read(path.read_bytes())

    def _read(self, content: bytes) -> int:
        """Take what lines there are; the length of those that are whole."""
        self.records.clear()
        self._known.clear()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"expected a JSON object with a key in line {number} of {self.path}, got {line!r:.100}; take it out to run it again"
                ) from error
        return len(whole)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the block :meth:`add` appends; a last line that was cut off is gone.

        Raises:
            ValueError: another process writes to the file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise ValueError(
                        f"expected no other study at work on {self.path}, one is; wait for it, or give this one another --output"
                    ) from error
            file.seek(0)
            file.truncate(self._read(file.read()))
            self._file = file
            try:
                yield
            finally:
                self._file = None

    def find(self, study: Study, run: Run) -> Record | None:
        """The record of a run, if it is done.

        Raises:
            ValueError: it was done with other settings.
        """
        record = self.records.get(run.key)
        if record is None or run.key in self._known:
            return record
        wanted = json.loads(json.dumps(settings(study, run)))
        kept = _with_later_fields(record["settings"])
        different = [name for name in wanted if kept.get(name) != wanted[name]]
        if different:
            raise ValueError(
                f"expected {run.key} in {self.path} with the study's settings, got others for {', '.join(different)}; give the study "
                "another --output, or take its lines out"
            )
        self._known.add(run.key)
        return record

    def add(self, study: Study, run: Run, found: dict[str, Any]) -> Record:
        """Append the result of a run, inside :meth:`writing`; it is on the disk when this returns.

        Raises:
            OSError: the disk is full; the file is as it was.
        """
        assert self._file is not None
        record = {"key": run.key, "settings": settings(study, run), **found}
        line, size = (json.dumps(record) + "\n").encode(), os.fstat(self._file.fileno()).st_size
        if self._file.write(line) != len(line):  # a full disk takes part of it
            self._file.truncate(size)
            raise OSError(
                f"expected room for {len(line)} bytes at the end of {self.path}, there is less; free some and go on"
            )
        os.fsync(self._file.fileno())
        self.records[run.key] = record
        return record


def _with_later_fields(recorded: Record) -> Record:
    """Settings with the fields that Training and IGUConfig had not yet, at their defaults. All else is as it was recorded."""
    filled = {**recorded, "training": {**dataclasses.asdict(Training()), **recorded["training"]}}
    if recorded["method"]["library"] == "igulora":
        try:
            options = IGUConfig.from_dict(recorded["config"]["options"]).to_dict()
        except (ValueError, TypeError):  # an option that no longer is, or no longer fits
            return filled
        filled["config"] = {**recorded["config"], "options": options}
    return filled
