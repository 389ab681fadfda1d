"""Several files of one folder replaced as a whole, whatever moment the process dies at.

A save goes in four steps, the second of which is the one that counts:

1. All files are written into ``.igulora-partial-*`` inside the folder and synced.
2. That folder is renamed to ``.igulora-complete``, which is atomic. From here on the new files are the valid ones.
3. They are moved, one by one, over the files of their names.
4. The empty ``.igulora-complete`` is removed.

A reader asks :func:`place` for each file: the one in ``.igulora-complete`` if it is there, else the one in the folder itself. So before
step 2 it finds the old files, all of them, and after it the new ones, wherever the moving stopped; the next save finishes the moving first.
Files keep their fixed names, other files in the folder are never touched, and nothing beside the folder is: it may be a mount point
whose parent is read-only. All it asks of the file system is a rename that is atomic, as local and NFS ones are (object stores mounted as
folders are not: save elsewhere and copy).

A program that knows nothing of ``.igulora-complete`` sees files of two saves if the process dies within step 3, which takes a few renames;
descriptions (JSON) move last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from .files import sync_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PARTIAL, COMPLETE = ".igulora-partial-", ".igulora-complete"
_ABANDONED_AFTER = 24 * 3600  # seconds; only where the file system has no locks


def place(directory: Path, name: str) -> Path:
    """Where the valid file ``name`` of ``directory`` lies; it may not exist."""
    moving = directory / COMPLETE / name
    return moving if moving.is_file() else directory / name


@contextlib.contextmanager
def save_whole(directory: Path, obsolete: Iterable[str] = ()) -> Iterator[Path]:
    """Give a fresh folder to write files into; at the end of the block they replace those of ``directory`` all at once.

    After an exception ``directory`` is as it was (and gone, if it was not there). Folders that killed saves left are removed first.

    Args:
        directory: made when missing.
        obsolete: names of files of an earlier save, removed at the end unless this one wrote them.

    Raises:
        ValueError: ``directory`` is a file, or a file to write has the name of a folder in it. OSError: the disk is full, or read-only.
    """
    made = _make(directory)
    partial = directory / f"{PARTIAL}{secrets.token_hex(6)}"
    lock: int | None = None
    try:
        finish(directory)
        _remove_abandoned(directory)
        partial.mkdir()
        lock = _lock(partial)
        yield partial
        names = os.listdir(partial)
        for name in names:
            if (directory / name).is_dir():
                raise ValueError(f"expected to write the file {name} in {directory}, found a folder of that name")
        sync_folder(partial)
        _commit(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: another process saves there
                folder.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)
    finish(directory)
    for name in set(obsolete).difference(names):
        (directory / name).unlink(missing_ok=True)


def finish(directory: Path) -> None:
    """Move the files of a complete save to their places (steps 3 and 4). Several processes may do so at once."""
    complete = directory / COMPLETE
    try:
        names = os.listdir(complete)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in sorted(names, key=lambda n: (n.endswith(".json"), n)):
        with contextlib.suppress(FileNotFoundError):  # moved by another process
            os.replace(complete / name, directory / name)
    sync_folder(directory)
    with contextlib.suppress(OSError):  # gone, or another process has put its save there meanwhile
        complete.rmdir()


_T = TypeVar("_T")


def settled(directory: Path, names: Iterable[str], read: Callable[[], _T]) -> _T:
    """What ``read`` returns, tried again if it failed while another process replaced the files ``names`` under its hands."""
    names = tuple(names)
    for _ in range(5):
        before = _identities(directory, names)
        try:
            return read()
        except (ValueError, FileNotFoundError):
            if _identities(directory, names) == before:
                raise
    return read()


def _identities(directory: Path, names: Iterable[str]) -> list[tuple[int, int] | None]:
    found: list[tuple[int, int] | None] = []
    for name in names:
        try:
            stat = place(directory, name).stat()
            found.append((stat.st_ino, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def _make(directory: Path) -> list[Path]:
    """Make a folder and those above it; returns the ones made, innermost first."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"expected a folder to save into, got the file {directory}")
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)
    return missing


def _commit(partial: Path, directory: Path) -> None:
    while True:
        try:
            os.rename(partial, directory / COMPLETE)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finish(directory)  # another process completed a save since ours began: ours is the later one
    sync_folder(directory)


def _lock(folder: Path) -> int | None:
    """A lock on ``folder`` that ends with this process, however it ends: its folder is not an abandoned one. None where there are none."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed saves left, but nothing that a running one is writing."""
    for folder in directory.glob(f"{PARTIAL}*"):
        try:
            lock = _lock(folder)
            if lock is None and time.time() - folder.stat().st_mtime < _ABANDONED_AFTER:
                continue
        except OSError:  # gone, or not ours to open
            continue
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)
