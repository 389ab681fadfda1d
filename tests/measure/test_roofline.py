"""The rule that makes a time of counts."""

from __future__ import annotations

import pytest

from igulora.measure.costs import Cost
from igulora.measure.roofline import CARDS, Card, Roofline, card

SIMPLE = Card("simple", "sm_90", 100, bandwidth=1.0, rate=2.0, cache=10)  # 1 TB/s; 1 TFLOP/s of 2 sustained below


@pytest.fixture
def roofline() -> Roofline:
    return Roofline(SIMPLE, sustained=0.5, launch_s=1e-3, host_s=2e-3, sync_s=5e-3)


def test_a_call_takes_the_longer_of_bytes_and_flops(roofline: Roofline) -> None:
    assert roofline.device_seconds(Cost(0, 3 * 10**9, 10**9, 10**9)) == pytest.approx(4e-3)
    assert roofline.device_seconds(Cost(2, 10**9, 0, 10**10)) == pytest.approx(10e-3 + 2e-3)
    assert roofline.device_time({Cost(1, 10**9, 0, 0): 3}) == pytest.approx(3 * 2e-3)


def test_a_step_takes_the_longer_of_device_and_host_and_its_waits(roofline: Roofline) -> None:
    assert roofline.step_time(0.5, launches=10, syncs=0) == pytest.approx(0.5)
    assert roofline.step_time(0.5, launches=1000, syncs=2) == pytest.approx(2.0 + 0.01)


def test_figures_in_place_of_the_cards(roofline: Roofline) -> None:
    changed = roofline.with_figures(bandwidth=4.0, rate=None)
    assert (changed.card.bandwidth, changed.card.rate) == (4.0, 2.0)
    assert roofline.with_figures(None, None) is roofline


def test_cards_by_name() -> None:
    assert card("h100") is card("H100 SXM") is CARDS["H100 SXM"]
    assert card("L40") is not card("L40S")
    with pytest.raises(ValueError, match="Did you mean 'h100'"):
        card("H10")


@pytest.mark.parametrize("figures", [{"sustained": 0.0}, {"launch_s": -1.0}, {"host_s": -1e-9}])
def test_impossible_figures_are_refused(figures: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Roofline(**figures)
    with pytest.raises(ValueError, match="bandwidth"):
        Roofline().with_figures(bandwidth=0.0, rate=None)
