"""The importance kernels against float64, bit by bit where nothing may change, and their traffic against what they load and store."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from igulora.kernels import importance_update
from igulora.kernels.backend import use_backend
from igulora.kernels.fused import importance as fused
from igulora.kernels.importance import COMBINES, row_table

from .counted import counted, only_interpreted
from .exactness import Guarded, assert_exact, poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned")

OPTIONS = {"beta1": 0.85, "beta2": 0.7, "eps": 1e-6}
# Rows of odd length and at odd offsets beside aligned ones; rows of several blocks; no row at all; single elements only, more of them
# than a block; single elements before other rows.
REGIONS = {
    "aligned": [0, 3, 64, 192, 2, 1028, 2304, 5, 1],
    "mixed": [0, 3, 7, 64, 2, 577, 1220, 2, 12, 1300, 9, 1],
    "odd offset": [3, 2, 8, 21, 2, 1],
    "several blocks": [0, 1, 1600, 1664, 1, 2101],
    "singles": [0, 700, 1],
    "singles first": [0, 4, 1, 8, 2, 6],
    "empty": [],
}


def size_of(regions: list[int]) -> int:
    return max([o + n * length for o, n, length in zip(*(regions[k::3] for k in range(3)), strict=True)], default=0) + 5


def buffers(n: int, seed: int = 0) -> list[Tensor]:
    """weight, path, mean, deviation as after some updates."""
    g = torch.Generator().manual_seed(seed)
    w, t, m, u = (torch.randn(n, generator=g) for _ in range(4))
    return [w, t, m.abs(), u.abs() + 0.1]


def run(b: list[Tensor], regions: list[int], device: torch.device, **options: Any) -> dict[str, Any]:
    """One update by the kernels, on copies between canaries."""
    w, t = (v.clone().to(device) for v in b[:2])
    m, u = (Guarded(v.to(device)) for v in b[2:])
    stats, finite = importance_update(w, t, m.buffer, u.buffer, regions, **{**OPTIONS, **options})
    for guarded in (m, u):
        guarded.assert_intact()
    torch.testing.assert_close(w.cpu(), b[0], rtol=0, atol=0, equal_nan=True)
    return {"stats": stats.cpu(), "finite": bool(finite), "mean": m.buffer.cpu(), "deviation": u.buffer.cpu()}


def reference(b: list[Tensor], regions: list[int], dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """The same by the reference."""
    w, t, m, u = (v.clone().to(dtype) for v in b)
    with use_backend("reference"):
        stats, finite = importance_update(w, t, m, u, regions, **{**OPTIONS, **options})
    return {"stats": stats, "finite": bool(finite), "mean": m, "deviation": u}


def assert_follows(b: list[Tensor], regions: list[int], device: torch.device, **options: Any) -> None:
    ours = run(b, regions, device, **options)
    single, exact = (reference(b, regions, dtype, **options) for dtype in (torch.float32, torch.float64))
    assert ours["finite"] is exact["finite"]
    for state in ("mean", "deviation"):
        assert_exact(ours[state], single[state], exact[state])
    for k in range(4):
        assert_exact(ours["stats"][k], single["stats"][k], exact["stats"][k])


@pytest.mark.parametrize("regions", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("absolute", [False, True])
def test_any_layout(regions: list[int], absolute: bool, device: torch.device) -> None:
    assert_follows(buffers(size_of(regions)), regions, device, absolute=absolute)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_every_combination(combine: str, eps: float, device: torch.device) -> None:
    # Nothing of a score may come from the lanes behind a row's end, which see 0 / 0 where eps is 0.
    assert_follows(buffers(size_of(REGIONS["mixed"]), 1), REGIONS["mixed"], device, combine=combine, eps=eps)


@given(
    shapes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(0, 5)), max_size=4),
    combine=st.sampled_from(COMBINES),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows(shapes: list[tuple[int, int, int]], combine: str, seed: int, device: torch.device) -> None:
    regions, offset = [], 0
    for rows, length, gap in shapes:
        regions += [offset, rows, length]
        offset += rows * length + gap
    assert_follows(buffers(offset + 1, seed), regions, device, combine=combine)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["first", "inside", "last single"])
def test_a_window_that_is_not_finite_changes_no_bit(value: float, where: str, device: torch.device) -> None:
    regions = REGIONS["mixed"]
    b = buffers(size_of(regions))
    b[1][{"first": 0, "inside": 1217, "last single": 1308}[where]] = value
    ours, theirs = run(b, regions, device), reference(b, regions, torch.float32)
    assert ours["finite"] is False
    assert torch.equal(ours["mean"], b[2])
    assert torch.equal(ours["deviation"], b[3])
    torch.testing.assert_close(ours["stats"], theirs["stats"], rtol=1e-5, atol=1e-6)


def test_what_lies_between_rows_does_not_count(device: torch.device) -> None:
    regions = REGIONS["mixed"]
    b = buffers(size_of(regions))
    for buffer in b[1:]:
        buffer[21:64] = float("nan")
    ours = run(b, regions, device)
    assert ours["finite"]
    assert ours["stats"].isfinite().all()
    assert ours["mean"][21:64].isnan().all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # from the interpreter's numpy
def test_products_that_overflow_count_as_zero(device: torch.device) -> None:
    regions, b = [0, 2, 8], buffers(size_of([0, 2, 8]))
    b[0][3], b[1][3] = 1e30, 1e30
    b[0][9] = float("nan")
    ours, theirs = run(b, regions, device), reference(b, regions, torch.float32)
    assert ours["finite"]
    torch.testing.assert_close(ours["stats"], theirs["stats"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["mean"], theirs["mean"], rtol=1e-6, atol=0)


def test_slots_and_tables_say_where_a_row_writes(device: torch.device) -> None:
    regions = REGIONS["mixed"]
    b = buffers(size_of(regions))
    slots = torch.randperm(sum(regions[1::3]), generator=torch.Generator().manual_seed(0))
    plain, by_slots = run(b, regions, device), run(b, regions, device, slots=slots.to(device))
    by_table = run(b, regions, device, table=row_table(regions, slots).to(device))
    assert torch.equal(by_slots["stats"][:, slots], plain["stats"])
    assert torch.equal(by_table["stats"], by_slots["stats"])


def test_views_with_gaps_are_updated_in_place(device: torch.device) -> None:
    regions, b = [0, 2, 8], buffers(16)
    w, t, m, u = (torch.stack((v, torch.full_like(v, 7.0)), 1).to(device) for v in b)
    stats, _ = importance_update(w[:, 0], t[:, 0], m[:, 0], u[:, 0], regions, **OPTIONS)
    expected = run(b, regions, device)
    assert torch.equal(stats.cpu(), expected["stats"])
    assert torch.equal(m[:, 0].cpu(), expected["mean"])
    assert m[:, 1].eq(7.0).all()


def test_same_bits(device: torch.device) -> None:
    regions = REGIONS["mixed"]
    one, two = (run(buffers(size_of(regions)), regions, device) for _ in range(2))
    assert torch.equal(one["stats"], two["stats"])
    assert torch.equal(one["deviation"], two["deviation"])


@pytest.mark.parametrize("regions", [REGIONS["mixed"], REGIONS["empty"]], ids=["mixed", "empty"])
@pytest.mark.parametrize("with_table", [False, True])
def test_opcheck(regions: list[int], with_table: bool, device: torch.device) -> None:
    b = [v.to(device) for v in buffers(size_of(regions))]
    table = row_table(regions).to(device) if with_table else None
    torch.library.opcheck(
        torch.ops.igulora.importance_update.default, (*b, regions, 0.85, 0.7, 1e-6, "snr", False, None, table)
    )


@only_interpreted
@pytest.mark.parametrize("regions", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("absolute", [False, True])
def test_traffic(regions: list[int], absolute: bool) -> None:
    with counted() as count:
        importance_update(*buffers(size_of(regions)), regions, absolute=absolute)
    assert len(count.launches) == (2 if regions else 0)
    assert count.traffic == fused.traffic_importance(regions, absolute=absolute)


def test_of_a_real_model_states_move_once() -> None:
    """All linears of SmolLM2-135M at rank 32: what is not one read of w, T and the states, one of T, one write of the states is small."""
    regions, elements = [], 0
    for length, matrices in ((192, 60), (576, 210), (1536, 150)):
        regions += [elements, 32 * matrices, length]
        elements += 32 * matrices * length
    regions += [elements, 210 * 32, 1]
    elements += 210 * 32
    assert fused.traffic_importance(regions).moved < 1.01 * (5 + 2) * 4 * elements
