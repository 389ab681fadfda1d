"""Trainings of a study, as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from igulora.benchmarks.study import conduct as conducting
from igulora.benchmarks.study import models
from igulora.benchmarks.study.training import factor
from igulora.cli.main import main

from .small import FILE


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1.0
    assert factors[-1] == pytest.approx(1 / 90)
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.slow
def test_a_whole_study(
    file: Path, archive: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(models, "minilm_folder", lambda: encoder)
    conducting._prepared.cache_clear()
    asked = FILE.replace("seeds = [0, 1, 2, 3]", 'seeds = [1]\nmaps = ["igu", "random"]\nagainst = ["fixed"]')
    asked = asked.replace("[1e-3, 4e-3]", "[2e-2]").replace("window = 2", "window = 2\nwatch = 2\nremove = 6")
    others = '[methods.random]\n[methods.igu-flex]\n[methods.ralora-pro]\n[methods.peft-adalora]\nlibrary = "peft"\n'
    file.write_text(asked + others)
    assert main(["study", str(file)]) == 0
    assert "7/7 polarity/peft-adalora/4-2/lr0.02/seed1: validation accuracy" in capsys.readouterr().out
    output = file.with_suffix("")
    records = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
    assert len(records) == 7
    assert all(0.0 <= record["test"]["accuracy"] <= 1.0 for record in records)
    assert {"date", "machine", "versions", "threads"} <= records[0].keys()
    written = (output / "README.md").read_text()
    igu, peft_lora = records[0], records[2]
    assert set(igu["removed"]) == {"", *igu["ranks"]}
    assert len(igu["series"]) == 2
    assert "removed" not in peft_lora
    assert igu["trained_at_end"] < igu["trained_at_start"]
    assert records[-1]["trained_at_end"] < records[-1]["trained_at_start"]  # PEFT's AdaLoRA
    assert set(igu["scores"]) == set(igu["ranks"])
    assert set(peft_lora["ranks"].values()) == {2}
    assert "## Matrices removed one at a time" in written
    for name in ("differences", "ranks-polarity", "series"):
        assert f"![{name}]({name}.png)" in written
        assert (output / f"{name}.png").stat().st_size > 0
    assert main(["study", str(file), "--render"]) == 0
    assert (output / "README.md").read_text() == written
    for record in (records[0], records[1], records[-1]):  # in a process of their own the model is made anew for each
        models._encoder.cache_clear()
        conducting._prepared.cache_clear()
        assert main(["study", str(file), "--again", record["key"]]) == 0
        assert f"{record['key']}, test: recorded {record['test']}, now {record['test']}" in capsys.readouterr().out
