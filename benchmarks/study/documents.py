"""Writes what committed studies found into the documents: each study's own page, and docs/choices.md between markers.

python -m igulora.benchmarks.study.documents
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..machine import RESULTS
from ..pages import replace
from .book import Book
from .page import page, summary
from .pictures import draw
from .reading import read_study

CHOICES = Path("docs") / "choices.md"


def markers(name: str) -> tuple[str, str]:
    """What the summary of a study stands between in a document."""
    return f"<!-- study:{name}:begin -->", f"<!-- study:{name}:end -->"


def write(root: Path) -> list[Path]:
    """Render all studies with records in a repository; the pages that were written.

    Raises:
        ValueError: docs/choices.md has no place for a study that chooses something; or a study's file or records do not fit.
    """
    written = []
    folder = root / "benchmarks" / "results" / "study"
    for file in sorted(folder.glob("*.toml")):
        output = file.with_suffix("")
        if not (output / "records.jsonl").exists():
            continue
        study, book = read_study(file), Book(output / "records.jsonl")
        (output / "README.md").write_text(page(study, book, draw(study, book, output)), encoding="utf-8")
        written.append(output / "README.md")
        if study.judged_by == "validation":
            link = f"[all of it](../{(output / 'README.md').relative_to(root).as_posix()})"
            replace(root / CHOICES, summary(study, book, link), markers(file.stem))
    return written


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
