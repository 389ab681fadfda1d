"""Which rows of a batch end where, in the kernels; and that every kernel drops the entries that ``dropout_keep_mask`` names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from igulora.kernels import dropout_keep_mask, svd_linear
from igulora.kernels.backend import use_backend
from igulora.kernels.fused import dy_pass
from igulora.kernels.fused.choice import use_product
from igulora.kernels.svd_project import svd_project

from .calls import (
    CPU,
    DTYPES,
    FORMS,
    MASTERS,
    Call,
    assert_close,
    assert_follows,
    placed,
    run,
    small_tiles,  # noqa: F401
    terms_of,
)
from .exactness import poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned", "small_tiles")


# Training and path rows of five sequences: apart, with nothing between them; one of them empty; overlapping in part and in whole; apart,
# with sequences between that are neither. 35 rows in blocks of 16: a range begins and ends inside a block.
@pytest.mark.parametrize(("train", "path"), [(3, 3), (0, 0), (5, 5), (5, 0), (4, 2), (2, 4), (0, 3)])
@pytest.mark.parametrize(("dropout", "form"), [(0.0, "pointers"), (0.3, "library")])
@pytest.mark.parametrize("shared", [False, True])
def test_rows_go_where_they_belong(
    train: int, path: int, dropout: float, form: str, shared: bool, device: torch.device
) -> None:
    call = Call(lead=(5, 7), alpha="groups", train=train, path=path, dropout=dropout, shared=shared)
    with use_product(FORMS[form]):
        assert_follows(call, torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("train", "path"), [(5, 5), (3, 3), (0, 0), (4, 2), (2, 4)])
def test_rows_of_two_passes_over_dy(
    train: int, path: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the parts of dy P^T would not stay in the cache."""
    monkeypatch.setattr(dy_pass, "PARTS_LIMIT", 0)
    assert_follows(Call(33, (5, 7), alpha="groups", train=train, path=path), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("r", "alpha"), [(1, "groups"), (33, None), (70, "groups")])
def test_path_rows_at_any_rank(r: int, alpha: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Without alpha the path weights alone say how many sequences there are."""
    assert_follows(Call(r, (4, 9), alpha=alpha, train=4, path=1, dropout=0.3), dtype, device)


def test_the_bound_of_a_single_number() -> None:
    """It takes roundings where PyTorch happened to make none, also where the terms cancel; a row that is missing it does not take."""
    call, dtype = Call(1, (4, 9), alpha="groups", train=4, path=1, dropout=0.3), torch.float16
    with use_backend("reference"):
        exact, rounded = run(call, dtype, CPU, exact=True), run(call, dtype, CPU)
        short = run(replace(call, layouts=(("dy", without_last_row),)), dtype, CPU, exact=True)
    terms = terms_of(call, run)
    assert exact["path_E"].abs() < 0.1 * terms["path_E"]
    for name in ("E", "path_E"):

        def holds(ours: Tensor, name: str = name) -> None:
            wanted = {name: exact[name]}
            assert_close({name: ours.double()}, wanted, wanted, torch.finfo(dtype).eps, terms)

        holds(rounded[name])
        with pytest.raises(AssertionError, match="expected an error"):
            holds(short[name])


def without_last_row(t: Tensor) -> Tensor:
    """Zeros in place of the last row."""
    t[-1, -1] = 0.0
    return t


def test_one_alpha_for_all_rows(device: torch.device) -> None:
    """A separate path pass at one node: one group, all rows path rows."""
    assert_follows(Call(lead=(1, 21), alpha=0.4, train=0, path=0), torch.float32, device)


def test_a_pure_path_pass_returns_no_gradient(device: torch.device) -> None:
    results = run(Call(alpha="groups", train=0, path=0), torch.float32, device)
    assert results.keys() == {"y", "x", "weight", "bias", "path_P", "path_E", "path_Q"}


@pytest.mark.parametrize("shared", [False, True])
def test_every_pass_adds_to_the_accumulators(shared: bool, device: torch.device) -> None:
    call = Call(alpha="groups", train=1, path=1)
    t = {k: placed(v, device) for k, v in call.operands(torch.float32).items()}
    sums = {}
    for passes in (1, 2):
        path = tuple(torch.zeros_like(t[name]) for name in MASTERS)
        x = t["x"].clone().requires_grad_()
        for _ in range(passes):
            rows = {"train_groups": 1, "path_start": 1, "path_weight": t["path_weight"]}
            S = svd_project(x, [t["Q"]], t["alpha"], **rows, path_Qs=[path[2]])[0] if shared else None
            operands = [t[k] for k in ("weight", "bias", *MASTERS, "mask", "alpha")]
            svd_linear(x, *operands, S=S, **rows, path=path).backward(t["dy"])
        sums[passes] = path
    for one, two in zip(sums[1], sums[2], strict=True):
        assert torch.count_nonzero(one) > 0
        assert torch.equal(two, 2 * one)  # twice the same sum, added in the same order: doubling is exact


def test_masked_triplets_receive_nothing(device: torch.device) -> None:
    results = run(Call(lead=(3, 6), alpha="groups", train=3, path=0), torch.float32, device)
    before = Call(lead=(3, 6), alpha="groups", train=3, path=0).operands(torch.float32)
    for name in MASTERS:
        assert torch.count_nonzero(results[name][1]) == 0
        assert torch.count_nonzero(results[name][0]) > 0
        assert torch.equal(results[f"path_{name}"][1], before[f"path_{name}"][1])
        assert not torch.equal(results[f"path_{name}"][0], before[f"path_{name}"][0])


# -- dropout ----------------------------------------------------------------------------------------------------------

# Seeds of one and of two words, and the largest that layers draw.
SEEDS = [5, 2**40 + 123, 2**62 - 1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rows", "columns", "p"), [(21, 35, 0.3), (33, 16, 0.75), (5, 150, 0.5), (1, 3, 0.3)])
def test_the_projection_and_its_backward_drop_what_the_mask_names(
    seed: int, rows: int, columns: int, p: float, device: torch.device
) -> None:
    """x of ones times the identity: S is the mask itself; its gradient the identity times the mask: so is dQ."""
    seed = torch.tensor(seed, device=device)
    keep = dropout_keep_mask(seed, rows, columns, p)
    x, Q = torch.ones((rows, columns), device=device), torch.eye(columns, device=device, requires_grad=True)
    (S,) = svd_project(x, [Q], dropout_p=p, seed=seed)
    assert torch.equal(S != 0, keep)
    torch.testing.assert_close(S[keep], torch.full_like(S[keep], 1 / (1 - p)), rtol=1e-6, atol=0)
    Q = torch.zeros((rows, columns), device=device, requires_grad=True)
    (S,) = svd_project(x, [Q], dropout_p=p, seed=seed)
    S.backward(torch.eye(rows, device=device))
    assert torch.equal(Q.grad != 0, keep)
    torch.testing.assert_close(Q.grad[keep], torch.full_like(Q.grad[keep], 1 / (1 - p)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("form", ["library", "pointers", "descriptors", "no weight"])
def test_the_input_gradient_drops_what_the_mask_names(seed: int, form: str, device: torch.device) -> None:
    """Where the base gives nothing, dx is the mask times the share that went through Q."""
    rows, columns, p = 21, 36, 0.3
    seed = torch.tensor(seed, device=device)
    keep = dropout_keep_mask(seed, rows, columns, p)
    ones = [torch.ones(shape, device=device) for shape in ((1, 8), (1,), (1, columns), (1,), (1,))]
    x, dy = torch.ones((rows, columns), device=device), torch.ones((rows, 8), device=device)
    weight = None if form == "no weight" else torch.zeros((8, columns), device=device)
    S = torch.ones((rows, 1), device=device)
    needs = [True] + [False] * 6
    with use_product(FORMS[form if weight is not None else "library"]):
        dx = torch.ops.igulora.svd_linear_bwd(dy, S, x, weight, *ones, *[None] * 4, seed, 0.5, p, 1, 1, needs)[0]
    assert torch.equal(dx != 0, keep)
    torch.testing.assert_close(dx[keep], torch.full_like(dx[keep], 4 / (1 - p)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["library", "pointers"])
@pytest.mark.parametrize(("r", "p"), [(7, 0.3), (70, 0.75)])
def test_dropped_entries_reach_no_result(r: int, p: float, form: str, dtype: torch.dtype, device: torch.device) -> None:
    with use_product(FORMS[form]):
        assert_follows(Call(r, alpha="groups", dropout=p), dtype, device)


def test_no_seed_no_dropout(device: torch.device) -> None:
    t = {k: placed(v, device) for k, v in Call(alpha="groups").operands(torch.float32).items()}
    operands = [t[k] for k in ("x", "weight", "bias", *MASTERS, "mask", "alpha")]
    one, two = (torch.tensor(s, device=device) for s in (1, 2))
    assert torch.equal(svd_linear(*operands, dropout_p=0.9), svd_linear(*operands))
    assert not torch.equal(
        svd_linear(*operands, dropout_p=0.5, seed=one), svd_linear(*operands, dropout_p=0.5, seed=two)
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_draws_the_same_mask(reentrant: bool, device: torch.device) -> None:
    t = {k: placed(v, device) for k, v in Call(alpha="groups").operands(torch.float32).items()}

    def block(operands: list[Tensor], x: Tensor) -> Tensor:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=device)
        return svd_linear(x, *operands, dropout_p=0.4, seed=seed).tanh()

    grads: list[list[Any]] = []
    for recompute in (False, True):
        leaves = [t[k].clone().requires_grad_() for k in ("x", "weight", "bias", *MASTERS)]
        operands = [*leaves[1:], t["mask"], t["alpha"]]
        torch.manual_seed(77)
        y = checkpoint(block, operands, leaves[0], use_reentrant=reentrant) if recompute else block(operands, leaves[0])
        y.square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
