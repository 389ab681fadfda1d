"""The GPU suite runs from end to end on tiny shapes, and what goes wrong in it is recorded."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("gpu_suite", "gpu_report", "gpu_machine", "gpu_tests", "gpu_kernels", "gpu_steps", "gpu_replays")
PARTS = ("floors", "tests", "compile", "kernels", "steps", "layers")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The suite's modules, imported as the scripts import one another."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and FOLDER in Path(sys.modules[name].__file__ or "").parents:
            del sys.modules[name]


@pytest.fixture(scope="module")
def record_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of the whole suite, by the command of the documentation."""
    output = tmp_path_factory.mktemp("gpu") / "record.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("IGULORA_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, str(FOLDER / "gpu_suite.py"), "--tiny", "--minutes", "9", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(scope="module")
def record(record_file: Path) -> dict[str, Any]:
    """The same, read."""
    return json.loads(record_file.read_text(encoding="utf-8"))


def faults(tree: Any, path: str = "") -> list[str]:
    """Where a record holds an error."""
    if not isinstance(tree, dict):
        return []
    own = [f"{path}: {tree[key]}" for key in ("error", "traffic_error") if key in tree]
    return own + [fault for key, value in tree.items() for fault in faults(value, f"{path}/{key}")]


@pytest.mark.long  # the whole suite, interpreted
def test_every_part_runs(record: dict[str, Any]) -> None:
    assert record["figures"] == "measured"
    assert tuple(record["parts"]) == PARTS
    assert not faults(record["parts"])
    assert {part["status"] for part in record["parts"].values()} == {"done"}
    place = record["environment"]
    assert place["tiny"] is True
    assert place["backend"]["runs"] == "triton"
    assert {"torch", "triton", "commit"} <= set(place["versions"])
    assert len(place["date"]) == 10


@pytest.mark.long  # the whole suite, interpreted
def test_floors_and_kernels_are_measured(record: dict[str, Any]) -> None:
    floors, kernels = (record["parts"][name]["items"] for name in ("floors", "kernels"))
    assert floors["copy"]["bytes_per_s"] > 0
    assert all(rate > 0 for name, item in floors.items() if "gemm" in name for rate in item["flops_per_s"].values())
    (layer,) = (item for name, item in kernels.items() if name.startswith("layer "))
    assert {"project", "dy_pass", "ds_sum", "dq_pass", "sum_partials"} <= set(layer)
    for entry in layer.values():
        assert entry["bytes"] > 0
        assert entry["ms"]["q1"] <= entry["ms"]["median"] <= entry["ms"]["q3"]
    (products,) = (item for name, item in kernels.items() if name.startswith("products "))
    assert {"forward product alone", "forward library", "backward library", "backward augmented"} <= set(products)
    assert any(name.startswith("forward pointers") for name in products)
    for name in ("importance", "orthogonality", "allocation"):
        assert kernels[f"bank {name}"][name]["bytes"] > 0
        assert kernels[f"bank {name}"]["operator"]["ms"]["median"] > 0
    ahead = record["parts"]["compile"]["items"]["workers"]
    assert len(ahead["compiled"]) == ahead["tasks"]


@pytest.mark.long  # the whole suite, interpreted
def test_layers_are_checked_and_compared(record: dict[str, Any]) -> None:
    (layer,) = record["parts"]["layers"]["items"].values()
    variants = layer["variants"]
    ran = {name for name, entry in variants.items() if "both" in entry}
    assert {"base", "ours", "ours, library", "ours, pointers", "ours, reference", "PEFT LoRA", "PEFT AdaLoRA"} <= ran
    assert all(variants[name]["largest_error"] < 1e-5 for name in ran)
    assert all(variants[name][key]["over_base"]["median"] > 0 for name in ran - {"base"} for key in ("forward", "both"))
    for name in set(variants) - ran:
        assert name.lower() in variants[name]["skipped"]
    assert layer["choices"]


@pytest.mark.long  # the whole suite, interpreted
def test_steps_are_compared(record: dict[str, Any]) -> None:
    items = record["parts"]["steps"]["items"]
    methods = ("floor", "instantaneous", "default", "peft-lora", "peft-adalora")
    assert set(items["methods"]["methods"]) == set(methods)
    for name, length in (("eager", 16), ("eager, long", 32)):
        assert set(items[name]["step"]) == set(methods)
        assert items[name]["ratios"]["default/peft-adalora"]["median"] > 0
        assert items[name]["batch"] == [4, length]
    profiles = items["profile"]["methods"]
    assert set(profiles) == {"floor", "instantaneous", "peft-lora", "peft-adalora"}
    assert profiles["instantaneous"]["parts"]["adapter products"]["host_seconds"] > 0
    assert profiles["floor"]["parts"]["adapter products"]["launches"] == 0
    assert set(items["graphs"]["step"]) == {"floor", "instantaneous", "peft-lora"}
    assert items["graphs"]["captured"] is False


@pytest.mark.long  # the whole suite, interpreted
def test_tests_are_counted(record: dict[str, Any]) -> None:
    found = record["parts"]["tests"]["items"]["pytest"]
    assert found["passed"] > 0
    assert found["failed"] == 0
    (file,) = found["files"].values()
    assert file["skip_reasons"] == ["needs a CUDA device"]


@pytest.mark.long  # the whole suite, interpreted
def test_the_page_says_what_was_measured(
    record: dict[str, Any], record_file: Path, modules: dict[str, ModuleType]
) -> None:
    page = record_file.with_suffix(".md").read_text(encoding="utf-8")
    assert page == modules["gpu_report"].page(record)
    assert "its times mean nothing" in page
    for text in ("## GPU tests", "PEFT AdaLoRA", "ours, pointers", "dy_pass", "TFLOP/s", "Unsloth: skipped"):
        assert text in page
    assert "falls back" not in page


@pytest.mark.slow
def test_chosen_parts_run(tmp_path: Path) -> None:
    """What every run of the tests makes of the suite; the whole of it takes a minute."""
    output = tmp_path / "record.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("IGULORA_BACKEND", "TRITON_INTERPRET")}
    options = ["--tiny", "--only", "floors", "--only", "kernels", "--output", str(output)]
    command = [sys.executable, str(FOLDER / "gpu_suite.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(output.read_text(encoding="utf-8"))["parts"]
    assert set(parts) == {"floors", "kernels"}
    assert not faults(parts)
    assert "dy_pass" in output.with_suffix(".md").read_text(encoding="utf-8")


def test_a_fallback_is_said_first(modules: dict[str, ModuleType]) -> None:
    record = {
        "environment": {"backend": {"runs": "reference", "reason": "Old GPU has compute capability 7.5, below 8.0"}},
        "parts": {},
    }
    page = modules["gpu_report"].page(record)
    assert "**No Triton kernel ran: igulora falls back to its reference here (Old GPU" in page


def test_fractions_are_of_the_measured_floors(modules: dict[str, ModuleType]) -> None:
    least = modules["gpu_report"].least_ms
    assert least({"bytes": 2e9, "flops": 1e9}, 1e12, 1e15) == pytest.approx(2.0)
    assert least({"bytes": 1, "flops": 3e12}, 1e12, 1e15) == pytest.approx(3.0)
    assert least({"bytes": 1, "flops": 1}, None, 1e15) is None
    assert least({}, 1e12, 1e15) is None


MACHINE = """
import time
from types import SimpleNamespace

class Setting:
    here = staticmethod(lambda **options: SimpleNamespace(device=SimpleNamespace(type="cpu")))

class Deadline:
    def __init__(self, at):
        self.at = at
    left = property(lambda self: self.at - time.time())
    passed = property(lambda self: self.left <= 0)

def environment(setting):
    return {}
"""
PART = """
import os, time

def items(setting):
    yield "good", lambda deadline: {"value": 1}
    yield "raises", lambda deadline: 1 / 0
    yield "ends the process", lambda deadline: os._exit(7)
    yield "good after all", lambda deadline: {"left": deadline.left}
    yield "takes too long", lambda deadline: time.sleep(600)
    yield "never reached", lambda deadline: {}
"""


def test_what_fails_or_takes_too_long_is_recorded_and_the_rest_goes_on(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part whose items fail in every way: a traceback, a lost process, too much time."""
    suite = modules["gpu_suite"]
    (tmp_path / "faulty_part.py").write_text(PART, encoding="utf-8")
    (tmp_path / "gpu_machine.py").write_text(MACHINE, encoding="utf-8")
    main = (FOLDER / "gpu_suite.py").read_text(encoding="utf-8").replace('("gpu_machine", ', '("faulty_part", ')
    (tmp_path / "gpu_suite.py").write_text(main, encoding="utf-8")
    monkeypatch.setattr(suite, "HERE", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    begin = time.time()
    options = suite.parse(["--tiny"])
    part = suite.supervise("floors", options, environment, tmp_path, begin + 8, begin + 9)
    items = part["items"]
    assert items["good"] == {"value": 1}
    assert "ZeroDivisionError" in items["raises"]["error"]
    assert items["ends the process"] == {"error": "the process ended with code 7"}
    assert items["good after all"]["left"] > 0
    assert items["takes too long"] == {"error": "the process took too long and was ended"}
    assert part["restarts"] == 2
    assert part["status"].startswith("3 of 5 items failed")


def test_without_an_installed_package_the_checkout_is_used(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = modules["gpu_suite"]
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    environment = suite.importable(tmp_path)
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    command = [sys.executable, "-S", "-c", "import importlib.util as u; print(u.find_spec('igulora').origin)"]
    origin = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    assert Path(origin).resolve() == FOLDER.parent / "igulora" / "__init__.py"
    assert (tmp_path / "igulora" / "kernels" / "svd_linear.py").exists()


def test_reports_of_tests_are_read(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="a.b" name="good"/>
        <testcase classname="a.b" name="bad"><failure message="assert 1 == 2">trace</failure></testcase>
        <testcase classname="a.b" name="broken"><error message="no device">trace</error></testcase>
        <testcase classname="a.b" name="skip"><skipped message="needs a CUDA device"/></testcase>
        </testsuite></testsuites>""",
        encoding="utf-8",
    )
    found = modules["gpu_tests"].read_report(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert [failure["test"] for failure in found["failures"]] == ["a.b::bad", "a.b::broken"]
    assert found["skip_reasons"] == ["needs a CUDA device"]


def test_an_interrupted_test_file_keeps_what_it_has_run(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests, machine = modules["gpu_tests"], modules["gpu_machine"]
    file, mark = tmp_path / "test_slow.py", tmp_path / "second test began"
    second = f"def test_two():\n    pathlib.Path({str(mark)!r}).touch()\n    time.sleep(60)\n"
    text = f"import pathlib, time\ndef test_one():\n    pass\n{second}"
    file.write_text(text, encoding="utf-8")
    monkeypatch.setattr(tests, "files", lambda setting: [file])
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    setting = machine.Setting.here(tiny=False, quick=False)

    class Deadline:
        """Over as soon as the second test has begun, however long pytest takes to get there."""

        passed = False
        left = property(lambda _: 0.0 if mark.exists() else 60.0)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
    try:
        found = tests.run(setting, Deadline())
    finally:
        signal.signal(signal.SIGINT, before)
    (result,) = found["files"].values()
    assert result["passed"] == 1
    assert "time was over" in result["cut"]


def test_the_longest_test_files_start_first(modules: dict[str, ModuleType]) -> None:
    tests = modules["gpu_tests"]

    def names(kind: str, quick: bool = False) -> list[str]:
        setting = SimpleNamespace(tiny=False, quick=quick, device=torch.device(kind))
        return [file.name for file in tests.files(setting)]

    assert names("cuda")[: len(tests._SECONDS)] == sorted(tests._SECONDS, key=tests._SECONDS.get, reverse=True)
    assert set(names("cpu")) - set(names("cuda")) == set(tests._INTERPRETED)
    assert names("cuda", quick=True) == ["test_steps.py", "test_graphs.py"]


def test_what_a_capture_reads_lives_as_long_as_its_replay(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed: list[int] = []
    stubs = {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda stream: None),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replayed.append(1)),
        "current_stream": lambda: None,
        "synchronize": lambda: None,
        "stream": lambda stream: nullcontext(),
        "graph": lambda graph, stream: nullcontext(),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)

    def capture() -> tuple[Callable[[], object], weakref.ref[torch.Tensor]]:
        state = torch.zeros(3)
        return modules["gpu_replays"].capture(lambda: state.add_(1)), weakref.ref(state)

    replay, state = capture()
    gc.collect()
    assert state() is not None
    replay()
    assert replayed == [1]
    del replay
    gc.collect()
    assert state() is None


def test_a_run_of_one_part_has_a_file_of_its_own(modules: dict[str, ModuleType]) -> None:
    """It must not take the place of a whole run of the same day."""
    suite = modules["gpu_suite"]
    record = {"environment": {"date": "2026-01-01", "machine": {"name": "Some GPU"}}, "parts": {}}
    names = [suite._save(record, suite.parse(["--tiny", *more])).name for more in ([], ["--only", "compiled"])]
    assert names == ["2026-01-01-some-gpu.json", "2026-01-01-some-gpu-compiled.json"]


@pytest.mark.long  # the whole suite, interpreted
def test_compiled_models_are_a_part_that_is_asked_for(tmp_path: Path, modules: dict[str, ModuleType]) -> None:
    suite, file = modules["gpu_suite"], tmp_path / "record.json"
    command = [sys.executable, str(FOLDER / "gpu_suite.py"), "--tiny", "--only", "compiled", "--output", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (part,) = json.loads(file.read_text(encoding="utf-8"))["parts"].items()
    assert part[0] == "compiled"
    assert set(part[1]["items"]["methods"]["methods"]) == {"instantaneous", "peft-lora"}
    assert "compiled" not in suite.PARTS
    assert "needs a CUDA device" in file.with_suffix(".md").read_text(encoding="utf-8")
