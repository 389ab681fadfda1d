"""Intervals of paired differences, and what holds for many of them together."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("transformers")

from igulora.benchmarks.study.intervals import Difference, Spread, bootstrap, surely_different


def test_intervals() -> None:
    clear = bootstrap([[0.1, 0.11, 0.12, 0.09, 0.1]])
    assert clear.clear
    assert clear.p < 0.01
    assert clear.mean == pytest.approx(0.104)
    assert clear.low < clear.mean < clear.high
    mixed = bootstrap([[0.5, -0.4, 0.4, -0.5, 0.1]])
    assert not mixed.clear
    assert mixed.p > 0.5
    assert not bootstrap([[1.0, 1.1, 0.9, 1.0]]).clear  # too few
    for alike in ([[0.2], [0.1, 0.1]], [[0.1] * 6]):  # of one value, or of equal ones, resamples tell nothing
        assert bootstrap(alike)[1:4] == (-math.inf, math.inf, 1.0)
    assert bootstrap([[0.0, 0.0]]) == (0.0, 0.0, 0.0, 1.0, 2)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_of_many_comparisons_what_is_said_is_surer() -> None:
    sure, unsure, none = (Difference(1.0, 0.5, 1.5, p, 5) for p in (0.01, 0.04, 0.2))
    assert surely_different([sure, none]) == [True, False]
    assert surely_different([none, sure, unsure]) == [False, True, False]
    assert surely_different([sure, unsure]) == [True, True]  # the second only needs what is left
    assert surely_different([sure] * 6) == [False] * 6
    assert surely_different([]) == []


def test_tasks_weigh_alike_and_are_resampled_apart() -> None:
    gap = bootstrap([[0.1, 0.1001] * 3, [0.3, 0.3001] * 2])
    assert (gap.mean, gap.pairs) == (pytest.approx(0.2, abs=1e-3), 10)
    assert gap.high - gap.low < 0.001  # what tasks differ in is no uncertainty


@pytest.mark.parametrize(
    ("sizes", "spreads"), [((5,), (1,)), ((15,), (1,)), ((4, 4), (1, 0.1)), ((5, 5, 5), (1, 0.3, 0.1))]
)
def test_how_often_equals_look_different(sizes: tuple[int, ...], spreads: tuple[float, ...]) -> None:
    generator = np.random.default_rng(0)
    strata = [
        [spread * generator.standard_normal(size) for size, spread in zip(sizes, spreads, strict=True)]
        for _ in range(300)
    ]
    found = [bootstrap(part) for part in strata]
    assert sum(gap.clear for gap in found) / len(found) <= 0.08  # 0.05 but for chance; percentiles: up to 0.2
    assert 0.4 < np.mean([gap.p for gap in found]) < 0.6
