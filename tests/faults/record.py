"""Keeps the last result of each long test in ``results.json``, with when, where and with what it ran."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors
import torch

import igulora
from igulora.benchmarks.machine import machine
from igulora.files import write_json

RESULTS = Path(__file__).parent / "results.json"


def record(name: str, result: dict[str, Any]) -> None:
    """Put ``result`` in the place of the last one called ``name``."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    versions = {"igulora": igulora.__version__, "torch": torch.__version__, "safetensors": safetensors.__version__}
    kept[name] = {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions, **result,
    }  # fmt: skip
    write_json(RESULTS, dict(sorted(kept.items())))
