"""Block-diagonal adapters in the kernels, against float64: blocks, ranks of a block, path rows, dropout, layouts; and their traffic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from igulora.kernels import backend, svd_linear, svd_update
from igulora.kernels.backend import ReferenceWarning, use_backend
from igulora.kernels.fused import dq_pass, dy_pass, project, rank_term
from igulora.kernels.fused.common import block_rank, cdiv, padded_rank
from igulora.kernels.fused.dq_pass import dq_segments
from igulora.kernels.fused.dy_pass import ds_tile, dy_segments

from .calls import (  # noqa: F401
    CPU,
    DTYPES,
    MASTERS,
    SMALL,
    Call,
    assert_close,
    assert_follows,
    every_other,
    misaligned,
    placed,
    run,
    small_tiles,
    swapped,
    terms_of,
    wide_rows,
)
from .counted import counted
from .exactness import poisoned  # noqa: F401
from .test_svd_update import updated
from .test_traffic import assert_counted, coefficients, draw, ends

pytestmark = pytest.mark.usefixtures("poisoned", "small_tiles")
OPS = torch.ops.igulora
# k and n are divided by every number of blocks tried; windows of 40 and 20 columns of x (24 and 12 of y) are cut by tiles of 16.
SIZES: dict[str, Any] = {"k": 80, "n": 48}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("blocks", "r"), [(2, 0), (2, 2), (4, 28), (2, 32), (2, 70)])
@pytest.mark.parametrize(("path", "dropout"), [(None, 0.0), (1, 0.3)])
def test_a_layer_follows_the_reference(
    blocks: int, r: int, path: int | None, dropout: float, dtype: torch.dtype, device: torch.device
) -> None:
    train = None if path is None else 2
    call = Call(r, **SIZES, blocks=blocks, alpha="groups", train=train, path=path, dropout=dropout)
    assert_follows(call, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("blocks", "r"), [(2, 0), (4, 4), (4, 28), (2, 66)])
@pytest.mark.parametrize(("path", "dropout"), [(None, 0.3), (1, 0.0), (2, 0.3)])
def test_an_update_follows_the_reference(
    blocks: int, r: int, path: int | None, dropout: float, dtype: torch.dtype, device: torch.device
) -> None:
    train = None if path is None else 2
    call = Call(r, **SIZES, blocks=blocks, alpha="groups", train=train, path=path, dropout=dropout)
    ours = updated(call, dtype, device)
    with use_backend("reference"):
        same_dtype, exact = updated(call, dtype, CPU), updated(call, dtype, CPU, exact=True)
    assert_close(ours, same_dtype, exact, torch.finfo(dtype).eps, terms_of(call, updated))


@pytest.mark.parametrize("layout", [swapped, every_other, wide_rows, misaligned], ids=lambda f: f.__name__)
@pytest.mark.parametrize("names", [("x", "dy"), ("P", "Q")], ids="-".join)
def test_layouts(layout: Callable[[Tensor], Tensor], names: tuple[str, ...], device: torch.device) -> None:
    layouts = tuple((name, layout) for name in names)
    assert_follows(Call(12, **SIZES, blocks=4, alpha="groups", layouts=layouts, dropout=0.3), torch.float32, device)


@pytest.mark.parametrize("lead", [(0,), (1,), (40, 1), (2, 3, 2)], ids=str)
def test_leading_shapes(lead: tuple[int, ...], device: torch.device) -> None:
    assert_follows(Call(6, lead, **SIZES, blocks=2, alpha=0.5, mask="on"), torch.float32, device)


def test_a_product_of_its_own_for_the_gradient_of_s(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(dy_pass, "PARTS_LIMIT", 0)
    assert_follows(Call(28, **SIZES, blocks=4, alpha="groups", train=2, path=1), torch.float32, device)


@pytest.mark.parametrize(("blocks", "r"), [(1, 7), (4, 28)])
def test_infinities_in_memory_that_nothing_was_written_to(
    blocks: int, r: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Padding may be summed and dropped, where inf - inf is no number, of which the interpreter's NumPy warns."""
    real = Tensor.new_empty

    def infinite(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        if out.is_floating_point() and out.numel():
            signs = 1 - 2 * (torch.arange(out.numel(), device=out.device) // 16 % 2)
            out.view(-1).copy_(signs * torch.inf)
        return out

    monkeypatch.setattr(Tensor, "new_empty", infinite)
    assert_follows(Call(r, (6, 40), **SIZES, blocks=blocks, alpha="groups", train=4, path=2), torch.float32, device)


def test_same_bits_every_time(device: torch.device) -> None:
    call = Call(28, **SIZES, blocks=4, alpha="groups", train=2, path=1, dropout=0.3)
    once, again = run(call, torch.float16, device), run(call, torch.float16, device)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_dropout_in_windows_that_cut_its_words(device: torch.device) -> None:
    """Words come for four columns: with windows of 6 the reference runs, and says so; kernels that were asked for refuse."""
    call = Call(4, k=12, n=8, blocks=2, dropout=0.3, alpha=0.5)
    with pytest.raises(ValueError, match="words come for 4 columns each, and blocks have windows of 6"):
        run(call, torch.float32, device)
    with use_backend("reference"):
        expected = run(call, torch.float32, device)
    backend._warn_once.cache_clear()
    with use_backend(None), pytest.warns(ReferenceWarning, match="windows of 6"):
        found = run(call, torch.float32, device)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert_follows(Call(4, k=12, n=8, blocks=2, alpha=0.5), torch.float32, device)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_opcheck(dropout: float, device: torch.device) -> None:
    call = Call(12, (4, 3), 16, 8, alpha="groups", blocks=4)
    t = {k: None if v is None else placed(v, device) for k, v in call.operands(torch.float16).items()}
    masters = tuple(t[k] for k in (*MASTERS, "mask", "alpha"))
    seed = torch.tensor(5, device=device)
    rest = (None, *[None] * 4, seed, 1.5, dropout, 4, 4)
    for name in ("x", "weight", "bias", *MASTERS):
        t[name].requires_grad_()
    torch.library.opcheck(OPS.svd_linear_fwd.default, (t["x"], t["weight"], t["bias"], *masters, *rest))
    torch.library.opcheck(OPS.svd_update.default, (t["dy"], t["x"], *masters, *rest))
    t = {k: None if v is None else v.detach() for k, v in t.items()}
    masters = tuple(t[k] for k in (*MASTERS, "mask", "alpha"))
    torch.library.opcheck(OPS.svd_update_.default, (t["dy"], t["x"], *masters, None, seed, 1.5, dropout))


def test_one_block_is_the_ordinary_layer(device: torch.device) -> None:
    """Its last grid axis is 1: a launch of both has the same kernel, and one block side by side with others the bits it has alone."""
    call = Call(8, **SIZES, blocks=2, mask="on")
    t = {k: None if v is None else placed(v, device) for k, v in call.operands(torch.float32).items()}
    x, (P, E, Q), y = t["x"], (t[k] for k in MASTERS), t["dy"]
    both = svd_update(y.clone(), x, P, E, Q, t["mask"])
    for b in range(2):
        rows, of_y, of_x = slice(4 * b, 4 * b + 4), slice(24 * b, 24 * b + 24), slice(40 * b, 40 * b + 40)
        alone = svd_update(y[..., of_y].clone(), x[..., of_x], P[rows], E[rows], Q[rows], t["mask"][rows])
        assert torch.equal(both[..., of_y], alone)


def test_needs_no_gradient(device: torch.device) -> None:
    call = Call(8, **SIZES, blocks=2, alpha="groups")
    t = {k: None if v is None else placed(v, device) for k, v in call.operands(torch.float32).items()}
    operands = [t[k] for k in ("x", "weight", "bias", *MASTERS, "mask", "alpha")]
    with torch.no_grad():
        y = svd_linear(*operands)
    with use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(y, svd_linear(*operands))


# -- traffic ----------------------------------------------------------------------------------------------------------

B = 3  # blocks
TRAFFIC = [(44, 36, 20, 7, torch.float32), (64, 64, 64, 16, torch.float16)]  # M rows; K, N, R of a block


def rank_rows(M: int, R: int, dtype: torch.dtype) -> Tensor:
    return draw(B, M, padded_rank(R), dtype=dtype)


@pytest.mark.parametrize(("M", "K", "N", "R", "dtype"), TRAFFIC, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_traffic_of_x(M: int, K: int, N: int, R: int, dtype: torch.dtype, p: float) -> None:
    x, Q, out = draw(M, B * K, dtype=dtype), draw(B * R, K), rank_rows(M, R, dtype)
    with counted() as count:
        project.launch_project(x, [Q], [out], torch.tensor(5), p, SMALL)
    expected = project.traffic_project(M, K, [R], dtype.itemsize, SMALL, CPU, seeded=p > 0, windows=B)
    assert_counted(count, expected, flops=M == 64)
    segments = dq_segments(*ends("apart", M), K, SMALL, CPU, B)
    part = torch.empty((segments.splits, B * R, K))
    factors = (draw(4), draw(4))
    with counted() as count:
        dq_pass.launch_dq_pass(x, [out], [B * R], [part], *factors, torch.tensor(5), p, M // 4, segments, SMALL)
    options: dict[str, Any] = {"alpha": True, "weight": True, "groups": 4, "seeded": p > 0, "windows": B}
    assert_counted(count, dq_pass.traffic_dq_pass(K, [R], dtype.itemsize, segments, SMALL, **options))


@pytest.mark.parametrize(("M", "K", "N", "R", "dtype"), TRAFFIC, ids=str)
@pytest.mark.parametrize(("groups", "base", "coef", "p"), [(2, True, True, 0.0), (0, False, False, 0.3)])
def test_traffic_of_the_rank_term(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, groups: int, base: bool, coef: bool, p: float
) -> None:
    out, S, F = draw(M, B * N, dtype=dtype), rank_rows(M, R, dtype), draw(B * R, N)
    given = (coefficients(B * R) if coef else None, draw(groups) if groups else None)
    with counted() as count:
        rank_term.launch_rank_term(out, out if base else None, S, F, *given, None, torch.tensor(5), p, SMALL)
    options: dict[str, Any] = {"groups": groups, "base": base, "coef": coef, "seeded": p > 0, "windows": B}
    expected = rank_term.traffic_rank_term(M, N, R, dtype.itemsize, SMALL, **options)
    assert_counted(count, expected, flops=M == 64)


@pytest.mark.parametrize(("M", "K", "N", "R", "dtype"), TRAFFIC, ids=str)
def test_traffic_of_dy(M: int, K: int, N: int, R: int, dtype: torch.dtype) -> None:
    columns, factors, coef = padded_rank(R), (draw(4), draw(4)), coefficients(B * R)
    dy, S, P = draw(M, B * N, dtype=dtype), rank_rows(M, R, dtype), draw(B * R, N)
    segments = dy_segments(*ends("apart", M), N, SMALL, CPU, B)
    part_ds = torch.zeros((cdiv(N, 16), B, M, columns))
    part_dp = torch.empty((segments.splits, B * R, N))
    with counted() as count:
        dy_pass.launch_dy_pass(dy, S, P, coef, *factors, M // 4, segments, part_ds, part_dp, SMALL)
    options: dict[str, Any] = {"alpha": True, "weight": True, "groups": 4, "windows": B}
    assert_counted(count, dy_pass.traffic_dy_pass(M, N, R, dtype.itemsize, segments, SMALL, **options))
    programs = cdiv(M, ds_tile(block_rank(R), dtype.itemsize).BLOCK_M)
    part_de = torch.empty((2, programs, padded_rank(B * R)))
    with counted() as count:
        dy_pass.launch_ds_sum(part_ds, S, B * R, coef, *factors, M // 4, M // 2, M // 4, torch.empty_like(S), part_de)
    assert_counted(count, dy_pass.traffic_ds_sum(M, R, dtype.itemsize, part_ds.shape[0], **options))
