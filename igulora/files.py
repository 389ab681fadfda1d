"""Files written whole or not at all, and read with their contents checked: safetensors and JSON only."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside ``path`` and rename: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text; NaN and infinity, which JSON has no words for, become null."""

    def plain(v: Any) -> Any:
        if isinstance(v, float) and not math.isfinite(v):
            return None
        if isinstance(v, dict):
            return {key: plain(item) for key, item in v.items()}
        return [plain(item) for item in v] if isinstance(v, (list, tuple)) else v

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = to_json(value, indent=2) + "\n"

    def write(place: Path) -> None:
        place.write_text(text, encoding="utf-8")

    _atomically(path, write)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors atomically as safetensors, on the CPU and contiguous."""
    ready = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
    _atomically(path, lambda p: save_file(ready, p, metadata={"format": "pt", **(metadata or {})}))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the file {path.name} in {path.parent}, found none; is this an igulora folder?"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"expected JSON in {path}, got something else ({error}); the file is damaged or foreign"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(value).__name__}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is truncated or no safetensors file.
    """
    return _reading(path, lambda: load_file(path))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; raises as :func:`read_tensors` does."""

    def read() -> dict[str, str]:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})

    return _reading(path, read)


_T = TypeVar("_T")


def _reading(path: Path, read: Callable[[], _T]) -> _T:
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the file {path.name} in {path.parent}, found none; is this an igulora folder?"
        )
    try:
        return read()
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"expected a complete safetensors file at {path}, got one that is truncated or foreign ({error}); copy or save it again"
        ) from error
