"""`pytest benchmarks`: every entry runs, compares before it times, and stays out of the ordinary test run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from igulora.benchmarks.test_operators import compare

ROOT = Path(__file__).resolve().parents[2]


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on the checkout; -P keeps the repository root off sys.path."""
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_entry_runs_and_computes_what_it_replaces() -> None:
    pytest.importorskip(
        "pytest_benchmark", reason="needs pytest-benchmark; in igulora's folder: pip install '.[bench]'"
    )
    done = _pytest("benchmarks", "--tiny", "--benchmark-disable", "--verbose")
    assert done.returncode == 0, done.stdout
    operators = (
        "svd_linear_forward",
        "svd_linear_with_path_rows",
        "svd_project",
        "svd_update",
        "importance_update",
        "orthogonality_grad",
        "allocate_triplets",
    )
    passed = [line for line in done.stdout.splitlines() if " PASSED" in line]
    for operator in operators:
        for which in ("igulora", "pytorch"):
            assert any(f"test_{operator}[" in line and which in line for line in passed), operator


@pytest.mark.slow
def test_without_the_plugin_entries_are_skipped_with_how_to_install_it() -> None:
    done = _pytest("benchmarks", "--tiny", "-p", "no:benchmark")
    assert done.returncode == 0, done.stdout
    assert "needs pytest-benchmark; in igulora's folder: pip install '.[bench]'" in done.stdout
    assert " passed" not in done.stdout


def test_an_ordinary_run_does_not_collect_them() -> None:
    done = _pytest("--collect-only", "--ignore-glob=tests/*")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout


class _Benchmark:
    """What pytest-benchmark's fixture is to an entry."""

    group: str | None = None

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, run: Callable[[], Any]) -> None:
        self.calls += 1
        run()


@pytest.mark.parametrize("which", ["igulora", "pytorch"])
def test_the_entry_that_is_asked_for_is_timed(which: str) -> None:
    ran: list[str] = []

    def one(name: str) -> torch.Tensor:
        ran.append(name)
        return torch.ones(3)

    benchmark = _Benchmark()
    compare(benchmark, "group", which, lambda: one("igulora"), lambda: one("pytorch"))
    assert benchmark.group == "group"
    assert ran == ["igulora", "pytorch", which]


@pytest.mark.parametrize(
    ("second", "dtype"), [(1.1, torch.bfloat16), (1.001, torch.float32), (float("nan"), torch.float32)]
)
def test_what_computes_something_else_is_not_timed(second: float, dtype: torch.dtype) -> None:
    benchmark = _Benchmark()
    ours, plain = (torch.ones(3), torch.ones(2)), (torch.ones(3), torch.full((2,), second))
    with pytest.raises(AssertionError, match="output 1 of group: off by"):
        compare(benchmark, "group", "igulora", lambda: ours, lambda: plain, dtype)
    assert benchmark.calls == 0
