"""The record of a run: its file, whether two records may stand in one table, and whether two runs agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from igulora.files import write_json

from .machine import RESULTS, circumstances

FORMAT = 2


def open_record(device: str = "cpu") -> dict[str, Any]:
    """A record without results yet: format, date, machine, versions (the commit is that of the code that runs now) and threads."""
    return {"format": FORMAT, **circumstances(device)}


def close_record(opened: dict[str, Any], results: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What :func:`open_record` began, with its results; each of them carries the commit that it was measured at."""
    commit = opened["versions"]["commit"]
    return {
        **opened,
        "seconds_in_all": round(seconds, 1),
        "results": [{**result, "commit": commit} for result in results],
    }


def standard_file(record: dict[str, Any]) -> Path:
    """Where a record is kept in a checkout: ``benchmarks/results/<date>-<machine>.json``."""
    place = record["machine"]
    name = f"{place['device']}" if place["device"] != "cpu" else f"{place['cpu']} {place['cores']}c"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / f"{record['date']}-{slug}.json"


def keep(record: dict[str, Any], file: Path) -> Path:
    """Write a record to ``file``, together with what is there of the same machine and versions; else beside it, under a number.

    Returns:
        Where it went.
    """
    for number in range(1, 1000):
        place = file if number == 1 else file.with_name(f"{file.stem}-{number}{file.suffix}")
        try:
            write_json(place, merge([read(place), record]) if place.exists() else record)
        except ValueError:
            continue  # of another machine or format
        return place
    raise ValueError(f"expected a free name beside {file}, found none; move old results away")


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
    files = sorted(folder.glob("*.json"), key=lambda file: file.stem)
    if not files:
        raise FileNotFoundError(f"expected a result file in {folder}, found none; measure first")
    return files[-1]


def newest_of(folder: Path, part: str) -> Path | None:
    """The GPU suite's latest record in ``folder`` that holds a part of the suite."""
    found = []
    for file in folder.glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if part in record["parts"]:
            found.append((record["environment"]["time"], file))
    return max(found)[1] if found else None


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
