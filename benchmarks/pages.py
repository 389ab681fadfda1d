"""Markdown tables, and their places in the documents: between two markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column left-aligned and the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def place(record: dict[str, Any]) -> str:
    """One line: when, on what and with what a record was made."""
    where, versions = record["machine"], record["versions"]
    cpu = f"{where['cpu']}, {where['cores']} cores ({', '.join(where['bf16']) or 'no vector extensions recorded'})"
    device = cpu if where["device"] == "cpu" else f"{where['device']}, {cpu}"
    commits = dict.fromkeys(result.get("commit", versions["commit"]) for result in record.get("results", [{}]))
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)
    allocator = f"allocator {where['allocator']}, " if "allocator" in where else ""
    return (
        f"{record['date']}, {device}, {record['threads']} threads, {allocator}Python {where['python']}, {packages}, "
        f"commit {', '.join(commits)}."
    )


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
