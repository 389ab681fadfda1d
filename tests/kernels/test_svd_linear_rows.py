"""svd_linear: path rows beside training rows, dropout drawn from a seed, recomputation, and what bad input is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from igulora.kernels import dropout_keep_mask, svd_linear

N, R, K, OUT, LENGTH = 5, 4, 9, 6, 3


def operands(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (N, LENGTH, K), "weight": (OUT, K), "bias": (OUT,), "P": (R, OUT), "E": (R,), "Q": (R, K)}
    t = {name: torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for name, shape in shapes.items()}
    t["mask"] = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=dtype)
    return t


def call(t: dict[str, Tensor], alpha: Tensor, **kwargs: Any) -> Tensor:
    return svd_linear(t["x"], t["weight"], t["bias"], t["P"], t["E"], t["Q"], t["mask"], alpha, **kwargs)


def accumulators(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros_like(t[k], requires_grad=False) for k in ("P", "E", "Q"))  # type: ignore[return-value]


def dy_of(t: dict[str, Tensor]) -> Tensor:
    return torch.randn(N, LENGTH, OUT, dtype=t["x"].dtype, generator=torch.Generator().manual_seed(11))


# The two ranges of rows: disjoint, one of them empty, overlapping in part and in whole.
@pytest.mark.parametrize(("train", "start"), [(3, 3), (0, 0), (5, 5), (5, 0), (4, 2), (2, 4)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_rows_go_where_they_belong(train: int, start: int, p: float) -> None:
    t = operands()
    alpha = torch.tensor([1.0, 0.5, 0.8, 0.1, 0.0], dtype=torch.float64)
    weight = torch.tensor([2.0, 0.25, -1.0, 3.0, 0.7], dtype=torch.float64)
    path, dy = accumulators(t), dy_of(t)
    y = call(
        t,
        alpha,
        scale=1.5,
        dropout_p=p,
        seed=torch.tensor(3),
        train_groups=train,
        path_start=start,
        path_weight=weight,
        path=path,
    )
    y.backward(dy)
    keep = dropout_keep_mask(torch.tensor(3), N * LENGTH, K, p).view(N, LENGTH, K).double() / (1 - p)
    # A separate computation per group: training gradients keep the factor alpha, path gradients lose it and take their weight.
    sums = {prefix + name: torch.zeros_like(t[name]) for prefix in ("", "t") for name in "PEQ"}
    for i in range(N):
        parts = {k: t[k].detach().requires_grad_() for k in ("P", "E", "Q")}
        update = ((t["x"][i].detach() * keep[i]) @ parts["Q"].t() * (t["mask"] * parts["E"])) @ parts["P"] * 1.5
        grads = dict(zip("PEQ", torch.autograd.grad(update, tuple(parts.values()), dy[i]), strict=True))
        for name, g in grads.items():
            if i < train:
                sums[name] += alpha[i] * g
            if i >= start:
                sums["t" + name] += weight[i] * g
    for name, accumulator in zip("PEQ", path, strict=True):
        if train:
            torch.testing.assert_close(t[name].grad, sums[name], rtol=1e-11, atol=1e-12)
        else:
            assert t[name].grad is None  # a pure path pass keeps no parameter gradient
        torch.testing.assert_close(accumulator, sums["t" + name], rtol=1e-11, atol=1e-12)
    # x's gradient is the chain rule's, whatever the rows are for.
    u = operands()
    expected = torch.nn.functional.linear(u["x"], u["weight"], u["bias"]) + alpha.view(-1, 1, 1) * (
        ((u["x"] * keep) @ u["Q"].t() * (u["mask"] * u["E"])) @ u["P"] * 1.5
    )
    expected.backward(dy)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(t["x"].grad, u["x"].grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(t["weight"].grad, u["weight"].grad, rtol=1e-11, atol=1e-12)


def test_path_gradients_are_added_to_the_accumulators() -> None:
    t, alpha = operands(), torch.full((N,), 0.5, dtype=torch.float64)
    weight = torch.ones(N, dtype=torch.float64)
    once, twice = accumulators(t), accumulators(t)
    for path, passes in ((once, 1), (twice, 2)):
        for _ in range(passes):
            y = call(t, alpha, train_groups=0, path_start=0, path_weight=weight, path=path)
            y.sum().backward()
    for one, two in zip(once, twice, strict=True):
        assert torch.count_nonzero(one) > 0
        torch.testing.assert_close(two, 2 * one, rtol=1e-12, atol=1e-12)


def test_accumulators_that_share_one_buffer() -> None:
    """As in a bank: every layer's views are of one tensor, whose version each layer's backward raises."""
    t, u = operands(), operands(1)
    u["weight"] = torch.eye(OUT, dtype=torch.float64)
    for name in ("Q", "bias"):
        u[name] = t["P"].detach().clone() if name == "Q" else None
    flat = torch.zeros(2 * (R * OUT + R) + R * (K + OUT), dtype=torch.float64)
    sizes = [R * OUT, R, R * K, R * OUT, R, R * OUT]
    shapes = [(R, OUT), (R,), (R, K), (R, OUT), (R,), (R, OUT)]
    views = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
    alpha = torch.full((N,), 0.5, dtype=torch.float64)
    rest = {"train_groups": 0, "path_start": 0, "path_weight": torch.ones(N, dtype=torch.float64)}
    call({**u, "x": call(t, alpha, **rest, path=views[:3])}, alpha, **rest, path=views[3:]).sum().backward()
    assert all(torch.count_nonzero(view) for view in views)


def test_masked_triplets_receive_nothing() -> None:
    t = operands()
    path = accumulators(t)
    alpha = torch.full((N,), 0.5, dtype=torch.float64)
    call(t, alpha, train_groups=N, path_start=0, path_weight=alpha, path=path).sum().backward()
    for tensor in (t["P"].grad, t["E"].grad, t["Q"].grad, *path):
        assert torch.count_nonzero(tensor[1]) == 0
        assert torch.count_nonzero(tensor[0]) > 0


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.3, 0.75])
def test_dropout_is_the_explicit_mask(p: float) -> None:
    t, u, seed, dy = operands(), operands(), torch.tensor(123456789012), dy_of(operands())
    y = call(t, torch.ones((), dtype=torch.float64), dropout_p=p, seed=seed)
    keep = dropout_keep_mask(seed, N * LENGTH, K, p).view(N, LENGTH, K).double() / (1 - p)
    z = (
        torch.nn.functional.linear(u["x"], u["weight"], u["bias"])
        + ((u["x"] * keep) @ u["Q"].t() * (u["mask"] * u["E"])) @ u["P"]
    )
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    y.backward(dy)
    z.backward(dy)
    for name in ("x", "weight", "bias", "P", "E", "Q"):
        torch.testing.assert_close(t[name].grad, u[name].grad, rtol=1e-11, atol=1e-12)


def test_dropout_gradcheck() -> None:
    t = operands()
    names = ("x", "P", "E", "Q")

    def run(*args: Tensor) -> Tensor:
        return call(
            {**t, **dict(zip(names, args, strict=True))},
            torch.ones((), dtype=torch.float64),
            dropout_p=0.3,
            seed=torch.tensor(5),
        )

    assert torch.autograd.gradcheck(run, tuple(t[k] for k in names))


def test_no_seed_no_dropout() -> None:
    t, one = operands(), torch.ones((), dtype=torch.float64)
    assert torch.equal(call(t, one, dropout_p=0.9), call(t, one))
    assert not torch.equal(
        call(t, one, dropout_p=0.5, seed=torch.tensor(1)), call(t, one, dropout_p=0.5, seed=torch.tensor(2))
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_draws_the_same_mask(reentrant: bool) -> None:
    """The seed comes from PyTorch's generator, whose state activation checkpointing restores."""

    def block(t: dict[str, Tensor], x: Tensor) -> Tensor:
        seed = torch.randint(2**62, (), dtype=torch.int64)
        return call({**t, "x": x}, torch.ones((), dtype=torch.float64), dropout_p=0.4, seed=seed).tanh()

    grads = []
    for recompute in (False, True):
        t = operands()
        torch.manual_seed(77)
        y = checkpoint(block, t, t["x"], use_reentrant=reentrant) if recompute else block(t, t["x"])
        y.square().sum().backward()
        grads.append([t[k].grad for k in ("x", "weight", "bias", "P", "E", "Q")])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# -- bad input --------------------------------------------------------------------------------------------------------


def bad(change: dict[str, Any], error: type[Exception], match: str, **kwargs: Any) -> Any:
    return pytest.param(change, kwargs, error, match, id=match[:40])


ONE = torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "kwargs", "error", "match"),
    [
        bad({"x": torch.ones(2, K, dtype=torch.int64)}, TypeError, "got torch.int64"),
        bad({"x": torch.ones(2, K)}, TypeError, "x torch.float32 and weight torch.float64"),
        bad({"x": torch.ones(2, K + 1, dtype=torch.float64)}, ValueError, rf"with {K} features"),
        bad({"x": torch.ones((), dtype=torch.float64)}, ValueError, rf"with {K} features"),
        bad({"P": torch.ones(R, OUT + 1)}, ValueError, "expected P of shape"),
        bad({"E": torch.ones(R + 1)}, ValueError, "expected E of shape"),
        bad({"Q": torch.ones(R - 1, K)}, ValueError, "expected Q of shape"),
        bad({"mask": torch.ones(R, 1)}, ValueError, "expected mask of shape"),
        bad({"alpha": torch.ones(3, dtype=torch.float64)}, ValueError, "expected x to hold 3 sequences"),
        bad({"alpha": torch.ones(0, dtype=torch.float64)}, ValueError, "at least one"),
        bad({"alpha": torch.ones(2), "x": torch.ones(K, dtype=torch.float64)}, ValueError, "expected x to hold 2"),
        bad({"alpha": torch.ones(2), "x": torch.ones(3, K, dtype=torch.float64)}, ValueError, "separate path passes"),
        bad({"mask": torch.ones(R, device="meta")}, ValueError, "got mask on meta"),
        bad({"bias": torch.ones(OUT + 1, dtype=torch.float64)}, ValueError, "expected bias of shape"),
        bad({"bias": torch.ones(OUT)}, TypeError, "bias torch.float32"),
        bad({}, ValueError, "0 <= train_groups <= 1", train_groups=2),
        bad({}, ValueError, "0 <= train_groups <= 1", train_groups=-1),
        bad({}, ValueError, "0 <= path_start <= 1", path_start=2),
        bad({}, ValueError, "expected path accumulators and 1 path weights", path_start=0),
        bad({}, ValueError, "expected path accumulators", path_start=0, path=(ONE, ONE, ONE)),
        bad({}, ValueError, "0 <= dropout_p < 1", dropout_p=1.0, seed=torch.tensor(1)),
    ],
)
def test_bad_input_is_told_what_was_expected(change, kwargs, error, match) -> None:
    t = {k: v.detach() for k, v in operands().items()}
    alpha = change.get("alpha", ONE)
    with pytest.raises(error, match=match):
        call({**t, **{k: v for k, v in change.items() if k != "alpha"}}, alpha, **kwargs)
