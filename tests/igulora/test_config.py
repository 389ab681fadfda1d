"""IGUConfig: method defaults, round trips, and what a wrong option is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from igulora import IGUConfig
from igulora.config import BIDIRECTIONAL, FIXED_RANK, METHODS
from igulora.errors import nearest

STEPS = {"total_steps": 200}


@pytest.mark.parametrize("method", list(METHODS))
def test_round_trip_through_json(method: str) -> None:
    config = IGUConfig(method=method, rank_pattern={"q": 3}, exclude_modules=["x"], lora_alpha=8, **STEPS)
    assert IGUConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_no_option_is_left_open() -> None:
    for method in METHODS:
        values = IGUConfig(method=method, **STEPS).to_dict()
        left = {k for k, v in values.items() if v is None}
        of_the_model = {"moves"} if method in BIDIRECTIONAL else {"moves", "max_rank"}
        left -= {"lora_alpha", *of_the_model}
        assert left <= ({"t_init", "t_final", "delta_t"} if method in FIXED_RANK else set())


def test_adalora_is_a_setting_of_the_same_machine() -> None:
    config = IGUConfig(method="adalora", **STEPS)
    assert (config.estimator, config.combine, config.lambda_score, config.prune) == (
        "instantaneous",
        "product",
        "score",
        "soft",
    )
    assert IGUConfig(method="adalora", combine="snr", **STEPS).combine == "snr"


def test_scale_is_alpha_over_the_initial_rank() -> None:
    assert IGUConfig(r=32, **STEPS).scale == 1.0
    assert IGUConfig(r=32, lora_alpha=16, **STEPS).scale == 0.5
    assert IGUConfig(method="lora", target_rank=8, lora_alpha=16).scale == 2.0
    assert IGUConfig(r=0, target_rank=0, lora_alpha=16, **STEPS).scale == 1.0


def test_who_starts_from_zero() -> None:
    starts = {method: IGUConfig(method, r=4, **STEPS).init for method in METHODS}
    assert {method for method, init in starts.items() if init == "zero"} == {"igu", "random", "magnitude"}
    assert {method for method, init in starts.items() if init == "lora"} == set(FIXED_RANK)


def test_what_follows_from_a_start_at_zero() -> None:
    one, zero, lora = (IGUConfig(r=4, total_steps=500, init=init) for init in ("orthonormal", "zero", "lora"))
    assert (one.init_lambda, zero.init_lambda) == (0.0, 1.0)
    assert (one.orthogonality, zero.orthogonality, lora.orthogonality) == (
        0.1,
        0.0,
        0.0,
    )  # it would pull P to unit length
    assert IGUConfig(r=4, total_steps=500, init="zero", init_lambda=2.0, orthogonality=0.3).orthogonality == 0.3


def test_lora_needs_no_schedule_and_no_room_to_prune() -> None:
    config = IGUConfig(method="lora", r=4, target_rank=8)
    assert not config.adaptive
    assert config.initial_rank == 8


@pytest.mark.parametrize("accumulates", [1, 16])
def test_default_schedules_fit_their_run(accumulates: int) -> None:
    for total in (70, 100, 1000, 100_000):
        config = IGUConfig(total_steps=total)
        assert config.t_init + config.t_final < total
        assert config.t_init >= 3 * config.window
        assert config.delta_t >= 1


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"method": "ig"}, ValueError, "method.*Did you mean 'igu'"),
        ({"method": "adlora"}, ValueError, "Did you mean 'adalora'"),
        ({"estimator": "gaus"}, ValueError, "estimator.*got 'gaus'.*Did you mean 'gauss'"),
        ({"path": "facters"}, ValueError, "Did you mean 'factors'"),
        ({"combine": "zzzz"}, ValueError, "one of snr, snr-release, product, mean; got 'zzzz'"),
        ({"prune": None}, ValueError, "prune"),
        ({"r": 8, "target_rank": 9}, ValueError, "target_rank=9 > r=8"),
        ({"r": -1}, ValueError, "r >= 0"),
        ({"r": 8.0}, TypeError, r"r to be an int, got 8.0 \(float\)"),
        ({"r": True}, TypeError, "r to be an int"),
        ({"window": 0}, ValueError, "window >= 1"),
        ({"ig_every": 0}, ValueError, "ig_every >= 1"),
        ({"ig_fraction": 0.0}, ValueError, "0 < ig_fraction <= 1"),
        ({"ig_fraction": 1.5}, ValueError, "0 < ig_fraction <= 1"),
        ({"nodes": 0}, ValueError, "nodes >= 1"),
        ({"estimator": "trapezoid", "nodes": 1}, ValueError, "nodes >= 2"),
        ({"dropout": 1.0}, ValueError, "0 <= dropout < 1"),
        ({"beta1": 1.0}, ValueError, "0 <= beta1 < 1"),
        ({"beta2": -0.1}, ValueError, "0 <= beta2 < 1"),
        ({"min_rank": 17}, ValueError, "min_rank <= target_rank"),
        ({"orthogonality": -0.1}, ValueError, "orthogonality >= 0"),
        ({"rank_pattern": {"q": -1}}, ValueError, "rank_pattern.*-1 for 'q'"),
        ({"rank_pattern": {"q": "8"}}, ValueError, "rank_pattern.*'8' for 'q'"),
        ({"total_steps": None}, ValueError, "total_steps.*got None"),
        ({"total_steps": 0}, ValueError, "total_steps to be a positive int"),
        ({"total_steps": 10.5}, ValueError, "total_steps to be a positive int"),
        ({"t_init": 150, "t_final": 50}, ValueError, r"total_steps > t_init \+ t_final, got 200 <= 150 \+ 50"),
        ({"t_init": -1}, ValueError, "t_init to be an int >= 0"),
        ({"delta_t": 0}, ValueError, "delta_t to be an int >= 1"),
        ({"total_steps": 40}, ValueError, "at least three windows of 16"),
    ],
)
def test_wrong_options(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        IGUConfig(**{**STEPS, **change})


def test_unknown_key_of_a_dict() -> None:
    with pytest.raises(ValueError, match=r"got 'target_ranks'\. Did you mean 'target_rank'"):
        IGUConfig.from_dict({"target_ranks": 3})


def test_nearest_is_silent_without_a_near_name() -> None:
    assert nearest("qqqq", ["alpha", "beta"]) == ""
    assert nearest("alpa", ["alpha", "beta"]) == " Did you mean 'alpha'?"
    assert nearest(None, []) == ""


def test_lora_trains_the_rank_it_is_given() -> None:
    assert IGUConfig(method="lora", r=8).initial_rank == 8
    assert IGUConfig(method="lora", r=8, target_rank=4).initial_rank == 4  # the final budget of the pruning methods
    assert IGUConfig(r=8, total_steps=1000).target_rank == 4


def test_the_papers_estimators_sample_every_micro_batch() -> None:
    for estimator in ("trapezoid", "on-path", "on-path-stratified"):
        config = IGUConfig(total_steps=1000, estimator=estimator)
        assert (config.ig_every, config.ig_fraction) == (1, 1.0)
    assert IGUConfig(total_steps=1000).ig_every == 16
