"""svd_embed and svd_conv, with svd_update over what they return: rows go where they belong, against autograd of the plain expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from igulora.kernels import svd_conv, svd_embed, svd_update
from igulora.kernels.backend import use_backend

N, R, OUT, IDS = 5, 4, 6, 7
F64 = torch.float64
OPS = torch.ops.igulora
GEOMETRY: dict[str, Any] = {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
WEIGHT = torch.tensor([2.0, 0.25, -1.0, 3.0, 0.7], dtype=F64)
ALPHA = torch.tensor([1.0, 0.5, 0.8, 0.1, 0.0], dtype=F64)


def operands(kind: str, dtype: torch.dtype = F64, rank: int = R) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    width = IDS if kind == "embed" else 3 * 3 * 2
    shapes = {"P": (rank, OUT), "E": (rank,), "Q": (rank, width)}
    t = {name: torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for name, shape in shapes.items()}
    t["mask"] = torch.ones(rank, dtype=dtype)
    t["mask"][1:2] = 0.0
    if kind == "embed":
        t["x"] = torch.randint(IDS, (N, 4), generator=g)
    else:
        t["x"] = torch.randn((N, 3, 6, 5), generator=g, dtype=dtype).requires_grad_()
    return t


def plain_S(kind: str, x: Tensor, Q: Tensor) -> Tensor:
    if kind == "embed":
        return Q.t()[x]
    filters = Q.view(-1, 3, *GEOMETRY["kernel"])
    S = conv2d(x, filters, None, GEOMETRY["stride"], GEOMETRY["padding"], GEOMETRY["dilation"])
    return S.permute(0, 2, 3, 1)


def ours(kind: str, t: dict[str, Tensor], alpha: Tensor | None, path: Any = None, **rows: Any) -> Tensor:
    path_Q = None if path is None else path[2]
    if kind == "embed":
        S = svd_embed(t["x"], t["Q"], alpha, dtype=t["P"].dtype, path_Q=path_Q, **rows)
        shape: tuple[int, ...] = (*t["x"].shape, OUT)
    else:
        S = svd_conv(t["x"], t["Q"], alpha, **GEOMETRY, path_Q=path_Q, **rows)
        shape, S = (*S.shape[:-1], OUT), S.flatten(0, -2)
    factors = [t[k] for k in ("P", "E", "Q", "mask")]
    return svd_update(S.new_zeros(shape), None, *factors, alpha, S=S, scale=1.5, path=path, **rows)


def accumulators(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros_like(t[k], requires_grad=False) for k in "PEQ")  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["embed", "conv"])
# The two ranges of rows: disjoint, one of them empty, overlapping in part and in whole.
@pytest.mark.parametrize(("train", "start"), [(3, 3), (0, 0), (5, 5), (5, 0), (4, 2), (2, 4)])
def test_rows_go_where_they_belong(kind: str, train: int, start: int) -> None:
    t = operands(kind)
    path = accumulators(t)
    y = ours(kind, t, ALPHA, path, train_groups=train, path_start=start, path_weight=WEIGHT)
    dy = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(11))
    y.backward(dy)
    # A separate computation per group: training gradients keep the factor alpha, path gradients lose it and take their weight.
    sums = {prefix + name: torch.zeros_like(t[name]) for prefix in ("", "t") for name in "PEQ"}
    for i in range(N):
        P, E, Q = parts = [t[k].detach().requires_grad_() for k in "PEQ"]
        update = (plain_S(kind, t["x"][i : i + 1].detach(), Q) * (t["mask"] * E)) @ P * 1.5
        for name, g in zip("PEQ", torch.autograd.grad(update, parts, dy[i : i + 1]), strict=True):
            if i < train:
                sums[name] += ALPHA[i] * g
            if i >= start:
                sums["t" + name] += WEIGHT[i] * g
    for name, accumulator in zip("PEQ", path, strict=True):
        if train:
            torch.testing.assert_close(t[name].grad, sums[name], rtol=1e-11, atol=1e-12)
        else:
            assert t[name].grad is None  # a pure path pass keeps no parameter gradient
        torch.testing.assert_close(accumulator, sums["t" + name], rtol=1e-11, atol=1e-12)
    # y and x's gradient are the chain rule's, whatever the rows are for.
    u = operands(kind)
    S = plain_S(kind, u["x"], u["Q"])
    expected = ALPHA.view(-1, *[1] * (S.ndim - 1)) * ((S * (u["mask"] * u["E"])) @ u["P"] * 1.5)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    if kind == "conv":
        expected.backward(dy)
        torch.testing.assert_close(t["x"].grad, u["x"].grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["embed", "conv"])
def test_path_gradients_are_added_to_the_accumulators(kind: str) -> None:
    t, rows = operands(kind), {"train_groups": 0, "path_start": 0, "path_weight": WEIGHT}
    once, twice = accumulators(t), accumulators(t)
    for path, passes in ((once, 1), (twice, 2)):
        for _ in range(passes):
            ours(kind, t, ALPHA, path, **rows).sum().backward()
    for one, two in zip(once, twice, strict=True):
        assert torch.count_nonzero(one) > 0
        torch.testing.assert_close(two, 2 * one, rtol=1e-12, atol=1e-12)


def test_the_padding_id_gets_no_gradient() -> None:
    t = operands("embed")
    path_Q = torch.zeros_like(t["Q"], requires_grad=False)
    rows: dict[str, Any] = {"train_groups": 3, "path_weight": WEIGHT, "path_Q": path_Q}
    svd_embed(t["x"], t["Q"], ALPHA, dtype=F64, padding_idx=2, **rows).sum().backward()
    used = [bool(torch.count_nonzero(t["Q"].grad[:, i])) for i in range(IDS)]
    assert used == [i != 2 and bool((t["x"][:3] == i).any()) for i in range(IDS)]
    assert not torch.count_nonzero(path_Q[:, 2])
    assert torch.count_nonzero(path_Q)


@pytest.mark.parametrize("kind", ["embed", "conv"])
def test_one_triplet_and_none(kind: str) -> None:
    t, u = operands(kind, rank=1), operands(kind, rank=1)
    y = ours(kind, t, None)
    y.square().sum().backward()
    expected = (plain_S(kind, u["x"], u["Q"]) * (u["mask"] * u["E"])) @ u["P"] * 1.5
    torch.testing.assert_close(y, expected)
    expected.square().sum().backward()
    torch.testing.assert_close(t["Q"].grad, u["Q"].grad)
    none = operands(kind, rank=0)
    y = ours(kind, none, None)
    y.sum().backward()
    assert y.shape == expected.shape
    assert not torch.count_nonzero(y)
    assert none["Q"].grad.shape == none["Q"].shape


def test_one_id_many_times_adds_up_in_the_masters_dtype() -> None:
    """300 ones in bfloat16 would stop at 256."""
    Q = torch.randn(2, 3).requires_grad_()
    svd_embed(torch.ones(300, dtype=torch.int64), Q, dtype=torch.bfloat16).sum().backward()
    assert torch.equal(Q.grad, torch.tensor([[0.0, 300.0, 0.0]]).expand(2, 3))


def test_the_kernels_of_the_update_take_this_S(device: torch.device) -> None:
    """A rank that is no multiple of 16 bytes, so that the S of other operators has to be laid out anew."""
    results = []
    for backend, dtype in (("reference", F64), ("triton", torch.float32)):
        t = {k: v.detach().to(device, dtype).requires_grad_() for k, v in operands("embed", rank=3).items() if k != "x"}
        t["x"] = operands("embed")["x"].to(device)
        path = accumulators(t)
        rows = {"train_groups": 3, "path_start": 3, "path_weight": WEIGHT.to(device, dtype)}
        with use_backend(backend):
            y = ours("embed", t, ALPHA.to(device, dtype), path, **rows)
            y.square().sum().backward()
        results.append([y.detach(), *(t[k].grad for k in "PEQ"), *path])
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-4)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("kind", ["embed", "conv"])
@pytest.mark.parametrize("train", [3, 0])
def test_compiled_whole(kind: str, train: int) -> None:
    results = []
    for wrap in (lambda f: f, compiled):
        t = operands(kind, torch.float32)
        path = accumulators(t)
        rows = {"train_groups": train, "path_start": 3, "path_weight": WEIGHT.float()}
        y = wrap(lambda t, path, rows: ours(kind, t, ALPHA.float(), path, **rows))(t, path, rows)
        y.square().sum().backward()
        results.append([y, *(t[k].grad for k in "PEQ"), *path])
    for eager, whole in zip(*results, strict=True):
        assert (eager is None) == (whole is None)
        if eager is not None:
            torch.testing.assert_close(eager, whole)


def test_opcheck() -> None:
    rows = (ALPHA, WEIGHT, None)
    t = operands("embed")
    torch.library.opcheck(OPS.svd_embed_fwd.default, (t["x"], t["Q"], *rows, F64, -1, 3, 5))
    G = torch.randn(t["x"].numel(), R, dtype=F64)
    path_Q = torch.zeros(R, IDS, dtype=F64)
    for needed in (True, False):
        args = (G, t["x"], t["Q"].detach(), ALPHA, WEIGHT, path_Q, 2, 3, 2, needed)
        torch.library.opcheck(OPS.svd_embed_bwd.default, args)
    t = operands("conv")
    shape = [list(v) for v in GEOMETRY.values()]
    torch.library.opcheck(OPS.svd_conv_fwd.default, (t["x"], t["Q"], *rows, *shape, 3, 5))
    G = torch.randn(*plain_S("conv", t["x"], t["Q"]).shape, dtype=F64)
    path_Q = torch.zeros_like(t["Q"], requires_grad=False)
    for needs in ((True, True), (False, False)):
        args = (G, t["x"].detach(), t["Q"].detach(), ALPHA, WEIGHT, path_Q, *shape, 3, 2, *needs)
        torch.library.opcheck(OPS.svd_conv_bwd.default, args)


def test_bad_input_is_told_what_was_expected() -> None:
    t = operands("embed")
    with pytest.raises(TypeError, match="ids in int64 or int32, got torch.float32"):
        svd_embed(torch.zeros(3), t["Q"], dtype=F64)
    with pytest.raises(ValueError, match="ids of 5 sequences .* leave that embedding out"):
        svd_embed(t["x"][:1], t["Q"], ALPHA, dtype=F64)
    with pytest.raises(ValueError, match="path accumulators"):
        svd_embed(t["x"], t["Q"], ALPHA, dtype=F64, train_groups=2)
    with pytest.raises(ValueError, match="expected x or S"):
        svd_update(torch.zeros(2, OUT, dtype=F64), None, *(t[k] for k in ("P", "E", "Q", "mask")))
    t = operands("conv")
    with pytest.raises(ValueError, match=r"expected Q of shape \(r, 27\)"):
        svd_conv(t["x"], t["Q"], kernel=(3, 3))
    with pytest.raises(ValueError, match="5 images in its first dimension"):
        svd_conv(t["x"][:2], t["Q"], ALPHA, **GEOMETRY)
    with pytest.raises(ValueError, match="expected x of shape"):
        svd_conv(t["x"][0], t["Q"], **GEOMETRY)
