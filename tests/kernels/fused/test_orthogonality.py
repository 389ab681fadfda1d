"""The orthogonality kernels against float64, and their traffic against what they load, store and multiply."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from igulora.kernels import orthogonality_grad_
from igulora.kernels.backend import use_backend
from igulora.kernels.fused import orthogonality as fused
from igulora.kernels.fused.common import family
from igulora.kernels.orthogonality import Plan, work_table

from .counted import counted, only_interpreted
from .exactness import Guarded, assert_exact, poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned")


def packed(*shapes: tuple[int, int, int], gap: int = 0) -> list[int]:
    """Groups of (matrices, rank, length), one after the other."""
    groups, offset = [], 0
    for matrices, rank, length in shapes:
        groups += [offset, matrices, rank, length]
        offset += matrices * rank * length + gap
    return groups


# Ranks below, at and above a tile's height, of every bucket; lengths of less than a step, of several steps, and of several segments;
# odd lengths and offsets beside aligned ones; rank 0 among others; matrices that are taller than long.
GROUPS = {
    "bucket 16": packed((2, 1, 5), (3, 7, 64), (1, 12, 37), (1, 16, 100), (0, 4, 4), (2, 0, 8)),
    "bucket 32": packed((1, 33 - 1, 70), (2, 17, 132), (1, 1, 3), gap=3),
    "bucket 64": packed((1, 33, 70), (1, 64, 96), (2, 5, 17)),
    "several tiles": packed((1, 65, 40), (1, 130, 69), (2, 7, 12)),
    "segments": packed((1, 3, 2100), (1, 2, 1024), (1, 4, 1025)),
    "segments of several tiles": packed((1, 65, 2052)),
    "taller than long": packed((2, 20, 3), (1, 9, 1)),
    "no ranks": packed((3, 0, 16)),
    "empty": [],
}


def size_of(groups: list[int]) -> int:
    return max(
        [o + n * r * length for o, n, r, length in zip(*(groups[k::4] for k in range(4)), strict=True)], default=0
    )


def buffers(groups: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight, whose rows have norms around 1 (at 1 the direction of a matrix of rank 1 is undefined), and a small gradient."""
    g = torch.Generator().manual_seed(seed)
    n = size_of(groups) + 3
    weight, grad = torch.randn(n, generator=g), torch.randn(n, generator=g) * 1e-3
    for o, matrices, rank, length in zip(*(groups[k::4] for k in range(4)), strict=True):
        part = weight[o : o + matrices * rank * length].view(matrices, rank, length)
        part *= (0.3 + torch.rand(matrices, rank, 1, generator=g)) / length**0.5
    return weight, grad


def run(
    weight: Tensor, grad: Tensor, groups: list[int], device: torch.device, **options: bool
) -> tuple[Tensor, Tensor]:
    held, guarded = weight.clone().to(device), Guarded(grad.to(device))
    penalty = orthogonality_grad_(held, guarded.buffer, groups, 0.1, **options)
    guarded.assert_intact()
    assert torch.equal(held.cpu(), weight)
    assert penalty.shape == ()
    return penalty.cpu(), guarded.buffer.cpu()


def reference(
    weight: Tensor, grad: Tensor, groups: list[int], dtype: torch.dtype, **options: bool
) -> tuple[Tensor, Tensor]:
    grad = grad.to(dtype, copy=True)
    with use_backend("reference"):
        return orthogonality_grad_(weight.to(dtype), grad, groups, 0.1, **options), grad


def assert_follows(groups: list[int], device: torch.device, seed: int = 0, **options: bool) -> None:
    weight, grad = buffers(groups, seed)
    ours = run(weight, grad, groups, device, **options)
    single, exact = (reference(weight, grad, groups, dtype, **options) for dtype in (torch.float32, torch.float64))
    for mine, same_dtype, truth in zip(ours, single, exact, strict=True):
        assert_exact(mine, same_dtype, truth)
    inside = torch.zeros(grad.numel(), dtype=torch.bool)
    for o, matrices, rank, length in zip(*(groups[k::4] for k in range(4)), strict=True):
        inside[o : o + matrices * rank * length] = True
    assert torch.equal(ours[1][~inside], grad[~inside])


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_penalty_and_gradient(groups: list[int], device: torch.device) -> None:
    assert_follows(groups, device)


@pytest.mark.parametrize("name", ["bucket 16", "several tiles"])
def test_off_the_diagonal_only(name: str, device: torch.device) -> None:
    assert_follows(GROUPS[name], device, offdiagonal=True)


@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 7, 12, 16, 33]), st.integers(1, 90)), max_size=4
    ),
    gap=st.integers(0, 5),
    offdiagonal=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_matrices(
    shapes: list[tuple[int, int, int]], gap: int, offdiagonal: bool, seed: int, device: torch.device
) -> None:
    assert_follows(packed(*shapes, gap=gap), device, seed, offdiagonal=offdiagonal)


def test_an_orthonormal_matrix_has_no_gradient(device: torch.device) -> None:
    groups = packed((1, 4, 8), (1, 4, 8))
    weight, grad = buffers(groups)
    weight[:32] = torch.eye(4, 8).flatten()
    penalty, got = run(weight, grad, groups, device)
    assert torch.equal(got[:32], grad[:32])
    assert not torch.equal(got[32:64], grad[32:64])
    torch.testing.assert_close(penalty, reference(weight, grad, groups, torch.float64)[0].float())


def test_the_table_is_what_a_caller_keeps(device: torch.device) -> None:
    groups = GROUPS["several tiles"]
    weight, grad = (v.to(device) for v in buffers(groups))
    results = []
    for table in (None, work_table(groups).to(device)):
        held = grad.clone()
        results.append((orthogonality_grad_(weight, held, groups, 0.1, table=table), held))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match=r"expected a table of shape \(.*, 7\), int64"):
        orthogonality_grad_(weight, grad, groups, 0.1, table=torch.zeros(3, 7, dtype=torch.int64))


def test_every_part_of_every_matrix_has_one_row() -> None:
    for groups in GROUPS.values():
        plan = Plan.of(groups)
        seen = torch.zeros(size_of(groups), dtype=torch.int64)
        places = set()
        for offset, rank, length, first_row, first_col, place, _ in plan.rows:
            view = seen[offset : offset + rank * length].view(rank, length)
            columns = 1024 * -(-rank // plan.tile)
            view[first_row : first_row + plan.tile, first_col : first_col + columns] += 1
            places.add((place, rank))
        assert not plan.rows or seen.max() == 1
        assert seen.sum() == sum(
            n * r * length for n, r, length in zip(*(groups[k::4] for k in (1, 2, 3)), strict=True)
        )
        assert all(row[4] == 0 for row in plan.rows[: plan.heads])
        assert all(row[4] > 0 for row in plan.rows[plan.heads :])
        assert len(places) == plan.matrices


def test_views_with_gaps_are_updated_in_place(device: torch.device) -> None:
    groups = packed((2, 3, 8))
    weight, grad = buffers(groups)
    expected, got = run(weight, grad, groups, device)
    w, g = (torch.stack((v, torch.full_like(v, 7.0)), 1).to(device) for v in (weight, grad))
    assert torch.equal(orthogonality_grad_(w[:, 0], g[:, 0], groups, 0.1).cpu(), expected)
    assert torch.equal(g[:, 0].cpu(), got)
    assert g[:, 1].eq(7.0).all()


def test_same_bits(device: torch.device) -> None:
    groups = GROUPS["several tiles"]
    one, two = (run(*buffers(groups), groups, device) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("groups", [packed((2, 3, 8)), []], ids=["two", "empty"])
@pytest.mark.parametrize("with_table", [False, True])
def test_opcheck(groups: list[int], with_table: bool, device: torch.device) -> None:
    weight, grad = (v.to(device) for v in buffers(groups))
    table = work_table(groups).to(device) if with_table else None
    torch.library.opcheck(torch.ops.igulora.orthogonality_grad_.default, (weight, grad, groups, 0.1, False, table))


@only_interpreted
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_traffic(groups: list[int]) -> None:
    weight, grad = buffers(groups)
    with counted() as count:
        orthogonality_grad_(weight, grad, groups, 0.1)
    assert len(count.launches) == (3 if Plan.of(groups).rows else 0)
    expected = fused.traffic_orthogonality(groups, family(torch.device("cpu")))
    for name in ("read", "written", "loaded", "stored"):
        assert getattr(count.traffic, name) == getattr(expected, name), name


@only_interpreted
@pytest.mark.parametrize(
    "groups", [packed((2, 16, 128)), packed((1, 32, 64)), packed((1, 64, 64)), packed((1, 128, 64))]
)
def test_products_of_whole_tiles(groups: list[int]) -> None:
    with counted() as count:
        orthogonality_grad_(*buffers(groups), groups, 0.1)
    assert count.traffic.flops == fused.traffic_orthogonality(groups, family(torch.device("cpu"))).flops
