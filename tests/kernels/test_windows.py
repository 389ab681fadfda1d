"""Block-diagonal adapters: an operator with windowed P and Q equals the same with the dense P and Q built from their blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from igulora.kernels import svd_linear, svd_update
from igulora.kernels.windows import add_out_of_rank, into_rank, out_of_rank, over_rows, widened

N, LENGTH, K, OUT, R = 4, 3, 8, 12, 3  # R triplets per block
F64 = torch.float64
MIXED: dict[str, Any] = {
    "alpha": torch.tensor([1.0, 1.0, 0.3, 0.6], dtype=F64),
    "train_groups": 2,
    "path_start": 1,
    "path_weight": torch.tensor([0.0, 0.5, 2.0, -1.0], dtype=F64),
}


def operands(blocks: int, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(blocks)
    rows = R * blocks
    shapes = {
        "y": (N, LENGTH, OUT),
        "x": (N, LENGTH, K),
        "P": (rows, OUT // blocks),
        "E": (rows,),
        "Q": (rows, K // blocks),
        "weight": (OUT, K),
        "bias": (OUT,),
    }
    t = {
        name: torch.randn(shape, generator=g, dtype=F64).to(F64 if name in "PEQ" else dtype)
        for name, shape in shapes.items()
    }
    t = {name: value.requires_grad_() for name, value in t.items()}
    t["mask"] = (torch.arange(rows) % 4 != 1).to(F64)
    return t


def run(
    base: tuple[str, ...], t: dict[str, Tensor], P: Tensor, Q: Tensor, path: Any, options: dict[str, Any]
) -> Tensor:
    given = (P, t["E"], Q, t["mask"])
    if base == ("y",):
        return svd_update(t["y"] + 0.0, t["x"], *given, path=path, **options)
    bias = t["bias"] if "bias" in base else None
    return svd_linear(t["x"], t["weight"], bias, *given, path=path, **options)


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("base", [("y",), ("weight",), ("weight", "bias")], ids=["update", "linear", "bias"])
def test_equals_the_dense_operator(base: tuple[str, ...], blocks: int, mixed: bool, p: float) -> None:
    options: dict[str, Any] = {"scale": 1.5, "dropout_p": p, "seed": torch.tensor(4) if p else None}
    options |= MIXED if mixed else {}
    t = operands(blocks)
    path = tuple(torch.zeros_like(t[k]) for k in ("P", "E", "Q")) if mixed else None
    y = run(base, t, t["P"], t["Q"], path, options)
    ours = torch.autograd.grad(y.square().sum(), [t[k] for k in (*base, "x", "P", "E", "Q")])

    wide = {k: widened(t[k].detach(), blocks).requires_grad_() for k in ("P", "Q")}
    wide_path = (torch.zeros_like(wide["P"]), torch.zeros_like(t["E"]), torch.zeros_like(wide["Q"])) if mixed else None
    expected = run(base, t, wide["P"], wide["Q"], wide_path, options)
    others = [*(t[k] for k in base), t["x"], wide["P"], t["E"], wide["Q"]]
    theirs = list(torch.autograd.grad(expected.square().sum(), others))
    for i, key in ((-3, "P"), (-1, "Q")):
        theirs[i] = narrowed(theirs[i], t[key], blocks)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    if path is not None and wide_path is not None:
        assert path[0].abs().max() > 0
        found = (narrowed(wide_path[0], t["P"], blocks), wide_path[1], narrowed(wide_path[2], t["Q"], blocks))
        for a, b in zip(path, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def narrowed(wide: Tensor, like: Tensor, blocks: int) -> Tensor:
    """The windows of dense rows."""
    parts = wide.view(blocks, -1, blocks, like.shape[1])
    return torch.stack([parts[b, :, b] for b in range(blocks)]).reshape(like.shape)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_products(blocks: int) -> None:
    t = operands(blocks)
    x, P, Q = t["x"].detach().flatten(0, 1), t["P"].detach(), t["Q"].detach()
    S = into_rank(x, Q)
    flat = S if blocks == 1 else S.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat, x @ widened(Q, blocks).t())
    term, y = flat @ widened(P, blocks), torch.randn(x.shape[0], OUT, dtype=F64)
    torch.testing.assert_close(out_of_rank(S, P), term)
    torch.testing.assert_close(out_of_rank(S, P, y[0]), term + y[0])
    torch.testing.assert_close(add_out_of_rank(y.clone(), S, P), y + term)
    torch.testing.assert_close(over_rows(S, x), narrowed(flat.t() @ x, Q, blocks))
    assert not (widened(P, blocks) * (1 - widened(torch.ones_like(P), blocks))).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_dtypes_of_models(dtype: torch.dtype) -> None:
    t = operands(4, dtype)
    masters = {k: t[k].detach().float() for k in ("P", "E", "Q", "mask")}
    y = svd_update(t["y"].detach().clone(), t["x"].detach(), **masters)
    exact = svd_update(
        t["y"].detach().double(), t["x"].detach().double(), **{k: v.double() for k, v in masters.items()}
    )
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=0.1)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_operands_stay_what_they_are(rows: int, grad: bool) -> None:
    """Of one row a bias repeated for every row is the bias itself, which nothing may be added to."""
    t = {k: v.detach() for k, v in operands(2).items()}
    before = {k: v.clone() for k, v in t.items()}
    x = t["x"].flatten(0, 1)[:rows].clone().requires_grad_(grad)
    y = svd_linear(x, t["weight"], t["bias"], *(t[k] for k in ("P", "E", "Q", "mask")))
    if grad:
        y.square().sum().backward()
    assert all(torch.equal(before[k], t[k]) for k in t)
    widths = [widened(t[k], 2) for k in "PQ"]
    expected = svd_linear(x, t["weight"], t["bias"], widths[0], t["E"], widths[1], t["mask"])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 1, 12])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck_of_the_reference(rows: int, p: float) -> None:
    t = {k: v.detach().requires_grad_(k != "mask") for k, v in operands(2).items()}
    x, y = (t[k].detach().flatten(0, 1)[:rows].clone().requires_grad_() for k in "xy")
    rest = (*(t[k] for k in ("P", "E", "Q", "mask")), None, None, *[None] * 4, torch.tensor(5), 1.5, p, 1, 1)
    torch.library.opcheck(torch.ops.igulora.svd_linear_fwd.default, (x, t["weight"], t["bias"], *rest))
    torch.library.opcheck(torch.ops.igulora.svd_update.default, (y, x, *rest))


def test_a_layer_with_a_bias_to_train_compiles() -> None:
    t = {k: v.detach().requires_grad_(k in ("P", "E", "Q", "bias")) for k, v in operands(4).items()}
    names = ("bias", "P", "E", "Q")

    def run(x: Tensor) -> Tensor:
        return svd_linear(x, t["weight"], *(t[k] for k in (*names, "mask")))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(t["x"]).square().sum(), [t[k] for k in names]) for f in (compiled, run))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(12, 6), (2, 12, 3)], ids=str)
def test_s_is_left_to_the_operator(shape: tuple[int, ...]) -> None:
    t = {k: v.detach() for k, v in operands(2).items()}
    given = (t["P"], t["E"], t["Q"], t["mask"])
    with pytest.raises(ValueError, match="expected S to be left to the operator for triplets in 2 blocks"):
        svd_linear(t["x"], t["weight"], None, *given, S=torch.zeros(shape, dtype=F64))
    with pytest.raises(ValueError, match="expected S to be left to the operator for triplets in 2 blocks"):
        svd_update(t["y"].clone(), t["x"], *given, S=torch.zeros(shape, dtype=F64))
    one = {k: v.detach() for k, v in operands(1).items()}
    with pytest.raises(ValueError, match=r"expected S of shape \(rows, 3\) for these triplets"):
        svd_update(
            one["y"].clone(), one["x"], *(one[k] for k in ("P", "E", "Q", "mask")), S=torch.zeros(shape, dtype=F64)
        )


def test_writes_into_the_base_output_and_compiles() -> None:
    t = {k: v.detach() for k, v in operands(2).items()}
    y = t["y"].clone()
    given = [t[k] for k in ("P", "E", "Q", "mask")]
    assert svd_update(y, t["x"], *given) is y
    compiled = torch.compile(lambda a, b: svd_update(a, b, *given), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(t["y"].clone(), t["x"]), y)


@pytest.mark.parametrize(
    ("P", "Q"),
    [((6, 6), (6, 8)), ((6, 6), (6, 2)), ((5, 6), (5, 4)), ((6, 5), (6, 4))],
    ids=["Q spans the layer", "Q has other blocks", "blocks of unequal rows", "P divides nothing"],
)
def test_windows_that_do_not_fit(P: tuple[int, int], Q: tuple[int, int]) -> None:
    y, x, ones = torch.zeros(2, OUT), torch.zeros(2, K), torch.ones(P[0])
    with pytest.raises(ValueError, match=r"expected P and Q with rows of out / n and in / n"):
        svd_update(y, x, torch.zeros(P), ones, torch.zeros(Q), ones)
