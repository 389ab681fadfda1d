"""allocate_triplets against a plain Python sort: exactly b, ties, NaN, min_rank, costs, eligibility."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from igulora.kernels import allocate_triplets

NAN, INF = float("nan"), float("inf")


def plain(scores, budget, layer, eligible=None, costs=None, min_rank=0) -> list[float]:
    """Python's sort: best first, ties by lower index, NaN last; the min_rank best of every layer before all others."""
    n = len(scores)
    allowed = [i for i in range(n) if eligible is None or eligible[i]]
    ranked = sorted(allowed, key=lambda i: (math.isnan(scores[i]), -scores[i] if not math.isnan(scores[i]) else 0.0, i))
    seen: dict[int, int] = {}
    first, rest = [], []
    for i in ranked:
        seen[layer[i]] = seen.get(layer[i], 0) + 1
        (first if seen[layer[i]] <= min_rank else rest).append(i)
    live, spent = [0.0] * n, 0
    for i in first + rest:
        spent += 1 if costs is None else costs[i]
        if spent > budget:
            break
        live[i] = 1.0
    return live


def ours(scores, budget, layer, eligible=None, costs=None, min_rank=0) -> list[float]:
    return allocate_triplets(
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(budget),
        torch.tensor(layer, dtype=torch.int64),
        eligible=None if eligible is None else torch.tensor(eligible, dtype=torch.bool),
        costs=None if costs is None else torch.tensor(costs, dtype=torch.int64),
        min_rank=min_rank,
    ).tolist()


@st.composite
def problems(draw):
    """Layers of any rank, 0 included; few different scores, so that ties abound; NaN and infinities among them."""
    ranks = draw(st.lists(st.integers(0, 5), max_size=6))
    layer = [i for i, r in enumerate(ranks) for _ in range(r)]
    n = len(layer)
    values = st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.5, -1.0, 1e-30, NAN, INF, -INF])
    return {
        "scores": draw(st.lists(values, min_size=n, max_size=n)),
        "budget": draw(st.integers(0, n + 2)),
        "layer": layer,
        "eligible": draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n)),
        "min_rank": draw(st.integers(0, 3)),
    }


@given(problems())
@settings(max_examples=300, derandomize=True, deadline=None)
def test_equals_a_plain_sort(problem) -> None:
    live = ours(**problem)
    assert live == plain(**problem)
    n, eligible = len(live), problem["eligible"]
    assert sum(live) == min(problem["budget"], n if eligible is None else sum(eligible))


@given(problems(), st.data())
@settings(max_examples=150, derandomize=True, deadline=None)
def test_costs_stay_within_the_budget(problem, data) -> None:
    n = len(problem["layer"])
    by_layer = data.draw(st.lists(st.integers(1, 9), min_size=6, max_size=6))
    costs = [by_layer[i] for i in problem["layer"]]
    problem = {**problem, "costs": costs, "budget": data.draw(st.integers(0, 5 * n))}
    live = ours(**problem)
    assert live == plain(**problem)
    assert sum(c for c, kept in zip(costs, live, strict=True) if kept) <= problem["budget"]


@given(st.integers(0, 60), st.integers(0, 2**20))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_all_scores_equal_keeps_the_first(budget: int, seed: int) -> None:
    live = ours([0.5] * 50, budget, sorted(seed % (i + 2) for i in range(50)))
    assert live == [1.0] * min(budget, 50) + [0.0] * max(50 - budget, 0)


def test_an_eligible_nan_comes_before_the_ineligible() -> None:
    assert ours([1.0, NAN, 2.0], 2, [0, 0, 0], eligible=[False, True, True]) == [0.0, 1.0, 1.0]


def test_min_rank_asks_nothing_for_the_ineligible() -> None:
    assert ours([1.0, 3.0, 2.0, 5.0], 2, [0, 0, 1, 1], eligible=[False, False, True, True], min_rank=1) == [0, 0, 1, 1]


def scores(n: int = 12) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", [0, 12])
@pytest.mark.parametrize("options", [False, True])
def test_opcheck(n: int, options: bool) -> None:
    layer = torch.arange(n) // 4
    extra = (torch.arange(n) % 2 == 0, torch.full((n,), 3), 1) if options else (None, None, 0)
    torch.library.opcheck(torch.ops.igulora.allocate_triplets.default, (scores(n), torch.tensor(5), layer, *extra))


def test_scores_are_not_changed_and_the_budget_may_be_any_device_scalar() -> None:
    s = scores()
    held = s.clone()
    for budget in (torch.tensor(4), torch.tensor([4]), torch.tensor(4, dtype=torch.int32)):
        assert int(allocate_triplets(s, budget, torch.zeros(12, dtype=torch.int64)).sum()) == 4
    assert torch.equal(s, held)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scores": torch.zeros(3, 4)}, r"one shape \(n,\)"),
        ({"layer": torch.zeros(3, dtype=torch.int64)}, r"one shape \(n,\)"),
        ({"eligible": torch.ones(3, dtype=torch.bool)}, "expected eligible of shape"),
        ({"costs": torch.ones(13, dtype=torch.int64)}, "expected costs of shape"),
    ],
)
def test_bad_input_is_told_what_was_expected(change, match) -> None:
    good = {"scores": scores(), "layer": torch.zeros(12, dtype=torch.int64), "eligible": None, "costs": None}
    args = {**good, **change}
    with pytest.raises(ValueError, match=match):
        allocate_triplets(
            args["scores"], torch.tensor(3), args["layer"], eligible=args["eligible"], costs=args["costs"]
        )
