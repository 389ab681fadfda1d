"""The committed studies: their files can be read, and the documents say what their records say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from igulora.benchmarks.machine import RESULTS
from igulora.benchmarks.study.book import Book
from igulora.benchmarks.study.conduct import done
from igulora.benchmarks.study.documents import CHOICES, DOCUMENTS, FINDINGS, main, markers
from igulora.benchmarks.study.reading import read_study

STUDIES = sorted((RESULTS / "study").glob("*.toml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_records_are_those_of_the_file(file: Path) -> None:
    study, book = read_study(file), Book(file.with_suffix("") / "records.jsonl")
    runs = study.possible()
    assert book.records.keys() <= runs.keys()
    assert all(book.find(study, runs[key]) for key in book.records)  # with the file's settings, and today's defaults
    assert not any(record["versions"]["commit"].endswith("-dirty") for record in book.records.values())


def test_the_main_table_is_complete() -> None:
    file = RESULTS / "study" / "main.toml"
    study, book = read_study(file), Book(file.with_suffix("") / "records.jsonl")
    assert len(study.judged_seeds) == 5
    assert done(study, book) == study.count


def test_the_documents_are_the_rendering(tmp_path: Path) -> None:
    root = RESULTS.parents[1]
    copied = tmp_path / "benchmarks" / "results" / "study"
    shutil.copytree(RESULTS / "study", copied)
    (tmp_path / "docs").mkdir()
    for document in DOCUMENTS:
        shutil.copy(root / document, tmp_path / document)
    assert main(["--root", str(tmp_path)]) == 0
    for page in [*sorted(copied.glob("*/README.md")), *(tmp_path / document for document in DOCUMENTS)]:
        assert page.read_text() == (root / page.relative_to(tmp_path)).read_text(), (
            "run python -m igulora.benchmarks.study.documents"
        )


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_study_has_its_place(file: Path) -> None:
    study = read_study(file)
    assert study.name == file.stem
    text = (RESULTS.parents[1] / (CHOICES if study.judged_by == "validation" else FINDINGS)).read_text()
    assert all(text.count(marker) == 1 for marker in markers(study.name))
