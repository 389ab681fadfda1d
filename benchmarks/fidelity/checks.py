"""How exact the exact integral is, whether mixed and separate passes agree, and what any agreement must be read against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from igulora.objective import Objective
from igulora.path_pass import PathPasses

from .measure import MEASURES, agreement, composite_trapezoid, difference, integrate, loss_change, top
from .point import Point
from .settings import Setting


def check(point: Point) -> dict[str, Any]:
    """Entries of the record: ``exact``, ``controls``, ``scores``, ``triplets`` and ``budget``."""
    return {
        "triplets": point.bank.triplets,
        "budget": point.target,
        "exact": _exactness(point),
        "controls": _controls(point),
        "scores": _separation(point),
    }


def _exactness(point: Point) -> dict[str, Any]:
    """Twice as many intervals, the other reference, the completeness axiom, and mixed against separate passes, all on the first window."""
    study, bank, loss = point.study, point.bank, point.problem.loss
    first = point.problem.window(study, 0)
    coarse, fine = (
        integrate(point.model, loss, first[:1], composite_trapezoid(n), study.copies).signed
        for n in (study.intervals, 2 * study.intervals)
    )
    exact, part = point.kept("exact", 0).signed, bank.layout.lambda_offset
    return {
        "intervals": study.intervals,
        "evaluations": study.intervals + 1,
        "windows": study.exact_windows,
        "doubled": _near(point, coarse, fine),
        "gauss5": _near(point, point.kept("gauss5", 0).signed, exact),
        "completeness": {
            "attributed": (bank.weight[part:] * exact[part:]).sum().item(),
            "loss_change": loss_change(point.model, loss, first),
        },
        "passes": _mixed_against_separate(point, first),
    }


def _near(point: Point, estimate: Tensor, exact: Tensor) -> dict[str, float]:
    """How near two path gradients of one window are, and the rankings by sensitivity."""
    a, b = (point.follow([T]).sensitivity[0] for T in (estimate, exact))
    return {"difference": difference(estimate, exact), **agreement(a, b, point.target)}


def _mixed_against_separate(point: Point, batches: Sequence[Any]) -> dict[str, Any]:
    """One setting by mixed batches and by passes of its own, the same draws: equal up to rounding."""
    setting = Setting("gauss", 3, 6, 0.25)
    found = {}
    for way in ("mixed", "separate"):
        config = dataclasses.replace(setting.config(point.config, 0), path_pass=way)
        passes = PathPasses(point.model, point.bank, config, None)
        for batch in batches:
            passes.train_and_sample(Objective(point.problem.loss), batch)
            point.bank.context.unstepped = 0
        found[way] = passes.close_window().clone()
    point.bank.grad.zero_()
    return {"setting": setting.key, **_near(point, found["mixed"], found["separate"])}


def _controls(point: Point) -> dict[str, Any]:
    """What agreement means nothing, and what none can exceed: chance, |lambda|, and the exact integral on other data."""
    exact, b = point.exact["signed"], point.target
    scores, magnitude = exact.scores(), point.bank.lambdas.abs()
    targets = {"sensitivity": exact.sensitivity, **{name: [scores[name]] for name in MEASURES[1:]}}

    def against(estimate: Callable[[], Tensor]) -> dict[str, Any]:
        return {name: _columns([agreement(estimate(), t, b) for t in wanted]) for name, wanted in targets.items()}

    generator = torch.Generator().manual_seed(0)
    count = len(exact.sensitivity)
    pairs = [agreement(exact.sensitivity[i], exact.sensitivity[j], b) for i in range(count) for j in range(i)]
    half = count // 2
    one, other = (
        point.follow([point.reference(w).signed for w in part]).scores()
        for part in (range(half), range(half, 2 * half))
    )
    return {
        "random": against(lambda: torch.rand(point.bank.triplets, generator=generator)),
        "magnitude": against(lambda: magnitude),
        "other data": {
            "sensitivity": _columns(pairs),
            **{name: _columns([agreement(one[name], other[name], b)]) for name in MEASURES[1:]},
        },
        "absolute": point.compare(point.exact["absolute"], exact),
    }


def _columns(found: list[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [f[key] for f in found] for key in ("top", "spearman")}


def _separation(point: Point) -> dict[str, Any]:
    """Do the exact scores tell triplets apart? Spread of the SNR terms beside that of |lambda|, and how the rankings relate."""
    exact, levels = point.exact["signed"], torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    snr, magnitude = exact.scores()["snr"], point.bank.lambdas.abs()
    threshold = snr[top(snr, point.target)].min()

    def quantiles(values: Tensor) -> list[float]:
        return values.float().quantile(levels).tolist()

    return {
        "levels": [0.05, 0.25, 0.5, 0.75, 0.95],
        "snr_terms": quantiles(exact.snr_terms),
        "magnitude": quantiles(magnitude),
        "sensitivity": quantiles(exact.sensitivity[0]),
        "below_epsilon": exact.below_epsilon,
        "near_threshold": ((snr - threshold).abs() <= 0.01 * threshold.abs()).double().mean().item(),
        "snr_against_magnitude": agreement(snr, magnitude, point.target),
        "snr_against_sensitivity": agreement(snr, torch.stack(exact.sensitivity).mean(0), point.target),
    }
