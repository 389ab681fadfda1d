"""The GPU tests as a part of the suite: each file in a process of its own, several at once, since most of their time is compilation."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_machine import Deadline, Setting

ROOT = Path(__file__).resolve().parents[1]
# What the long ones took on an H100: they start first, so that none is left to run alone. Others take less than any of these.
_SECONDS = {
    "test_steps.py": 122,
    "test_svd_linear.py": 115,
    "test_svd_project.py": 95,
    "test_rows_and_dropout.py": 66,
    "test_choice.py": 46,
    "test_svd_update.py": 45,
    "test_graphs.py": 43,
}
_INTERPRETED = (
    "test_counted.py",
    "test_traffic.py",
)  # they count loads and stores, which only Triton's interpreter can
_TEXT = 4000  # characters of a failure's report that are kept
_GRACE = 10  # seconds that pytest has to write its report once it was interrupted
# A shell's background jobs ignore interrupts, and so do their children unless they say otherwise.
_PYTEST = """import signal, sys
import pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))
"""


def files(setting: Setting) -> list[Path]:
    """Test files that a device can run, those that take longest first."""
    if setting.tiny:
        return [ROOT / "tests/gpu/test_steps.py"]
    folders = ["tests/gpu"] if setting.quick else ["tests/gpu", "tests/kernels/fused"]
    found = [file for folder in folders for file in sorted((ROOT / folder).glob("test_*.py"))]
    if setting.device.type == "cuda":
        found = [file for file in found if file.name not in _INTERPRETED]
    return sorted(found, key=lambda file: -_SECONDS.get(file.name, 0))


def _environment(setting: Setting) -> dict[str, str]:
    """That of a plain test run: what a user forced on the operators does not reach it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("IGULORA_BACKEND", "IGULORA_TUNE")}
    if setting.device.type == "cuda":
        kept.pop("TRITON_INTERPRET", None)
    return kept


class _Run:
    """pytest on one file."""

    def __init__(self, file: Path, folder: Path, setting: Setting) -> None:
        self.file = file
        self.report = folder / f"{file.parent.name}-{file.stem}.xml"
        self.output = folder / f"{file.parent.name}-{file.stem}.txt"
        command = [sys.executable, "-c", _PYTEST]
        command += [str(file), "-q", "--maxfail=20", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-k", "waits or errors"] if setting.tiny else []
        command += [f"--junitxml={self.report}", f"--rootdir={ROOT}"]
        self.started = time.time()
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=_environment(setting)
            )

    def stop(self) -> None:
        """Interrupt: pytest then still reports what it has run."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def result(self, *, cut: bool) -> dict[str, Any]:
        """Counts, and the text of each failure."""
        found: dict[str, Any] = {"seconds": round(time.time() - self.started, 1), "exit": self.process.returncode}
        if cut:
            found["cut"] = "the part's time was over while it ran"
        if not self.report.exists():
            text = self.output.read_text(encoding="utf-8", errors="replace")
            return found | {"error": f"pytest left no report:\n{text[-_TEXT:]}"}
        found |= read_report(self.report)
        if cut and b"KeyboardInterrupt" in self.output.read_bytes():
            found["passed"] = max(found["passed"] - 1, 0)  # the report lists the test under way without an outcome
        return found


def read_report(report: Path) -> dict[str, Any]:
    """Counts and failures of a JUnit report."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, reasons = [], set()
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if problem is not None:
            counts["failed"] += 1
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append(
                {"test": name, "message": problem.get("message", ""), "text": (problem.text or "")[-_TEXT:]}
            )
        elif skip is not None:
            counts["skipped"] += 1
            reasons.add(skip.get("message", ""))
        else:
            counts["passed"] += 1
    return {**counts, "failures": failures, "skip_reasons": sorted(reasons)}


def run(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """All files, as many at once as there are pairs of cores, up to eight."""
    if importlib.util.find_spec("pytest") is None:
        return {"error": "pytest is not installed here"}
    waiting, results = files(setting), {}
    most = min(max((os.cpu_count() or 1) // 2, 1), 8)
    running: list[_Run] = []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < most and not deadline.passed:
                running.append(_Run(waiting.pop(0), Path(folder), setting))
            if deadline.left < _GRACE:
                for each in running:
                    each.stop()
                    results[_name(each.file)] = each.result(cut=True)
                results |= {_name(file): {"cut": "the part's time was over"} for file in waiting}
                break
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                results[_name(each.file)] = each.result(cut=False)
            time.sleep(0.2)
    counts = {key: sum(r.get(key, 0) for r in results.values()) for key in ("passed", "failed", "skipped")}
    return {**counts, "files": results}


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def items(setting: Setting) -> Iterator[tuple[str, Callable[[Deadline], dict[str, Any]]]]:
    """One item: all tests."""
    yield "pytest", lambda deadline: run(setting, deadline)
