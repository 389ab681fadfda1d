"""Markdown tables, and their places in the documents: between two markers."""

from __future__ import annotations

import json
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


def keep(record: dict[str, Any], page: str, folder: Path) -> None:
    """A study's record as ``<date>-<cores>c.json``, and its page as README.md beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{record['date']}-{record['machine']['cores']}c.json"
    (folder / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(page, encoding="utf-8")


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
