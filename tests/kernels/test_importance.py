"""importance_update against the formulas of ALGORITHMS 2.3 in float64; a non-finite gradient changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from igulora.kernels import importance as module
from igulora.kernels import importance_update

BETA1, BETA2, EPS = 0.85, 0.7, 1e-6


def buffers(n: int, seed: int = 0) -> list[Tensor]:
    """weight, path, mean, deviation of n elements; states as after some updates."""
    g = torch.Generator().manual_seed(seed)
    draws = [torch.randn(n, generator=g) for _ in range(4)]
    return [draws[0], draws[1], draws[2].abs(), draws[3].abs() + 0.1]


def formula(
    weight: Tensor, path: Tensor, mean: Tensor, deviation: Tensor, combine: str, absolute: bool
) -> list[Tensor]:
    """Eq. 10-12 as printed, float64: score, y, mean, deviation per element."""
    w, t, m, u = (v.double() for v in (weight, path, mean, deviation))
    y = t.abs() if absolute else (w * t).abs()
    m = BETA1 * m + (1 - BETA1) * y
    u = BETA2 * u + (1 - BETA2) * (y - m).abs()
    score = {"snr": m / (u + EPS), "snr-release": (m + EPS) / (u + EPS), "product": m * u, "mean": m}[combine]
    return [score, y, m, u]


def row_means(values: Tensor, regions: list[int]) -> Tensor:
    parts = []
    for i in range(0, len(regions), 3):
        offset, rows, length = regions[i : i + 3]
        parts.append(values[offset : offset + rows * length].view(rows, length).mean(1))
    return torch.cat(parts) if parts else values.new_empty(0)


def update(b: list[Tensor], regions: list[int], combine: str = "snr", absolute: bool = False) -> tuple[Tensor, Tensor]:
    return importance_update(*b, regions, beta1=BETA1, beta2=BETA2, eps=EPS, combine=combine, absolute=absolute)


# Regions with a gap between them, a row of one element, a single row, nothing at all.
REGIONS = [[0, 3, 4, 16, 2, 7, 30, 5, 1], [2, 1, 9], []]


@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("combine", ["snr", "snr-release", "product", "mean"])
@pytest.mark.parametrize("absolute", [False, True])
def test_follows_the_formulas(regions: list[int], combine: str, absolute: bool) -> None:
    b = buffers(40)
    before = [v.clone() for v in b]
    score, y, mean, deviation = formula(*before, combine, absolute)
    stats, finite = update(b, regions, combine, absolute)
    assert finite.shape == ()
    assert bool(finite)
    inside = torch.zeros(40, dtype=torch.bool)
    for i in range(0, len(regions), 3):
        inside[regions[i] : regions[i] + regions[i + 1] * regions[i + 2]] = True
    for state, old, new in ((b[2], before[2], mean), (b[3], before[3], deviation)):
        torch.testing.assert_close(state[inside].double(), new[inside], rtol=1e-5, atol=1e-6)
        assert torch.equal(state[~inside], old[~inside])  # padding between regions is left alone
    assert torch.equal(b[0], before[0])
    assert torch.equal(b[1], before[1])
    expected = torch.stack([row_means(v, regions) for v in (score, y, mean, deviation)])
    torch.testing.assert_close(stats.double(), expected, rtol=2e-5, atol=1e-6)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=4),
    chunk=st.sampled_from([1, 5, 16, 1 << 17]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_any_regions_in_chunks_of_any_size(shapes: list[tuple[int, int, int]], chunk: int, seed: int) -> None:
    regions, offset = [], 0
    for rows, length, gap in shapes:
        regions += [offset, rows, length]
        offset += rows * length + gap
    b, held = buffers(offset, seed), module._CHUNK
    expected = torch.stack([row_means(v, regions) for v in formula(*(v.clone() for v in b), "snr", False)])
    module._CHUNK = chunk
    try:
        stats, _ = update(b, regions)
    finally:
        module._CHUNK = held
    torch.testing.assert_close(stats.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 17, 34])
@pytest.mark.parametrize("absolute", [False, True])
def test_non_finite_gradient_changes_no_bit(value: float, where: int, absolute: bool) -> None:
    regions, b = REGIONS[0], buffers(40)
    b[1][where] = value
    before = [v.clone() for v in b[2:]]
    stats, finite = update(b, regions, absolute=absolute)
    assert not bool(finite)
    assert all(torch.equal(state, old) for state, old in zip(b[2:], before, strict=True))
    assert stats.isfinite().all()


def test_opposite_infinities_do_not_cancel() -> None:
    b = buffers(40)
    b[1][0], b[1][1] = float("inf"), -float("inf")
    before = b[2].clone()
    assert not bool(update(b, REGIONS[0])[1])
    assert torch.equal(b[2], before)


def test_first_update_scores_every_weight_alike() -> None:
    """ALGORITHMS 2.3: from zero states the score is 1/beta1 whatever the weight: mean 0.15 y, deviation 0.15 * 0.85 y."""
    weight, path = torch.logspace(-2, 3, 12), torch.ones(12)
    stats, _ = importance_update(weight, path, torch.zeros(12), torch.zeros(12), [0, 12, 1], eps=0.0)
    torch.testing.assert_close(stats[0], torch.full((12,), 1 / 0.85), rtol=1e-5, atol=0)


def test_masked_triplets_with_zero_gradient_score_zero() -> None:
    stats, _ = importance_update(*(torch.zeros(6) for _ in range(4)), [0, 2, 3])
    assert torch.count_nonzero(stats) == 0


@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("combine", ["snr", "product"])
def test_opcheck(regions: list[int], combine: str) -> None:
    torch.library.opcheck(
        torch.ops.igulora.importance_update.default, (*buffers(40), regions, BETA1, BETA2, EPS, combine, False, None)
    )
    slots = torch.randperm(sum(regions[1::3]))
    torch.library.opcheck(
        torch.ops.igulora.importance_update.default, (*buffers(40), regions, BETA1, BETA2, EPS, combine, True, slots)
    )


def test_slots_say_where_a_row_writes() -> None:
    regions = REGIONS[0]
    slots = torch.randperm(sum(regions[1::3]), generator=torch.Generator().manual_seed(0))
    plain, _ = update(buffers(40), regions)
    placed, _ = importance_update(*buffers(40), regions, beta1=BETA1, beta2=BETA2, eps=EPS, slots=slots)
    assert torch.equal(placed[:, slots], plain)


def test_same_bits() -> None:
    one, two = (update(buffers(40, 3), REGIONS[0])[0] for _ in range(2))
    assert torch.equal(one, two)


def test_bad_input_is_told_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"expected combine in .* got 'ratio'"):
        update(buffers(4), [0, 4, 1], "ratio")
    b = buffers(4)
    with pytest.raises(ValueError, match="buffers of one length"):
        update([*b[:3], torch.zeros(5)], [0, 4, 1])
