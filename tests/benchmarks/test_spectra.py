"""The comparison of exact and sampled effective ranks runs, and its page is that of its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from igulora.benchmarks import spectra


def test_both_ways_are_timed_and_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectra.main(["--sides", "96", "--output", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    assert [found["decay"] for found in record["matrices"]] == list(spectra.DECAYS)
    for found in record["matrices"]:
        assert 1 < found["erank"] < 96
        assert max(map(abs, found["off"])) < 0.05
        assert len(found["seconds"]["exact"]) == len(found["seconds"]["sampled"]) == spectra.REPEATS
    assert (tmp_path / "README.md").read_text() == spectra.page(record)
    assert "sampled over exact" in capsys.readouterr().out


def test_the_page_is_that_of_the_newest_record() -> None:
    newest = max(spectra.FOLDER.glob("*.json"))
    assert (spectra.FOLDER / "README.md").read_text() == spectra.page(json.loads(newest.read_text()))
