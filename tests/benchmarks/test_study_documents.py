"""The committed studies: their files can be read, and the documents say what their records say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from igulora.benchmarks.machine import RESULTS
from igulora.benchmarks.study.book import Book
from igulora.benchmarks.study.documents import CHOICES, main, markers
from igulora.benchmarks.study.reading import read_study

STUDIES = sorted((RESULTS / "study").glob("*.toml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_records_are_those_of_the_file(file: Path) -> None:
    study, book = read_study(file), Book(file.with_suffix("") / "records.jsonl")
    runs = study.possible()
    assert book.records.keys() <= runs.keys()
    assert all(book.find(study, runs[key]) for key in book.records)  # with the file's settings, and today's defaults
    assert not any(record["versions"]["commit"].endswith("-dirty") for record in book.records.values())


def test_the_documents_are_the_rendering(tmp_path: Path) -> None:
    root = RESULTS.parents[1]
    copied = tmp_path / "benchmarks" / "results" / "study"
    shutil.copytree(RESULTS / "study", copied)
    (tmp_path / CHOICES).parent.mkdir()
    shutil.copy(root / CHOICES, tmp_path / CHOICES)
    assert main(["--root", str(tmp_path)]) == 0
    for page in sorted(copied.glob("*/README.md")):
        assert page.read_text() == (RESULTS / "study" / page.relative_to(copied)).read_text(), (
            "run the documents module"
        )
    assert (tmp_path / CHOICES).read_text() == (root / CHOICES).read_text(), (
        "run python -m igulora.benchmarks.study.documents"
    )


def test_every_study_that_chooses_has_its_place() -> None:
    text = (RESULTS.parents[1] / CHOICES).read_text()
    for file in STUDIES:
        if read_study(file).judged_by == "validation":
            assert all(marker in text for marker in markers(file.stem))
