"""Records: which may stand in one table, and whether two runs agree."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from igulora.benchmarks import record as records


def make(median: float = 1.2, spread: float = 0.05, case: str = "a", **changed: Any) -> dict[str, Any]:
    ratio = {"median": median, "q1": median - spread, "q3": median + spread}
    record = {
        "format": records.FORMAT,
        "date": "2026-01-01",
        "machine": {"device": "cpu", "cpu": "X", "cores": 2},
        "versions": {"torch": "2.13", "commit": "abc"},
        "threads": 2,
        "results": [{"case": {"name": case}, "ratios": {"ours/floor": ratio}}],
    }
    return copy.deepcopy(record | changed)


def test_two_runs_agree_where_their_quartiles_meet() -> None:
    (row,) = records.agreement(make(1.20), make(1.28))
    assert row["agrees"]
    (row,) = records.agreement(make(1.20), make(1.31))
    assert not row["agrees"]
    assert (row["before"]["median"], row["now"]["median"]) == (1.20, 1.31)


def test_what_only_one_run_measured_is_not_compared() -> None:
    assert records.agreement(make(case="a"), make(case="b")) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": {"device": "cpu", "cpu": "Y", "cores": 2}},
        {"threads": 1},
        {"versions": {"torch": "2.14", "commit": "abc"}},
        {"machine": {"device": "NVIDIA H100", "cpu": "X", "cores": 2}},
    ],
)
def test_results_of_different_machines_are_never_merged(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected results of one machine"):
        records.merge([make(), make(case="b", **changed)])
    with pytest.raises(ValueError, match="expected results of one machine"):
        records.agreement(make(), make(**changed))


def test_of_a_case_measured_twice_the_later_result_counts() -> None:
    commit = {"torch": "2.13", "commit": "def"}
    merged = records.merge([make(1.1), make(1.3, case="b"), make(1.2, versions=commit)])
    medians = {r["case"]["name"]: r["ratios"]["ours/floor"]["median"] for r in merged["results"]}
    assert medians == {"a": 1.2, "b": 1.3}
    assert merged["versions"]["commit"] == "def"


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text, message in (
        ("{", "not JSON"),
        ("[]", "got format 'list'"),
        ('{"format": 99, "results": []}', "format 99"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            records.read(file)


def test_a_record_is_never_lost_for_what_lies_in_its_place(tmp_path: Path) -> None:
    """The same machine: put together. Another one, or an older format: beside it."""
    file = tmp_path / "2026-01-01-x.json"
    assert records.keep(make(), file) == file
    assert records.keep(make(1.5, case="b"), file) == file
    assert [r["case"]["name"] for r in records.read(file)["results"]] == ["a", "b"]
    assert records.keep(make(threads=1), file).name == "2026-01-01-x-2.json"
    (tmp_path / "2026-01-01-x-3.json").write_text('{"format": 1}', encoding="utf-8")
    last = records.keep(make(threads=7), file)
    assert last.name == "2026-01-01-x-4.json"
    assert records.newest(tmp_path) == last


def test_the_newest_gpu_record_is_that_of_a_part(tmp_path: Path) -> None:
    """By the time in it: a run of one part says nothing of the others."""
    assert records.newest_of(tmp_path, "steps") is None
    for name, time, part in (
        ("a", "2026-01-02", "steps"),
        ("b", "2026-01-01", "steps"),
        ("c", "2026-01-03", "compiled"),
    ):
        content = {"environment": {"time": time}, "parts": {part: {}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    assert records.newest_of(tmp_path, "steps") == tmp_path / "a.json"
    assert records.newest_of(tmp_path, "compiled") == tmp_path / "c.json"


def test_each_result_carries_its_commit() -> None:
    opened = records.open_record()
    (result,) = records.close_record(opened, [{"case": {"name": "a"}}], 1.0)["results"]
    assert result["commit"] == opened["versions"]["commit"]
