"""What the launchers of the svd_linear kernels say they move, against what Triton's interpreter loads and stores: equal to the byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from igulora.kernels.fused import dq_pass, dy_pass, gemm, layer_traffic, project, rank_term, sums
from igulora.kernels.fused.choice import Product, use_product
from igulora.kernels.fused.common import block_rank, cdiv, family, padded_rank
from igulora.kernels.fused.dq_pass import dq_segments
from igulora.kernels.fused.dy_pass import ds_tile, dy_segments
from igulora.kernels.fused.sums import Job
from igulora.kernels.traffic import Traffic

from .calls import CPU, SMALL
from .counted import Counted, counted, only_interpreted

pytestmark = only_interpreted
SCALE = 1.25
# Odd sizes of several cut blocks, and whole tiles: only there does the interpreter, which multiplies whole tiles, count the model's FLOPs.
ODD, WHOLE = (41, 35, 19, 7), (48, 32, 32, 16)
SIZES = [
    (*ODD, torch.float32),
    (*ODD, torch.float16),
    (*WHOLE, torch.float16),
    (17, 150, 50, 33, torch.float32),
    (5, 16, 70, 70, torch.float16),
]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def coefficients(R: int) -> tuple[Tensor, Tensor, float]:
    return draw(R), torch.ones(R), SCALE


def assert_counted(count: Counted, expected: Traffic, *, flops: bool = False) -> None:
    """All bytes are the model's; the FLOPs too, where shapes are whole tiles."""
    got = count.traffic
    assert replace(got, flops=0) == replace(expected, flops=0)
    assert got.flops >= expected.flops
    if flops:
        assert got.flops == expected.flops


@pytest.mark.parametrize(("M", "K", "N", "R", "dtype"), SIZES, ids=str)
@pytest.mark.parametrize("others", [[], [12], [16, 1]], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_project(M: int, K: int, N: int, R: int, dtype: torch.dtype, others: list[int], p: float) -> None:
    ranks = [R, *others]
    x, Qs = draw(M, K, dtype=dtype), [draw(r, K) for r in ranks]
    out = [torch.empty((M, padded_rank(r)), dtype=dtype) for r in ranks]
    with counted() as count:
        project.launch_project(x, Qs, out, torch.tensor(5), p, SMALL)
    expected = project.traffic_project(M, K, ranks, dtype.itemsize, SMALL, CPU, seeded=p > 0)
    assert len(count.launches) == (2 if K == 150 else 1)  # few rows of many columns are split
    assert_counted(count, expected, flops=(M, K, N, R) == WHOLE and not others)


@pytest.mark.parametrize(("M", "K", "N", "R", "dtype"), SIZES, ids=str)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("groups", "coef", "bias", "p"), [(0, False, False, 0.0), (1, True, True, 0.0), (2, False, False, 0.3)]
)
def test_gemm_rank(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, transposed: bool, groups: int, coef: bool, bias: bool, p: float
) -> None:
    M += M % 2  # whole groups
    weight = draw(*((N, K) if transposed else (K, N)), dtype=dtype)
    with counted() as count:
        gemm.launch_gemm_rank(
            draw(M, K, dtype=dtype),
            weight,
            draw(M, padded_rank(R), dtype=dtype),
            draw(R, N),
            coefficients(R) if coef else None,
            draw(groups) if groups else None,
            draw(N, dtype=dtype) if bias else None,
            torch.tensor(5),
            p,
            SMALL,
            transposed=transposed,
            descriptors=False,
        )
    options: dict[str, Any] = {"groups": groups, "coef": coef, "bias": bias, "seeded": p > 0}
    expected = gemm.traffic_gemm_rank(M, N, K, R, dtype.itemsize, SMALL, **options)
    assert_counted(count, expected, flops=(M, K, N, R) == WHOLE)


@pytest.mark.parametrize("transposed", [True, False])
def test_gemm_rank_through_descriptors(transposed: bool) -> None:
    """Descriptors load the same tiles of the same matrices."""
    M, K, N, R = 41, 40, 24, 7
    weight, dtype = draw(*((N, K) if transposed else (K, N)), dtype=torch.float16), torch.float16
    operands = (draw(M, K, dtype=dtype), weight, draw(M, 16, dtype=dtype), draw(R, N), coefficients(R), draw(1))
    with counted() as count:
        gemm.launch_gemm_rank(*operands, None, None, 0.0, SMALL, transposed=transposed, descriptors=True)
    assert_counted(count, gemm.traffic_gemm_rank(M, N, K, R, 2, SMALL, groups=1, coef=True))


@pytest.mark.parametrize(("M", "K", "N", "R", "dtype"), SIZES, ids=str)
@pytest.mark.parametrize(
    ("groups", "base", "coef", "bias", "p"),
    [
        (0, False, False, False, 0.0),
        (1, True, True, False, 0.0),
        (2, False, True, True, 0.0),
        (0, False, False, False, 0.3),
    ],
)
def test_rank_term(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, groups: int, base: bool, coef: bool, bias: bool, p: float
) -> None:
    M += M % 2
    out = draw(M, N, dtype=dtype)
    with counted() as count:
        rank_term.launch_rank_term(
            out,
            out if base else None,
            draw(M, padded_rank(R), dtype=dtype),
            draw(R, N),
            coefficients(R) if coef else None,
            draw(groups) if groups else None,
            draw(N, dtype=dtype) if bias else None,
            torch.tensor(5),
            p,
            SMALL,
        )
    options: dict[str, Any] = {"groups": groups, "base": base, "coef": coef, "bias": bias, "seeded": p > 0}
    expected = rank_term.traffic_rank_term(M, N, R, dtype.itemsize, SMALL, **options)
    assert_counted(count, expected, flops=(M, K, N, R) == WHOLE)


def ends(kind: str, M: int) -> tuple[int, int, int]:
    """end0, start1, end1 of M rows in four groups: all train; the first group trains, the others are path rows; path rows only."""
    return {"all": (M, M, M), "apart": (M // 4, M // 4, M), "path": (0, M // 4, M)}[kind]


@pytest.mark.parametrize(
    ("M", "K", "N", "R", "dtype"),
    [(44, 0, 19, 7, torch.float32), (*WHOLE, torch.float16), (32, 0, 50, 70, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["all", "apart", "path"])
@pytest.mark.parametrize(("want_ds", "want_dp"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("factors", [False, True])
def test_dy_pass(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, kind: str, want_ds: bool, want_dp: bool, factors: bool
) -> None:
    segments = dy_segments(*ends(kind, M), N, SMALL, CPU)
    columns = padded_rank(R)
    with counted() as count:
        dy_pass.launch_dy_pass(
            draw(M, N, dtype=dtype),
            draw(M, columns, dtype=dtype),
            draw(R, N),
            coefficients(R),
            draw(4) if factors else None,
            draw(4) if factors else None,
            M // 4,
            segments,
            torch.empty((cdiv(N, 16), M, columns)) if want_ds else None,
            torch.empty((segments.splits, R, N)) if want_dp else None,
            SMALL,
        )
    wanted: dict[str, Any] = {"want_ds": want_ds, "want_dp": want_dp, "alpha": factors, "weight": factors, "groups": 4}
    expected = dy_pass.traffic_dy_pass(M, N, R, dtype.itemsize, segments, SMALL, **wanted)
    assert_counted(count, expected, flops=(M, K, N, R) == WHOLE and kind == "all")


@pytest.mark.parametrize(
    ("M", "R", "dtype"),
    [(44, 7, torch.float16), (200, 16, torch.float32), (100, 33, torch.float16), (8, 70, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("want_de", [True, False])
@pytest.mark.parametrize(("alpha", "weight"), [(False, False), (True, False), (True, True)])
def test_ds_sum(M: int, R: int, dtype: torch.dtype, want_de: bool, alpha: bool, weight: bool) -> None:
    columns, blocks = padded_rank(R), 3
    programs = cdiv(M, ds_tile(block_rank(R), dtype.itemsize).BLOCK_M)
    with counted() as count:
        dy_pass.launch_ds_sum(
            draw(blocks, M, columns),
            draw(M, columns, dtype=dtype),
            R,
            coefficients(R),
            draw(4) if alpha else None,
            draw(4) if weight else None,
            M // 4,
            M // 2,
            M // 4,
            torch.empty((M, columns), dtype=dtype),
            torch.empty((1 + weight, programs, columns)) if want_de else None,
        )
    options: dict[str, Any] = {"want_de": want_de, "alpha": alpha, "weight": weight, "groups": 4}
    assert_counted(count, dy_pass.traffic_ds_sum(M, R, dtype.itemsize, blocks, **options))


@pytest.mark.parametrize(
    ("M", "K", "N", "R", "dtype"),
    [(44, 35, 0, 7, torch.float32), (*WHOLE, torch.float16), (32, 50, 0, 70, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("others", [[], [12], [16, 1]], ids=str)
@pytest.mark.parametrize("kind", ["all", "apart", "path"])
@pytest.mark.parametrize(("factors", "p"), [(False, 0.0), (True, 0.3)])
def test_dq_pass(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, others: list[int], kind: str, factors: bool, p: float
) -> None:
    ranks = [R, *others]
    segments = dq_segments(*ends(kind, M), K, SMALL, CPU)
    with counted() as count:
        dq_pass.launch_dq_pass(
            draw(M, K, dtype=dtype),
            [draw(M, padded_rank(r), dtype=dtype) for r in ranks],
            ranks,
            [torch.empty((segments.splits, r, K)) for r in ranks],
            draw(4) if factors else None,
            draw(4) if factors else None,
            torch.tensor(5),
            p,
            M // 4,
            segments,
            SMALL,
        )
    options: dict[str, Any] = {"alpha": factors, "weight": factors, "groups": 4, "seeded": p > 0}
    expected = dq_pass.traffic_dq_pass(K, ranks, dtype.itemsize, segments, SMALL, **options)
    assert_counted(count, expected, flops=(M, K, N, R) == WHOLE and not others and kind == "all")


@pytest.mark.parametrize(
    "jobs",
    [
        [(35, 3, 0, True, False)],
        [(1500, 2, 3, True, True), (7, 1, 1, True, True), (40, 0, 2, False, True), (33, 2, 1, True, True)],
        [(16, 4, 2, False, True), (1024, 2, 0, True, False)],
    ],
    ids=str,
)
def test_sum_partials(jobs: list[tuple[int, int, int, bool, bool]]) -> None:
    """A vector first, then matrices."""
    with counted() as count:
        sums.launch_sum_partials(
            [
                Job(
                    draw(first + second, numel if i else padded_rank(numel)),
                    numel if i else padded_rank(numel),  # what lies between the parts of the vector is not read
                    numel,
                    first,
                    second,
                    torch.empty(numel) if out else None,
                    draw(numel) if acc else None,
                    numel if i else 0,
                )
                for i, (numel, first, second, out, acc) in enumerate(jobs)
            ]
        )
    strides = [numel if i else padded_rank(numel) for i, (numel, *_) in enumerate(jobs)]
    expected = [(job[0], stride, *job[1:]) for job, stride in zip(jobs, strides, strict=True)]
    assert_counted(count, sums.traffic_sum_partials(expected))


@pytest.mark.parametrize(("form", "dtype"), [("pointers", torch.float16), ("library", torch.float32)])
@pytest.mark.parametrize(("M", "K", "N", "R"), [(150, 140, 130, 16), (70, 70, 140, 96)])
def test_a_layer_moves_the_sum_of_its_launches(form: str, dtype: torch.dtype, M: int, K: int, N: int, R: int) -> None:
    """What projections add up for a layer, beyond its base products; tiles as shipped."""
    x, weight, dy = draw(M, K, dtype=dtype), draw(N, K, dtype=dtype), draw(M, N, dtype=dtype)
    rest = (draw(R, N), draw(R), draw(R, K), torch.ones(R), *[None] * 6, SCALE, 0.0, 1, 1)
    size, family_ = dtype.itemsize, family(CPU)
    tile = gemm.config(family_, size, descriptors=False)
    needs = [True, False, False, True, True, True, False]
    with use_product(Product(form, tile)), counted() as count:
        S = torch.ops.igulora.svd_linear_fwd(x, weight, None, *rest[:5], None, *rest[5:])[1]
        forward = count.traffic.moved
        torch.ops.igulora.svd_linear_bwd(dy, S, x, weight, *rest, needs)
        backward = count.traffic.moved - forward
    for moved, model, (rows, out, inner) in (
        (forward, layer_traffic.forward_traffic, (M, N, K)),
        (backward, layer_traffic.backward_traffic, (M, K, N)),
    ):
        added = sum(traffic.moved for traffic in model(M, N, K, R, size, family_, CPU, form=form).values())
        if form == "library":
            assert moved + rows * out * size == added  # the library reads back what it starts from
        else:
            assert moved == added + gemm.traffic_gemm_rank(rows, out, inner, 0, size, tile).moved
