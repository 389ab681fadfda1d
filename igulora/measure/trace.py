"""Chrome traces of a profiled step, with the parts as a row of ranges above the operators."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

from torch.profiler import profile

from .attribution import STEP, Attribution
from .parts import State

PROCESS = "parts of the step"
_DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


def write_trace(profiler: profile, found: Attribution, file: Path) -> Path:
    """Write the profiler's trace with two rows more: the step's thread by part, and the device's kernels by part.

    Every operator and kernel of the step carries its part in its arguments (``"part"``).

    Args:
        file: ``.json`` or ``.json.gz``, for chrome://tracing or Perfetto; its folder is made.

    Raises:
        ValueError: another ending.
    """
    if not file.name.endswith((".json", ".json.gz")):
        raise ValueError(f"expected a trace file that ends in .json or .json.gz, got {file}")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        trace = json.loads(raw.read_text(encoding="utf-8"))
    events = trace["traceEvents"]
    for event in events:
        state = found.events.get(event.get("args", {}).get("External id", -1))
        if state is not None:
            event["args"]["part"] = state.part
    trace["traceEvents"] = events + _rows(events, found)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(trace)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, encoding="utf-8")
    return file


def _rows(events: list[dict[str, Any]], found: Attribution) -> list[dict[str, Any]]:
    # The trace counts microseconds from another start than the profiler's events do.
    step = next(e for e in events if e.get("name") == STEP and e.get("ph") == "X" and e.get("cat") == "user_annotation")
    shift = float(step["ts"]) - found.segments[0].start
    rows = [_name("process_name", 0, PROCESS), _name("thread_name", 0, "host")]
    rows += [_range(s.start + shift, s.end - s.start, s.state, 0) for s in found.segments]
    kernels = [e for e in events if e.get("cat") in _DEVICE_CATEGORIES and "part" in e.get("args", {})]
    if kernels:
        rows.append(_name("thread_name", 1, "device"))
        rows += [_range(float(e["ts"]), float(e["dur"]), State(e["args"]["part"]), 1) for e in kernels]
    return rows


def _range(start: float, length: float, state: State, row: int) -> dict[str, Any]:
    args = {"path rows": state.share} if 0 < state.share < 1 else {}
    return {
        "ph": "X", "cat": "part", "name": state.part, "pid": PROCESS, "tid": row, "ts": start, "dur": length, "args": args
    }  # fmt: skip


def _name(kind: str, row: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": PROCESS, "tid": row, "args": {"name": name}}
