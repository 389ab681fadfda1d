"""A process that is killed leaves a checkpoint that fewer processes go on from."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

STOP = 30
CONFIG = {"total_steps": STOP, "t_init": 13, "t_final": 6, "window": 4, "estimator": "gauss"}


def newest(folder: Path) -> int:
    steps = [int(p.parent.name.partition("-")[2]) for p in folder.glob("step-*/checkpoint.json")]
    return max(steps, default=0)


@pytest.mark.slow
@pytest.mark.parametrize("killed_again", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(
    starter: Callable[..., Any], worker: ModuleType, tmp_path: Path, killed_again: bool
) -> None:
    """Of several processes the first dies while it saves; 1 goes on to where an uninterrupted run ends.

    Asked for, 4 begin, and before the 1, 2 go on, of which one dies in training.
    """
    seed = int.from_bytes(os.urandom(2), "big")
    print(f"seed {seed}")  # noqa: T201  shown where the test fails
    draw = random.Random(seed)
    folder = tmp_path / "run"
    folder.mkdir()
    options = {"folder": str(folder), "config": CONFIG, "stop": STOP, "every": 3}

    def begin(processes: int, **more: Any) -> list[Any]:
        place = tmp_path / str(processes)
        place.mkdir()
        (place / "scenarios.json").write_text(json.dumps({"run": ("resumed", {**options, **more})}))
        return starter(place, processes)

    def all_end(running: list[Any]) -> None:
        """The others notice by themselves: nobody waits for ever."""
        end = time.monotonic() + 60
        while any(p.poll() is None for p in running) and time.monotonic() < end:
            time.sleep(0.05)
        codes = [p.poll() for p in running]
        for process in running:
            process.kill()
            process.communicate()
        assert all(codes), f"expected every process to have ended with an error, got {codes} (seed {seed})"
        assert -signal.SIGKILL in codes

    # A checkpoint takes several renames; from the third checkpoint on, at any of them.
    all_end(begin(4 if killed_again else 2, die_at_rename=draw.randint(12, 30)))
    first = newest(folder)
    assert 0 < first < STOP
    if killed_again:
        running = begin(2, load=True, pause=0.05)
        end = time.monotonic() + 60
        while newest(folder) == first and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        running[draw.randrange(2)].kill()
        all_end(running)
        assert first < newest(folder) < STOP, f"seed {seed}"
    before = newest(folder)
    last = worker.resumed(0, 1, **options, load=True)
    assert last["first"].item() == before
    whole = worker.resumed(0, 1, folder="", config=CONFIG, stop=STOP)
    assert 0 < whole["live"].sum() < whole["live"].numel()
    assert torch.equal(last["live"], whole["live"])
    for name in ("weight", "mean", "deviation"):
        torch.testing.assert_close(last[name].detach(), whole[name].detach(), rtol=1e-9, atol=1e-12, msg=name)
