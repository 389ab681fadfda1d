"""The page of kernels/README.md: up to date, within the design's limits, and right about the two passes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def traffic_page(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import traffic_page

    yield traffic_page
    sys.modules.pop("traffic_page", None)


def test_the_page_is_up_to_date(traffic_page) -> None:
    old = traffic_page.PAGE.read_text(encoding="utf-8")
    assert traffic_page.page(old) == old, "run python benchmarks/traffic_page.py"


def test_the_fused_form_meets_the_limits_on_every_card(traffic_page) -> None:
    for card in traffic_page.CARDS:
        for direction, value in traffic_page.totals(card, "pointers", 1, partial=False).items():
            assert value <= traffic_page.LIMITS[direction], (card.name, direction)


def test_each_pass_reads_its_operand_once(traffic_page) -> None:
    page, one_pass = traffic_page, traffic_page.M * traffic_page.WIDTH * traffic_page.ITEMSIZE
    parts = page.launches(page.CARDS[1], "pointers", 1)
    for launch in (parts["forward"]["S"], parts["backward"]["dy"], parts["backward"]["dQ"]):
        assert one_pass < launch.read < 1.05 * one_pass
    alone = sum(t.read for t in parts["forward"].values())
    shared = sum(t.read for t in page.launches(page.CARDS[1], "pointers", 3)["forward"].values())
    assert alone - shared == pytest.approx(
        2 / 3 * one_pass, rel=0.06
    )  # K is split for three: parts of S are read again


def test_the_library_form_writes_and_reads_the_output_once_more(traffic_page) -> None:
    page = traffic_page
    fused, library = (
        page.launches(page.CARDS[0], form, 1)["forward"]["rank term of y"] for form in ("pointers", "library")
    )
    extra = page.M * page.WIDTH * page.ITEMSIZE
    assert library.written - fused.written == extra
    assert library.read - fused.read == extra
