"""The benchmark runs from end to end on a tiny model, and its arithmetic is right."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from igulora.benchmarks import cases, models, render, targets
from igulora.benchmarks import record as records
from igulora.benchmarks.machine import RESULTS
from igulora.benchmarks.memory import peak_memory
from igulora.benchmarks.methods import Method
from igulora.benchmarks.ratios import paired_ratios
from igulora.measure.counting import Counting

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
METHODS = ("floor", "instantaneous", "default", "peft-lora", "peft-adalora")


def test_the_demo_s_model_is_loaded_by_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.load_model(dataclasses.replace(cases.MODELS["tiny"], dtype="float32")).bfloat16().eval()
    loaded.model.rotary_emb.inv_freq = frequencies = loaded.model.rotary_emb.inv_freq.float()
    monkeypatch.setattr(models, "load_smollm2", lambda: (loaded.requires_grad_(True), None))
    model = models.load_model(cases.MODELS["smollm2-135m"])
    assert model is loaded
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.rotary_emb.inv_freq is frequencies
    wide = models.load_model(dataclasses.replace(cases.MODELS["smollm2-135m"], dtype="float32"))
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def record_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a real run on the tiny model, by the command of the documentation."""
    output = tmp_path_factory.mktemp("bench") / "result.json"
    options = [
        "--model",
        "tiny",
        "--methods",
        ",".join(METHODS),
        "--rounds",
        "1",
        "--threads",
        "1",
        "--json",
        str(output),
    ]
    command = [sys.executable, "-m", "igulora", "bench", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=output.parent)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
def test_a_run_measures_every_method(record_file: Path) -> None:
    record = json.loads(record_file.read_text(encoding="utf-8"))
    (result,) = record["results"]
    methods = set(METHODS)
    assert set(result["methods"]) == methods
    assert set(result["memory"]) == methods
    assert all(len(result["seconds"][name]) == 1 for name in methods)
    for name in methods - {"floor"}:
        ratio = result["ratios"][f"{name}/floor"]
        assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
        assert result["memory"][name]["peak"] > result["memory"][name]["held"] > 0
        assert result["memory"][name]["saved"] > 0
    for name in ("instantaneous", "default"):
        assert result["methods"][name]["live_at_end"] < result["methods"][name]["live_at_start"]
        assert sum(result["methods"][name]["kinds"].values()) == pytest.approx(1)
    assert any("path" in kind for kind in result["methods"]["default"]["kinds"])
    assert result["counts"]["instantaneous"]["bookkeeping"] < result["counts"]["peft-adalora"]["bookkeeping"]
    assert {"torch", "peft", "transformers", "commit"} <= set(record["versions"])


@pytest.mark.slow
def test_tables_are_written_between_the_markers(record_file: Path, tmp_path: Path) -> None:
    root = FOLDER.parent
    (tmp_path / "benchmarks").mkdir()
    for name in ("README.md", "benchmarks/README.md"):
        shutil.copy(root / name, tmp_path / name)
    assert render.main([str(record_file), "--root", str(tmp_path)]) == 0
    for name in ("README.md", "benchmarks/README.md"):
        written, original = ((folder / name).read_text(encoding="utf-8") for folder in (tmp_path, root))
        assert "4×16" in written
        if name.startswith("benchmarks"):
            assert all(target.what in written for target in cases.TARGETS)
        begin, end = render.MARKERS
        assert written.partition(begin)[0] == original.partition(begin)[0]
        assert written.partition(end)[2] == original.partition(end)[2]


@pytest.mark.skipif(not list(RESULTS.glob("*.json")), reason="nothing measured yet")
def test_the_documents_are_those_of_the_newest_record() -> None:
    pytest.importorskip("triton", reason="the kernels' traffic is asked of their tiles")
    record = records.read(records.newest(RESULTS))
    for page, text in (("README.md", render.summary(record)), ("benchmarks/README.md", render.details(record))):
        _, _, rest = (FOLDER.parent / page).read_text(encoding="utf-8").partition(f"{render.MARKERS[0]}\n")
        assert rest.partition(render.MARKERS[1])[0] == text, "run python -m igulora.benchmarks.render"


def test_a_missed_target_says_by_how_much() -> None:
    cell = targets.cell
    assert cell({"median": 1.17, "q1": 1.15, "q3": 1.2}, 1.18) == "1.17 [1.15–1.20]"
    assert cell({"median": 1.298, "q1": 1.28, "q3": 1.31}, 1.18) == "1.30 [1.28–1.31], missed by 10%"
    assert cell({"median": 12}, 10) == "12, missed"
    assert cell({"median": 0.4}, None) == "0.40"
    assert cell(None, 1.0) == "not measured"


def test_ratios_are_paired_by_round() -> None:
    times = {"floor": [1.0, 2.0, 4.0], "ours": [1.5, 3.0, 6.0], "ours:plain": [1.0, 2.0, 4.0]}
    ratios = paired_ratios(times)
    assert ratios["ours/floor"] == {"median": 1.5, "q1": 1.5, "q3": 1.5}
    assert ratios["ours/without-path"]["median"] == 1.5


class _Adds(Method):
    """A method whose step allocates a known amount: two tensors of 4 MB alive together, one of them kept for backward."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model, cases.CASES["tiny-4x16"])
        self.state = torch.zeros(500_000)
        self.weight = torch.ones(1_000_000, requires_grad=True)

    def backward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = (batch["x"] * 2 * self.weight).sum()
        loss.backward()
        return loss.detach()

    def zero_grad(self) -> None:
        self.weight.grad = None


def test_memory_is_what_was_allocated() -> None:
    batch = {"x": torch.ones(1_000_000)}
    measured = peak_memory(_Adds, torch.nn.Linear(1, 1), batch, batch)
    assert measured["held"] == 6_000_000
    assert measured["saved"] == pytest.approx(4_000_000, rel=1e-3)  # and the loss
    assert measured["peak"] == pytest.approx(14_000_000, rel=1e-3)


def test_views_and_empty_tensors_are_no_launches() -> None:
    counting = Counting()
    x, mask = torch.ones(4, 4), torch.tensor([True, False])
    with counting:
        torch.empty(3)
        y = x.view(2, 8) + 1
        y.sum().item()
        y[mask]
    assert counting.launches == {"aten::add": 1, "aten::sum": 1}
    assert set(counting.syncs) == {"aten::_local_scalar_dense", "aten::index"}


def test_numbers_drawn_on_the_host_are_neither_launches_nor_syncs() -> None:
    counting, generator = Counting(), torch.Generator().manual_seed(0)
    with counting:
        drawn = torch.randint(5, (), generator=generator)
        assert (drawn + 1).item() > 0
    assert not counting.launches
    assert not counting.syncs


def test_a_second_run_is_compared_with_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another machine it says nothing."""

    def record(median: float, threads: int = 2) -> dict[str, Any]:
        ratio = {"median": median, "q1": median - 0.1, "q3": median + 0.1}
        result = {
            "case": {"name": "a"},
            "rounds": 6,
            "ratios": {"x/floor": ratio, "y/floor": {"median": 1.0, "q1": 0.9, "q3": 1.1}},
        }
        opened = records.open_record()
        return {**records.close_record(opened, [result], 1.0), "threads": threads}

    monkeypatch.setattr(targets, "RESULTS", tmp_path)
    monkeypatch.setattr(targets, "REPEAT", tmp_path / "repeat")
    (tmp_path / "repeat").mkdir()
    (tmp_path / "one.json").write_text(json.dumps(record(1.0)), encoding="utf-8")
    assert targets.repeated() == []
    for other, found, met in (
        (record(1.1), "2 of 2 ratios (100%); medians at most 10% apart", True),
        (record(1.5), "1 of 2 ratios (50%); medians at most 50% apart", False),
    ):
        (tmp_path / "repeat" / "one.json").write_text(json.dumps(other), encoding="utf-8")
        (finding,) = targets.repeated()
        assert (finding.found, finding.met) == (found, met)
    (tmp_path / "repeat" / "one.json").write_text(json.dumps(record(1.0, threads=1)), encoding="utf-8")
    assert targets.repeated() == []


def test_how_often_quartiles_meet_by_chance() -> None:
    """The more values, the surer."""
    assert 0 < targets.by_chance(2) < targets.by_chance(6) < 1
