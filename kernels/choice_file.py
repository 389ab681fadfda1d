"""The file of measured choices: JSON, ``{"format": 1, "choices": {environment: {problem: entry}}}``.

An environment is a device with the versions of everything that decides how fast a kernel runs on it (``fused/choice.py``); an entry
names the form of the product to use and what was measured (``fused/tuning.py``). Several processes may write at once: each merges what it
measured into what the file holds, under a lock, and replaces the file as a whole. A damaged file counts as an empty one, after a warning,
and is replaced by the next writer.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from .settings import cache_folder

try:
    import fcntl
except ImportError:  # Windows: writers there may lose an entry to each other, never the file
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
_LOCK_TRIES, _LOCK_PAUSE = 200, 0.05  # seconds between tries; a writer holds the lock for milliseconds

Entries = dict[str, dict[str, Any]]  # problem -> entry


class ChoiceFileWarning(UserWarning):
    """Measured choices could not be read or kept."""


@cache
def warn_once(text: str) -> None:
    """Warn, the first time that this text comes up in a process."""
    warnings.warn(text, ChoiceFileWarning, stacklevel=3)


def path() -> Path:
    """Where the file lies, or would."""
    return cache_folder() / "choices.json"


def read() -> dict[str, Entries]:
    """All entries by environment; none where there is no file, or a damaged one."""
    place = path()
    try:
        return _checked(json.loads(place.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warn_once(
            f"igulora ignores its file of measured choices, {place}, which is damaged or cannot be read ({error}); 'igulora tune' writes "
            "it anew, 'igulora tune --clear' removes it"
        )
        return {}


def _checked(content: Any) -> dict[str, Entries]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected an object of format {FORMAT}")
    choices = content.get("choices")
    if not isinstance(choices, dict):
        raise ValueError("expected choices by environment")
    for entries in choices.values():
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("expected an object for each problem")
    return choices


def add(environment: str, entries: Mapping[str, dict[str, Any]]) -> bool:
    """Merge entries into the file; newer ones replace older ones. Returns whether it could be written (else there was a warning)."""
    place = path()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place):
            choices = read()
            choices.setdefault(environment, {}).update(entries)
            _replace(place, json.dumps({"format": FORMAT, "choices": choices}, indent=1) + "\n")
    except OSError as error:
        warn_once(
            f"igulora cannot keep measured choices in {place} ({error}); set IGULORA_CACHE_DIR to a folder that can be written"
        )
        return False
    return True


def clear() -> int:
    """Remove the file; returns how many entries it held.

    Raises:
        OSError: it cannot be removed.
    """
    place = path()
    if not place.exists():
        return 0
    with _locked(place), warnings.catch_warnings():
        warnings.simplefilter("ignore", ChoiceFileWarning)  # damaged: about to be gone
        count = sum(len(entries) for entries in read().values())
        place.unlink(missing_ok=True)
    return count


def _replace(place: Path, text: str) -> None:
    """Write beside and rename: a reader sees the old file or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, place)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Writers take turns; the lock file stays, since removing it would let two of them in."""
    with open(place.with_suffix(".lock"), "w") as file:
        for _ in range(_LOCK_TRIES if fcntl is not None else 0):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_PAUSE)
            except OSError:
                break  # a network file system without locks: the last writer wins there
        yield
