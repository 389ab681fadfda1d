"""Writes what committed studies found: each study's own page, and its summary between its markers in the documents.

python -m igulora.benchmarks.study.documents
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..machine import RESULTS
from ..pages import replace, table
from .book import Book
from .conduct import done
from .page import page
from .pictures import draw
from .plan import Study
from .reading import read_study
from .summaries import core_hours, summary

README, CHOICES, FINDINGS = Path("README.md"), Path("docs") / "choices.md", Path("docs") / "findings.md"
DOCUMENTS = (README, CHOICES, FINDINGS)
ALL = "all"  # the list of all studies, where a document has its markers


def markers(name: str) -> tuple[str, str]:
    """What the summary of a study stands between in a document."""
    return f"<!-- study:{name}:begin -->", f"<!-- study:{name}:end -->"


def write(root: Path) -> list[Path]:
    """Render all studies of a repository; what was written.

    Raises:
        ValueError: a study's file or records do not fit, or a document lacks the second of two markers.
    """
    written = []
    studies = []
    for file in sorted((root / "benchmarks" / "results" / "study").glob("*.toml")):
        output = file.with_suffix("")
        study, book = read_study(file), Book(output / "records.jsonl")
        studies.append((study, book, output / "README.md"))
        if book.records:
            (output / "README.md").write_text(page(study, book, draw(study, book, output)), encoding="utf-8")
            written.append(output / "README.md")
    for document in (root / name for name in DOCUMENTS):
        before = document.read_text(encoding="utf-8")
        for study, book, of in studies:
            if markers(study.name)[0] in before:
                text = summary(study, book, _link(document, of, "all of it"), short=document == root / README)
                replace(document, text, markers(study.name))
        if markers(ALL)[0] in before:
            replace(document, _list(document, studies), markers(ALL))
        written.append(document)
    return written


def _link(document: Path, page_of: Path, text: str) -> str:
    return f"[{text}]({Path(os.path.relpath(page_of, document.parent)).as_posix()})"


def _list(document: Path, studies: list[tuple[Study, Book, Path]]) -> str:
    """Every study: what it compares, with how much training, how far it is and what it took."""
    rows = []
    for study, book, of in studies:
        rows.append([
            _link(document, of, study.name) if book.records else study.name,
            ", ".join(study.tasks),
            ", ".join(f"{budget.r} to {budget.target}" for budget in study.budgets),
            str(len(study.methods)),
            str(len(study.judged_seeds)),
            f"{study.training.steps} × {study.training.rows} of {' or '.join(_counts(study))}",
            ", ".join(f"{rate:g}" for rate in study.learning_rates),
            f"{done(study, book)} of {study.count}",
            f"{core_hours(book.records.values()):.1f}",
        ])  # fmt: skip
    hours = sum(core_hours(book.records.values()) for _, book, _ in studies)
    rows.append(["all", *[""] * 7, f"{hours:.1f}"])
    heads = [
        "study",
        "tasks",
        "triplets",
        "methods",
        "seeds",
        "steps × rows",
        "learning rates",
        "runs done",
        "hours of one core",
    ]
    return table(heads, rows)


def _counts(study: Study) -> list[str]:
    """How many training rows its tasks have."""
    return list(dict.fromkeys(f"{task.train:,}" for task in study.tasks.values()))


def main(arguments: list[str] | None = None) -> int:
    """Render the studies of a repository."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--root", type=Path, default=RESULTS.parents[1], help="of the repository whose documents are written"
    )
    for path in write(parser.parse_args(arguments).root):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
