"""The record of a run: its file, whether two records may stand in one table, and whether two runs agree."""

from __future__ import annotations

import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

from .machine import RESULTS, machine, versions

FORMAT = 2


def make_record(results: list[dict[str, Any]], device: str, threads: int, seconds: float) -> dict[str, Any]:
    """``results`` with machine, versions and date."""
    return {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "versions": versions(),
        "threads": threads,
        "seconds_in_all": round(seconds, 1),
        "results": results,
    }


def standard_file(record: dict[str, Any]) -> Path:
    """Where a record is kept in a checkout: ``benchmarks/results/<date>-<machine>.json``."""
    place = record["machine"]
    name = f"{place['device']}" if place["device"] != "cpu" else f"{place['cpu']} {place['cores']}c"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / f"{record['date']}-{slug}.json"


def write(record: Any, file: Path) -> None:
    """Write JSON, all or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, file)


def read(file: Path) -> dict[str, Any]:
    """A record of this format.

    Raises:
        ValueError: it is not one. FileNotFoundError: there is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"expected a result file of igulora bench, got {file}, which does not exist")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a result file of igulora bench, got {file}, which is not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("results"), list):
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"expected a result file of igulora bench with format {FORMAT}, got format {found!r} in {file}"
        )
    return record


def newest(folder: Path) -> Path:
    """The file with the latest date in its name in ``folder``.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"expected a result file in {folder}, found none; measure first")
    return files[-1]


def check_same_place(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise unless two records come from one machine with one set of versions and threads (the commit may differ).

    Raises:
        ValueError: they do not: their times must not stand in one table.
    """
    for name in ("machine", "versions", "threads"):
        a, b = one[name], other[name]
        if isinstance(a, dict):
            a, b = ({k: v for k, v in side.items() if k != "commit"} for side in (a, b))
            differing = [k for k in {*a, *b} if a.get(k) != b.get(k)]
            a, b = ({k: side.get(k) for k in sorted(differing)} for side in (a, b))
        if a != b:
            raise ValueError(f"expected results of one machine, got {name} {a} and {b}; run both on one")


def merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record with the results of all; of a case that occurs twice the later one counts.

    Raises:
        ValueError: they come from different machines or versions.
    """
    for other in records[1:]:
        check_same_place(records[0], other)
    by_case = {result["case"]["name"]: result for record in records for result in record["results"]}
    return {**records[-1], "results": list(by_case.values())}


def agreement(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """Ratios that both records hold: both medians, and whether they agree within the spread.

    They agree where the interquartile ranges of the paired ratios meet.

    Raises:
        ValueError: they come from different machines or versions.
    """
    check_same_place(one, other)
    before = {result["case"]["name"]: result["ratios"] for result in one["results"]}
    rows = []
    for result in other["results"]:
        case = result["case"]["name"]
        for name, b in result["ratios"].items():
            a = before.get(case, {}).get(name)
            if a is not None:
                agree = a["q1"] <= b["q3"] and b["q1"] <= a["q3"]
                rows.append({"case": case, "ratio": name, "before": a, "now": b, "agrees": agree})
    return rows
