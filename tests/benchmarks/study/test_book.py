"""Records: only what was run with today's settings counts, one process writes, and nothing is half written."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from igulora.benchmarks.study.book import Book
from igulora.benchmarks.study.conduct import conduct
from igulora.benchmarks.study.page import page
from igulora.benchmarks.study.plan import Budget, Study
from igulora.benchmarks.study.reading import read_study
from igulora.config import METHODS

from .small import FILE, Pretended


@pytest.fixture
def path(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The records of the whole small study."""
    Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    path = tmp_path / "records.jsonl"
    conduct(study, Book(path), lambda _: None)
    return path


def test_records_of_other_settings_or_damaged_ones(file: Path, path: Path) -> None:
    file.write_text(FILE.replace("rows = 4", "rows = 8"))
    with pytest.raises(ValueError, match=r"expected polarity/igu/4-2/lr0.001/seed0 in .* got others for training"):
        conduct(read_study(file), Book(path), lambda _: None)
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(ValueError, match="expected a JSON object with a key in line 1"):
        Book(path)


def test_a_default_that_changed_is_another_method(
    study: Study, file: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS["igu"], "combine", "mean")
    with pytest.raises(ValueError, match="expected polarity/igu/4-2/lr0.001/seed0 in .* got others for config"):
        page(study, Book(path))
    file.write_text(FILE.replace("[methods.igu]", '[methods.igu]\ncombine = "snr"'))
    assert "9 of 9 runs" in page(read_study(file), Book(path))  # what it was, spelt out


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("peft-lora", 'library = "peft"', 'library = "peft"\nuse_rslora = true'),
        ("igu", "[methods.igu]", "[methods.igu]\noptimizer = { p_lr_ratio = 4 }"),
        ("igu", "[methods.igu]", "[methods.igu]\nrank_pattern = { query = 3 }"),
    ],
)
def test_an_option_more_is_another_method(file: Path, path: Path, key: str, old: str, new: str) -> None:
    file.write_text(FILE.replace(old, new))
    with pytest.raises(ValueError, match=f"expected polarity/{key}/4-2/lr0.001/seed0 in .* got others for config"):
        page(read_study(file), Book(path))


def test_a_field_that_came_later_changes_nothing(study: Study, file: Path, path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for record in lines:
        del record["settings"]["training"]["varies"]
        record["settings"]["config"]["options"].pop("block_pattern", None)
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    assert "9 of 9 runs" in page(study, Book(path))
    file.write_text(FILE.replace("[training]", '[training]\nvaries = "order"'))  # not what they were
    with pytest.raises(ValueError, match=r"expected polarity/igu/4-2/lr0.001/seed0 in .* got others for training"):
        page(read_study(file), Book(path))


def test_one_process_writes(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with Book(path).writing(), pytest.raises(ValueError, match="expected no other study at work on"):
        conduct(study, Book(path), lambda _: None)
    path.write_text('{"key": "cut')
    assert Book(path).records == {}
    assert path.read_text() == '{"key": "cut'  # reading repairs nothing
    with Book(path).writing():
        assert path.read_text() == ""


def test_a_full_disk_leaves_the_records_as_they_were(study: Study, tmp_path: Path) -> None:
    class Full(io.FileIO):
        def write(self, line: Any) -> int:
            return super().write(line[:10])

    path = tmp_path / "records.jsonl"
    path.write_text('{"key": "another"}\n')
    book = Book(path)
    with book.writing(), Full(path, "a+b") as file:
        book._file = file
        with pytest.raises(OSError, match="expected room for"):
            book.add(study, study.searches("polarity", "igu", Budget(4, 2))[0], {})
    assert path.read_text() == '{"key": "another"}\n'
