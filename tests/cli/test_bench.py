"""``igulora bench``: names, skipped methods, and comparing with an earlier record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from igulora.benchmarks.methods import METHODS
from igulora.cli import main

TINY = ["bench", "--model", "tiny", "--rounds", "2", "--threads", "1", "--no-memory", "--device", "cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "smollm2-4x512"], "Did you mean 'smollm2-135m-4x512'?"),
        (["--methods", "floor,peft-adalra"], "Did you mean 'peft-adalora'?"),
        (["--model", "smollm"], "Did you mean 'smollm2-135m'?"),
        (["--rounds", "0"], "expected --rounds of at least 1, got 0"),
        (["--device", "tpu"], "expected a device of this machine such as cpu or cuda, got 'tpu'"),
        (["--against", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_answered_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_not_installed_is_skipped_with_its_name_and_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        METHODS["peft-lora"], "available", lambda: "the package peft is not installed; pip install peft"
    )
    file = tmp_path / "record.json"
    assert main([*TINY, "--methods", "floor,peft-lora", "--json", str(file)]) == 0
    assert "peft-lora is skipped: the package peft is not installed; pip install peft" in capsys.readouterr().out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert set(record["results"][0]["methods"]) == {"floor"}
    assert set(record["skipped"]) == {"peft-lora"}


def test_json_on_standard_output_is_nothing_but_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--methods", "floor,instantaneous", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "instantaneous/floor" in record["results"][0]["ratios"]


def test_a_second_run_is_compared_with_the_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "first.json"
    command = [*TINY, "--methods", "floor,instantaneous"]
    assert main([*command, "--json", str(file)]) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    for q1, code in (
        (0.0, 0),
        (8e9, 1),
    ):  # whatever is measured now, it lies within the first spread and below the second
        record["results"][0]["ratios"]["instantaneous/floor"] = {"median": 8.5e9, "q1": q1, "q3": 9e9}
        file.write_text(json.dumps(record), encoding="utf-8")
        assert main([*command, "--against", str(file)]) == code
        assert f"{1 - code} of 1 ratios agree within their spread" in capsys.readouterr().out
    assert main([*TINY, "--methods", "floor", "--against", str(file)]) == 2
    assert "got no ratio in common" in capsys.readouterr().err
    record["machine"]["cpu"] = "another"
    file.write_text(json.dumps(record), encoding="utf-8")
    assert main([*command, "--against", str(file)]) == 2
    assert "expected results of one machine" in capsys.readouterr().err


def test_the_list_names_cases_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("smollm2-135m-4x512", *METHODS))
