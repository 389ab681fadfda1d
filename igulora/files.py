"""Single files, written whole or not at all and read with their contents checked: safetensors and JSON only, never pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

# Longest JSON text, and longest header of a safetensors file, that is read: some 400,000 names of tensors.
MAX_TEXT = 64 * 2**20


# -- writing ----------------------------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable, where the file system knows of that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems sync files only
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text; NaN and infinity, which JSON has no words for, become null."""

    def plain(v: Any) -> Any:
        if isinstance(v, float) and not math.isfinite(v):
            return None
        if isinstance(v, dict):
            return {key: plain(item) for key, item in v.items()}
        return [plain(item) for item in v] if isinstance(v, (list, tuple)) else v

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def put_json(path: Path, value: Any) -> None:
    """Write JSON into a new file and sync it; for folders that are made whole otherwise (:func:`igulora.folders.save_whole`)."""
    path.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")
    _sync_file(path)


def put_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors into a new safetensors file, on the CPU and contiguous, and sync it; see :func:`put_json`."""
    ready = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
    save_file(ready, path, metadata={"format": "pt", **(metadata or {})})
    # safetensors makes files that nobody else may read; a folder just made says what the umask allows.
    os.chmod(path, path.parent.stat().st_mode & 0o666)
    _sync_file(path)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file atomically."""
    to_json(value)  # what JSON cannot say is found before the folder is made
    _atomically(path, lambda place: put_json(place, value))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file atomically, on the CPU and contiguous."""
    _atomically(path, lambda place: put_tensors(place, tensors))


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside ``path`` and rename: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# -- digests ----------------------------------------------------------------------------------------------------------


def file_digest(path: Path) -> dict[str, Any]:
    """``{"bytes", "sha256"}`` of a file."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_size(path: Path, expected: Any) -> None:
    """Compare a file's size with that of a recorded digest: before it is opened, so that no memory is taken for what it claims.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is truncated, or of another save.
    """
    _check_there(path)
    if not isinstance(expected, dict) or not expected.keys() >= {"bytes", "sha256"}:
        raise ValueError(
            f"expected a size and a checksum recorded for {path}, got {shown(expected)}; the description is damaged"
        )
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(
            f"expected {shown(expected['bytes'])} bytes in {path}, got {size}; the file is truncated or of another save: take an "
            "earlier copy"
        )


def check_digest(path: Path, expected: Any) -> None:
    """Compare a file with the digest that was recorded when it was written.

    Raises:
        FileNotFoundError: there is no such file. ValueError: they differ: the file is damaged, or of another save.
    """
    check_size(path, expected)
    if file_digest(path)["sha256"] != expected["sha256"]:
        raise ValueError(
            f"expected {path} to have the checksum recorded for it, got other contents; the file is damaged or of another save: take "
            "an earlier copy"
        )


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` with a checksum of itself under "digest"."""
    body = {key: item for key, item in value.items() if key != "digest"}
    # As it will be read: what JSON changes (tuples, NaN) is changed before it is counted.
    text = json.dumps(json.loads(to_json(body)), sort_keys=True, separators=(",", ":"))
    return {**body, "digest": hashlib.sha256(text.encode()).hexdigest()}


def check_seal(path: Path, value: dict[str, Any]) -> None:
    """Raise ValueError unless ``value``, read from ``path``, is as :func:`sealed` left it."""
    if sealed(value)["digest"] != value.get("digest"):
        raise ValueError(
            f"expected {path} to have the checksum recorded in it, got other contents; the file is damaged or was edited: take an "
            "earlier copy"
        )


# -- reading ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object: no key twice, no NaN or infinity, at most ``MAX_TEXT`` bytes.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not a JSON object, or too long or too deeply nested for one of ours.
    """
    _check_there(path)
    size = path.stat().st_size
    if size > MAX_TEXT:
        raise ValueError(
            f"expected at most {MAX_TEXT} bytes of JSON in {path}, got {size}; the file is damaged or foreign"
        )
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_twins, parse_constant=_no_constant
        )
        json.dumps(value)  # as deep as this, so that whoever goes through it later may
    except (
        ValueError,
        RecursionError,
        OSError,
    ) as error:  # ValueError: also of bytes that are no text, and of huge numbers
        raise ValueError(
            f"expected JSON in {path}, got something else ({shown(error)}); the file is damaged or foreign"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(value).__name__}")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have")


def shown(value: object) -> str:
    """At most a line of what a file holds, for a message."""
    text = str(value) if isinstance(value, BaseException) else repr(value)
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:200] + "..."


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds: ``tensors`` name -> (dtype, shape), ``metadata``; no tensor has been read."""

    path: Path
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    metadata: dict[str, str]


# Of the dtypes that safetensors knows, those that igulora writes. What a float8 or a complex number means here nobody has said.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_header(path: Path) -> Header:
    """Names, dtypes and shapes of a safetensors file; the library checks that they fit the file's size.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is truncated, no safetensors file, or has a dtype that none of ours has.
    """
    _check_there(path)

    def read() -> Header:
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > MAX_TEXT:
            raise ValueError(f"a header of {length} bytes")
        tensors = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise ValueError(f"the dtype {part.get_dtype()} of {name!r}")
                tensors[name] = (_DTYPES[part.get_dtype()], tuple(part.get_shape()))
            return Header(path, tensors, dict(file.metadata() or {}))

    return _reading(path, read)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is truncated or no safetensors file.
    """
    read_header(path)
    return _reading(path, lambda: load_file(path))


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file onto the CPU; raises as :func:`read_tensors` does."""

    def read() -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    _check_there(path)
    return _reading(path, read)


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the file {path.name} in {path.parent}, found none; is this an igulora folder?"
        )


_T = TypeVar("_T")


def _reading(path: Path, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except (SafetensorError, ValueError, OSError, MemoryError) as error:
        raise ValueError(
            f"expected a complete safetensors file at {path}, got one that is truncated or foreign ({shown(error)}); copy or save it "
            "again"
        ) from error
