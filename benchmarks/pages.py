"""Markdown tables, and their places in the documents: between two markers."""

from __future__ import annotations

from pathlib import Path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column left-aligned and the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def replace(file: Path, text: str, markers: tuple[str, str]) -> None:
    """Put ``text`` between the markers of ``file``.

    Raises:
        ValueError: the file lacks a marker.
    """
    old = file.read_text(encoding="utf-8")
    begin, end = markers
    if begin not in old or end not in old:
        raise ValueError(f"expected the markers {begin} and {end} in {file}; put them where the table belongs")
    before, _, rest = old.partition(begin)
    file.write_text(f"{before}{begin}\n{text}{end}{rest.partition(end)[2]}", encoding="utf-8")
