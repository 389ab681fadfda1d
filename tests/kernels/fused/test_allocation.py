"""The allocation kernels give the reference's mask bit for bit, and their traffic is what they load and store."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from igulora.kernels import allocate_triplets
from igulora.kernels.backend import use_backend
from igulora.kernels.fused import allocation as fused

from .counted import counted, only_interpreted
from .exactness import poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned")

NAN, INF = float("nan"), float("inf")
# Ties abound; the smallest numbers beside zeros of both signs; numbers whose order in bits is not that of their values.
VALUES = [0.0, -0.0, 1.0, 2.0, 2.5, -1.0, -2.0, 1e-30, -1e-30, 1e-45, -1e-45, 3e38, -3e38, NAN, INF, -INF]


def assert_same(problem: dict[str, Any], device: torch.device) -> Tensor:
    """By kernels and, on the CPU, by the reference; returns the mask."""
    ours = allocate_triplets(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in problem.items()}).cpu()
    with use_backend("reference"):
        theirs = allocate_triplets(**problem)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    return ours


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    """Layers of any rank, 0 included; some triplets may be out of the question, and cost something."""
    ranks = draw(st.lists(st.integers(0, 12), max_size=8))
    layer = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks, dtype=torch.int64))
    n = len(layer)
    costs = draw(st.none() | st.lists(st.integers(0, 2**40), min_size=8, max_size=8))
    eligible = draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n))
    budget = draw(st.integers(0, n + 2)) if costs is None else draw(st.integers(0, 2**43))
    return {
        "scores": torch.tensor(draw(st.lists(st.sampled_from(VALUES), min_size=n, max_size=n)), dtype=torch.float32),
        "budget": torch.tensor(budget),
        "layer": layer,
        "eligible": None if eligible is None else torch.tensor(eligible, dtype=torch.bool),
        "costs": None if costs is None else torch.tensor(costs, dtype=torch.int64)[layer],
        "min_rank": draw(st.integers(0, 4)),
    }


@given(problem=problems())
@settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_problem(problem: dict[str, Any], device: torch.device) -> None:
    assert_same(problem, device)


def drawn(n: int, seed: int = 0) -> dict[str, Tensor]:
    """Scores with many ties and every odd value, layers of any rank, eligibility and costs of n triplets."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-20, 20, (n,), generator=g) / 8
    odd = torch.rand(n, generator=g) < 0.2
    scores[odd] = torch.tensor(VALUES)[torch.randint(len(VALUES), (int(odd.sum()),), generator=g)]
    return {
        "scores": scores,
        "layer": torch.randint(0, max(n // 9, 1), (n,), generator=g).sort().values,
        "eligible": torch.rand(n, generator=g) < 0.7,
        "costs": torch.randint(1, 2**33, (n,), generator=g),
    }


# One program, several, and more triplets than are compared at a time, all but a round number.
@pytest.mark.parametrize("n", [0, 1, 16, 17, 333, 512, 550])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_any_number_of_triplets(n: int, options: str, device: torch.device) -> None:
    data = drawn(n)
    problem: dict[str, Any] = {"scores": data["scores"], "layer": data["layer"], "budget": torch.tensor(n // 3)}
    if options == "all":
        problem = {**problem, **data, "min_rank": 2, "budget": data["costs"].sum() // 3}
    assert_same(problem, device)


def test_exactly_as_many_as_the_budget(device: torch.device) -> None:
    data = drawn(200, 3)
    for budget in (0, 1, 77, 200, 300):
        live = assert_same({"scores": data["scores"], "layer": data["layer"], "budget": torch.tensor(budget)}, device)
        assert int(live.sum()) == min(budget, 200)


@pytest.mark.parametrize("min_rank", [1, 2, 5])
def test_every_layer_keeps_its_best(min_rank: int, device: torch.device) -> None:
    data = drawn(120, 1)
    layers = int(data["layer"].max()) + 1
    counts = torch.bincount(data["layer"], minlength=layers).clamp(max=min_rank)
    problem = {"scores": data["scores"], "layer": data["layer"], "min_rank": min_rank, "budget": counts.sum()}
    live = assert_same(problem, device)
    assert torch.equal(torch.bincount(data["layer"], weights=live, minlength=layers).long(), counts)


def test_the_budget_may_be_any_device_scalar_and_scores_any_dtype(device: torch.device) -> None:
    data = drawn(40, 2)
    for budget in (torch.tensor(7), torch.tensor([7]), torch.tensor(7, dtype=torch.int32)):
        assert_same({"scores": data["scores"], "layer": data["layer"], "budget": budget}, device)
    assert_same({"scores": data["scores"].half(), "layer": data["layer"], "budget": torch.tensor(7)}, device)


def test_views_with_gaps(device: torch.device) -> None:
    data = {name: torch.stack((v, torch.zeros_like(v)), 1)[:, 0] for name, v in drawn(60, 4).items()}
    assert_same({**data, "min_rank": 1, "budget": data["costs"].sum() // 2}, device)


@pytest.mark.parametrize("n", [0, 12])
@pytest.mark.parametrize("options", [False, True])
def test_opcheck(n: int, options: bool, device: torch.device) -> None:
    data = {name: v.to(device) for name, v in drawn(n).items()}
    extra = (data["eligible"], data["costs"], 1) if options else (None, None, 0)
    args = (data["scores"], torch.tensor(5, device=device), data["layer"], *extra)
    torch.library.opcheck(torch.ops.igulora.allocate_triplets.default, args)


@only_interpreted
@pytest.mark.parametrize("n", [0, 5, 300])
@pytest.mark.parametrize("options", [(), ("eligible",), ("costs",), ("eligible", "costs")])
@pytest.mark.parametrize("min_rank", [0, 2])
def test_traffic(n: int, options: tuple[str, ...], min_rank: int) -> None:
    data = drawn(n)
    given = {name: data[name] for name in options}
    with counted() as count:
        allocate_triplets(data["scores"], torch.tensor(3), data["layer"], min_rank=min_rank, **given)
    assert len(count.launches) == (0 if n == 0 else 1 + (min_rank > 0))
    expected = fused.traffic_allocation(n, min_rank=min_rank, **dict.fromkeys(options, True))
    assert count.traffic == expected
