"""Deaths while saving, and damage to what was saved: the programs beside this file, in processes of their own; ``--long`` for more."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# In memory where there is such a folder: what is written matters here, and how often it is synced does not.
MEMORY = Path("/dev/shm")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills and forks")


def result(program: str, tmp_path: Path, *arguments: str, timeout: int = 280) -> dict[str, Any]:
    """What a program says it found; its standard error where it failed."""
    command = [sys.executable, str(HERE / program), *arguments]
    # From an empty folder: the root on the path would make a top-level ``kernels`` importable.
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return ast.literal_eval(done.stdout)


def folder(tmp_path: Path) -> tuple[str, str]:
    place = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    return "--folder", str(place)


def test_the_newest_checkpoint_loads_after_a_kill_at_a_random_moment(tmp_path: Path) -> None:
    found = result("kill.py", tmp_path, "--part", "random", "--count", "40", "--folder", str(tmp_path))
    assert found["kills"] == 40
    assert found["fell"]["writing"] > 0


def test_the_newest_checkpoint_loads_after_a_death_before_any_call_of_a_save(tmp_path: Path) -> None:
    found = result("kill.py", tmp_path, "--part", "every", *folder(tmp_path))
    assert min(found["points"].values()) > 20


def test_damaged_files_are_refused_or_load_what_was_saved(tmp_path: Path) -> None:
    found = result("fuzz.py", tmp_path, "--count", "1000", *folder(tmp_path))
    assert found["cases"] == 1000
    assert min(found["ended"][kind] for kind in ("adapter loaded", "adapter refused", "checkpoint refused")) > 100


@pytest.mark.long
def test_more_kills(tmp_path: Path) -> None:
    assert result("kill.py", tmp_path, "--count", "400", "--folder", str(tmp_path), timeout=900)["kills"] == 400


@pytest.mark.long
def test_more_damage(tmp_path: Path) -> None:
    found = result("fuzz.py", tmp_path, "--count", "20000", "--seed", "100000", *folder(tmp_path), timeout=1800)
    assert found["cases"] == 20000


def test_the_last_long_results_are_kept() -> None:
    kept = json.loads((HERE / "results.json").read_text())
    assert kept["kill"]["kills"] >= 200
    assert kept["fuzz"]["cases"] >= 2000
    assert all(entry.keys() >= {"date", "machine", "versions", "seconds"} for entry in kept.values())
