"""svd_linear against float64 autograd of the plain formula: values, every gradient, ranks, shapes, dtypes, operator checks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from igulora.kernels import svd_linear

OPS = torch.ops.igulora
NAMES = ("x", "weight", "bias", "P", "E", "Q")


def operands(
    r: int,
    lead: tuple[int, ...] = (3, 5),
    k: int = 10,
    n: int = 7,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    mask: str = "partial",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Random operands of one call; masters in float64 when the compute dtype is, else float32."""
    g = torch.Generator().manual_seed(seed)
    master = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int, to: torch.dtype = master) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(to)

    kept = {"on": torch.ones(r), "off": torch.zeros(r), "partial": (torch.arange(r) % 3 != 1).double()}[mask]
    return {
        "x": draw(*lead, k, to=dtype),
        "weight": (draw(n, k) / k**0.5).to(dtype),
        "bias": draw(n, to=dtype) if bias else None,
        "P": draw(r, n) / max(n, 1) ** 0.5,
        "E": draw(r),
        "Q": draw(r, k) / k**0.5,
        "mask": kept.to(master),
    }


def plain(t: dict[str, Tensor | None], alpha: Tensor, scale: float) -> Tensor:
    """The formula of ALGORITHMS 1 as one would write it; alpha () or one per first index of x."""
    x = t["x"]
    if alpha.ndim and alpha.numel() > 1:
        alpha = alpha.view(-1, *[1] * (x.ndim - 1))
    y = torch.nn.functional.linear(x, t["weight"], t["bias"])
    return y + alpha * (scale * (((x @ t["Q"].t()) * (t["mask"] * t["E"])) @ t["P"]))


def leaves(t: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Fresh leaves of the same values, in ``dtype`` when given; all but the mask require gradients."""
    return {
        k: None if v is None else v.detach().clone().to(dtype or v.dtype).requires_grad_(k != "mask")
        for k, v in t.items()
    }


def gradients(t: dict[str, Tensor | None], y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    names = [k for k in NAMES if t[k] is not None]
    return dict(zip(names, torch.autograd.grad(y, [t[k] for k in names], dy), strict=True))


def call(t: dict[str, Tensor | None], alpha: Tensor, **kwargs) -> Tensor:
    return svd_linear(*(t[k] for k in NAMES), t["mask"], alpha, **kwargs)


def assert_same_as_plain(t: dict[str, Tensor | None], alpha: Tensor, scale: float) -> None:
    ours, theirs = leaves(t), leaves(t)
    y, expected = call(ours, alpha, scale=scale), plain(theirs, alpha, scale)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=y.dtype)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    got, wanted = gradients(ours, y, dy), gradients(theirs, expected, dy)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# Ranks of STYLE 12: none, one, odd, below 16, 16, above 32; every mask; alpha off, inside, on.
@pytest.mark.parametrize("r", [0, 1, 7, 12, 16, 33])
@pytest.mark.parametrize(("mask", "alpha"), [("on", 1.0), ("off", 1.0), ("partial", 0.3), ("partial", 0.0)])
def test_value_and_gradients(r: int, mask: str, alpha: float) -> None:
    assert_same_as_plain(operands(r, mask=mask), torch.tensor(alpha, dtype=torch.float64), 1.75)


# Leading shapes: a vector, nothing at all in a dimension, one row, five dimensions.
@pytest.mark.parametrize("lead", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_leading_shapes(lead: tuple[int, ...], bias: bool) -> None:
    assert_same_as_plain(operands(3, lead, bias=bias), torch.tensor(0.6, dtype=torch.float64), 1.0)


@given(
    r=st.integers(0, 9),
    lead=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    k=st.integers(1, 19),
    n=st.integers(1, 19),
    scale=st.sampled_from([0.0, 0.5, 2.0]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_any_shape(r, lead, k, n, scale, alpha, bias, seed) -> None:
    t = operands(r, lead, k, n, bias=bias, seed=seed)
    assert_same_as_plain(t, torch.tensor(alpha, dtype=torch.float64), scale)


@pytest.mark.parametrize("lead", [(4,), (4, 3), (4, 2, 3)])
def test_one_alpha_per_sequence(lead: tuple[int, ...]) -> None:
    alpha = torch.tensor([0.0, 0.3, 1.0, 0.77], dtype=torch.float64)
    assert_same_as_plain(operands(5, lead), alpha, 0.8)


def test_rows_of_a_flattened_batch_share_the_alpha_of_their_sequence() -> None:
    t, alpha = operands(4, (3, 5)), torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    flat = {**t, "x": t["x"].reshape(15, -1)}
    assert torch.equal(call(flat, alpha).reshape(3, 5, -1), call(t, alpha))


def test_strided_input_and_gradient() -> None:
    t = operands(6, (4, 3))
    strided = {**t, "x": t["x"].transpose(0, 1).contiguous().transpose(0, 1)}
    assert not strided["x"].is_contiguous()
    one = torch.ones((), dtype=torch.float64)
    ours, theirs = leaves(t), leaves(t)
    x = ours["x"].transpose(0, 1).contiguous().transpose(0, 1)
    y, expected = call({**ours, "x": x}, one), plain(theirs, one, 1.0)
    wide = torch.randn((4, 3, 14), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    dy = wide[..., ::2]
    got, wanted = gradients(ours, y, dy), gradients(theirs, expected, dy)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-11, atol=1e-12)
    y2 = call(leaves(strided), one)
    y2.sum().backward()  # an expanded gradient of stride 0
    torch.testing.assert_close(y2, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", [0, 4])
def test_gradcheck(r: int) -> None:
    t = leaves(operands(r, (2, 3), 5, 4))
    alpha = torch.tensor([0.4, 1.0], dtype=torch.float64)

    def run(*args: Tensor) -> Tensor:
        return call({**dict(zip(NAMES, args, strict=True)), "mask": t["mask"]}, alpha, scale=1.5)

    assert torch.autograd.gradcheck(run, tuple(t[k] for k in NAMES))


# Every fifth of the 64 combinations: each input alone or with others, wanted and not.
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=6))[1::5])
def test_only_the_wanted_gradients(wanted: tuple[bool, ...]) -> None:
    t, one = operands(5), torch.ones((), dtype=torch.float64)
    full = leaves(t)
    reference = gradients(full, plain(full, one, 1.0), torch.ones(3, 5, 7, dtype=torch.float64))
    some = {k: None if v is None else v.detach() for k, v in t.items()}
    for name, need in zip(NAMES, wanted, strict=True):
        some[name] = some[name].clone().requires_grad_(need)
    call(some, one).sum().backward()
    for name, need in zip(NAMES, wanted, strict=True):
        assert (some[name].grad is not None) == need
        if need:
            torch.testing.assert_close(some[name].grad, reference[name], rtol=1e-11, atol=1e-12)


def test_backward_operator_leaves_unneeded_results_empty() -> None:
    t, one = operands(5), torch.ones(1, dtype=torch.float64)
    x2 = t["x"].reshape(-1, 10)
    rest = (t["weight"], t["P"], t["E"], t["Q"], t["mask"], one, *[None] * 5, 1.0, 0.0, 1, 1)
    needs = [True, False, False, True, False, False, False]
    results = OPS.svd_linear_bwd(torch.ones(15, 7, dtype=torch.float64), x2 @ t["Q"].t(), x2, *rest, needs)
    assert [tuple(g.shape) for g in results] == [(15, 10), (0,), (0,), (5, 7)] + [(0,)] * 3
    storages = [g.untyped_storage()._cdata for g in results]
    assert len(set(storages)) == len(storages)  # an operator may not return one storage twice


def test_no_gradient_wanted_keeps_no_graph() -> None:
    t = operands(3)
    assert not call(t, torch.ones((), dtype=torch.float64)).requires_grad


def op_inputs(r: int, dtype: torch.dtype, p: float, path: bool, alphas: int) -> tuple:
    t = leaves(operands(r, (4, 3), 6, 5, dtype=dtype))
    master = t["P"].dtype
    alpha = torch.linspace(0.2, 1, alphas, dtype=master) if alphas else torch.ones((), dtype=master)
    extra = tuple(torch.zeros_like(t[k], requires_grad=False) for k in ("P", "E", "Q")) if path else (None, None, None)
    weight = torch.linspace(0.5, 2, max(alphas, 1), dtype=master) if path else None
    seed = torch.tensor(5) if p else None
    groups, start = (alphas - 1, alphas - 2) if path else (max(alphas, 1), max(alphas, 1))
    return (*(t[k] for k in NAMES), t["mask"], alpha, None, weight, *extra, seed, 1.5, p, groups, start)


@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("p", "path", "alphas"), [(0.0, False, 0), (0.3, False, 4), (0.3, True, 4)])
def test_opcheck(r: int, dtype: torch.dtype, p: float, path: bool, alphas: int) -> None:
    inputs = op_inputs(r, dtype, p, path, alphas)
    # Float32 and bfloat16 results of one call are compared with themselves: the same bits are expected.
    torch.library.opcheck(OPS.svd_linear_fwd.default, inputs)
    with torch.no_grad():
        S = OPS.svd_linear_fwd(*inputs)[1]
    x, weight, _, P, E, Q, mask, alpha, _, path_weight, *rest = inputs
    plain_inputs = [None if t is None else t.detach() for t in (x, weight, P, E, Q, mask, alpha, path_weight)]
    dy = torch.ones((4, 3, 5), dtype=dtype)
    for needs in ([True] * 6 + [False], [True] * 5 + [False, True], [True] + [False] * 6):
        torch.library.opcheck(OPS.svd_linear_bwd.default, (dy, S, *plain_inputs, *rest, needs))


def error(values: Tensor, exact: Tensor) -> float:
    """Relative root-mean-square error against float64."""
    return float((values.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp_min(1e-300))


# STYLE 17. Sizes with several accumulation blocks, and one too small for that.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("r", "rows", "k", "n"), [(16, 96, 160, 72), (7, 33, 31, 65), (1, 5, 8, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_error_at_most_twice_that_of_pytorch(dtype, r, rows, k, n, seed) -> None:
    t = operands(r, (rows,), k, n, dtype=dtype, seed=seed)
    alpha = torch.tensor(0.7)
    ours, exact = leaves(t), leaves(t, torch.float64)
    theirs = leaves(t)  # masters stay float32 leaves; PyTorch computes in x's dtype, as the operator does
    y = call(ours, alpha, scale=1.5)
    z = plain({k2: None if v is None else v.to(dtype) for k2, v in theirs.items()}, alpha.to(dtype), 1.5)
    e = plain(exact, alpha.double(), 1.5)
    dy = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert y.dtype == dtype
    got, peer, wanted = gradients(ours, y, dy), gradients(theirs, z, dy), gradients(exact, e, dy.double())
    eps = torch.finfo(dtype).eps
    assert error(y, e) <= 2 * error(z, e) + eps / 8, "y"
    for name in wanted:
        assert got[name].dtype == ours[name].dtype
        assert error(got[name], wanted[name]) <= 2 * error(peer[name], wanted[name]) + eps / 8, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits(dtype: torch.dtype) -> None:
    alpha, runs = torch.linspace(0, 1, 6), []
    for _ in range(2):
        t = leaves(operands(12, (6, 11), 40, 24, dtype=dtype))
        y = call(t, alpha, dropout_p=0.2, seed=torch.tensor(9))
        runs.append([y, *gradients(t, y, torch.ones_like(y)).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inputs_are_not_changed() -> None:
    t = leaves(operands(4))
    before = {k: None if v is None else v.detach().clone() for k, v in t.items()}
    call(t, torch.ones((), dtype=torch.float64), dropout_p=0.5, seed=torch.tensor(1)).sum().backward()
    for name, value in before.items():
        assert torch.equal(t[name], value)


def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients() -> None:
    t = leaves(operands(5, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(t, torch.ones(()))
    assert y.dtype == torch.bfloat16
    low = {k: v.detach().bfloat16() if k in ("x", "weight", "bias") else v.detach() for k, v in t.items()}
    assert torch.equal(y, call(low, torch.ones(())))
    y.float().sum().backward()
    for name in NAMES:
        assert t[name].grad.dtype == torch.float32
        assert t[name].grad.isfinite().all()


def test_backward_inside_autocast() -> None:
    t, u = leaves(operands(5, dtype=torch.float32)), leaves(operands(5, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call(t, torch.ones(()))
        inside.float().sum().backward()
        outside = call(u, torch.ones(()))
    outside.float().sum().backward()
    for name in NAMES:
        assert torch.equal(t[name].grad, u[name].grad), name


def test_compiles_without_a_break() -> None:
    t = operands(5, dtype=torch.float32)
    run = torch.compile(
        lambda x: svd_linear(x, *(t[k] for k in NAMES[1:]), t["mask"], torch.ones(())),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(run(t["x"]), call(t, torch.ones(())))
