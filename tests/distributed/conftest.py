"""Launches of several processes: many scenarios in one launch, since starting a process costs seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).with_name("worker.py")
Results = dict[str, list[dict[str, Tensor]]]


def start(folder: Path, processes: int, script: Path = WORKER) -> list[subprocess.Popen[str]]:
    """``script FOLDER RANK PROCESSES`` once per process, one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }  # accelerate asks for them; the processes meet at a file
    command = [sys.executable, "-W", "ignore::FutureWarning", str(script), str(folder)]
    return [
        subprocess.Popen(
            [*command, str(rank), str(processes)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for rank in range(processes)
    ]


def finish(running: list[subprocess.Popen[str]], limit: float = 200.0) -> list[str]:
    """Wait for all; where one fails the others, which wait for it, are ended. Returns what each wrote to its error stream."""
    end = time.monotonic() + limit
    while any(p.poll() is None for p in running) and not any(p.poll() for p in running) and time.monotonic() < end:
        time.sleep(0.05)
    late = all(p.poll() in (None, 0) for p in running) and any(p.poll() is None for p in running)
    for process in running:
        if process.poll() is None:
            process.kill()
    errors = [process.communicate()[1] for process in running]
    bad = "\n".join(f"process {i}:\n{errors[i][-3000:]}" for i, p in enumerate(running) if p.returncode)
    assert not bad, f"{'timed out' if late else 'failed'}\n{bad}"
    return errors


def launch(folder: Path, processes: int, scenarios: dict[str, tuple[str, dict[str, Any]]]) -> Results:
    """Results of every scenario by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    finish(start(folder, processes))
    return {name: [load_file(folder / f"{name}.{r}.safetensors") for r in range(processes)] for name in scenarios}


@pytest.fixture(scope="session")
def worker() -> ModuleType:
    """What the processes run, for the same run in this one."""
    spec = importlib.util.spec_from_file_location("igulora_tests_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def launcher() -> Callable[[Path, int, dict[str, Any]], Results]:
    """``launcher(folder, processes, scenarios)``: results by scenario and rank."""
    return launch


@pytest.fixture(scope="session")
def starter() -> Callable[[Path, int], list[subprocess.Popen[str]]]:
    """``starter(folder, processes)``: the running processes of a launch, for a test that ends them itself."""
    return start
