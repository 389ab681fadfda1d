"""Scaling curves: the tiny run goes through, one thing varies at a time, and page and picture are made from its record."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from igulora.benchmarks.record import read
from igulora.benchmarks.scaling import curves as scaling
from igulora.benchmarks.scaling import page as scaling_page


@pytest.fixture(scope="module")
def record_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a tiny run, of two curves only."""
    output = tmp_path_factory.mktemp("scaling") / "record.json"
    with pytest.MonkeyPatch.context() as patch:
        few = [p for p in scaling.points(quick=True) if p.curve in ("rank", "matrices")]
        patch.setattr(scaling, "points", lambda quick: few)
        patch.setattr(scaling, "METHODS", ("floor", "instantaneous"))
        assert scaling.main(["--quick", "--rounds", "1", "--threads", "1", "--output", str(output)]) == 0
    return output


def test_adapter_parameters_follow_the_curves(record_file: Path) -> None:
    points = read(record_file)["results"]
    first, second = (p for p in points if p["curve"] == "rank")
    assert second["adapter_parameters"] == 2 * first["adapter_parameters"]
    few, all_of_them = (p for p in points if p["curve"] == "matrices")
    assert few["adapter_parameters"] < all_of_them["adapter_parameters"]
    assert all(p["ratios"]["instantaneous/floor"]["median"] > 0 for p in points)


@pytest.mark.parametrize("quick", [True, False])
def test_one_thing_varies_along_a_curve(quick: bool) -> None:
    points = list(scaling.points(quick))
    assert {p.curve for p in points} == set(scaling_page.TITLES)
    for curve in scaling_page.TITLES:
        of_curve = [p for p in points if p.curve == curve]
        assert [p.value for p in of_curve] == sorted({p.value for p in of_curve})
        fields = [{**dataclasses.asdict(p.case), "layers": p.layers} for p in of_curve]
        varying = {k for k in fields[0] if len({str(f[k]) for f in fields}) > 1} - {"name", "target_rank"}
        assert len(varying) == 1


def test_page_and_picture(record_file: Path, tmp_path: Path) -> None:
    assert scaling_page.main([str(record_file), "--folder", str(tmp_path)]) == 0
    record = read(record_file)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == scaling_page.page(record)
    assert (tmp_path / scaling_page.picture_name(record)).read_bytes().startswith(b"\x89PNG")


def _allocation(exponent: float) -> list[dict[str, Any]]:
    return [{"triplets": n, "seconds": {"median": 1e-6 * n**exponent}} for n in (10**4, 10**5, 10**6)]


def test_growth_is_measured_against_n_log_n() -> None:
    assert scaling_page.growth(_allocation(1.0)) < 1
    assert scaling_page.growth(_allocation(2.0)) > 50


def test_the_committed_page_is_that_of_the_newest_record() -> None:
    page = scaling.FOLDER / "README.md"
    records = sorted(scaling.FOLDER.glob("*.json"))
    expected = scaling_page.page(read(records[-1])) if records else None
    assert (page.read_text(encoding="utf-8") if page.exists() else None) == expected, (
        "run python -m igulora.benchmarks.scaling.page"
    )
