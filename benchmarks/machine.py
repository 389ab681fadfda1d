"""What a run was measured on: machine and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from . import allocator

RESULTS = Path(__file__).resolve().parent / "results"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on.

    Args:
        device: where the steps ran; a CUDA device is recorded by its name.
    """
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text(encoding="utf-8")
        model = (re.search(r"model name\s*:\s*(.+)", text) or [None, model])[1]
        flags = set((re.search(r"flags\s*:\s*(.+)", text) or [None, ""])[1].split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cpu": model,
        "cores": os.cpu_count(),
        "bf16": sorted(flags & {"avx512_bf16", "amx_bf16", "avx512f", "avx2"}),
        "memory_gib": round(memory / 2**30, 1),
        "allocator": allocator.state(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def circumstances(device: str = "cpu") -> dict[str, Any]:
    """When and on what something is measured: what its record begins with."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Versions of what takes part, and the commit of this repository."""
    found = {}
    for name in ("igulora", "torch", "triton", "transformers", "peft", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"commit": _commit() or "unknown"}


def _commit() -> str:
    """The commit, with "-dirty" where files that Git knows were changed since; committed results are what a run adds to."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(RESULTS.parents[1]), *arguments], capture_output=True, text=True, check=False
        )

    commit = git("describe", "--always", "--abbrev=10", "--exclude=*").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results").returncode
    return f"{commit}-dirty" if commit and changed else commit
