"""Block-diagonal adapters: svd_update with windowed P and Q equals svd_update with the dense P and Q built from their blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from igulora.kernels import svd_update
from igulora.kernels.windows import into_rank, out_of_rank, over_rows, widened

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
    }
    t = {
        name: torch.randn(shape, generator=g, dtype=F64).to(dtype if name in "xy" else F64)
        for name, shape in shapes.items()
    }
    t = {name: value.requires_grad_() for name, value in t.items()}
    t["mask"] = (torch.arange(rows) % 4 != 1).to(F64)
    return t


def run(t: dict[str, Tensor], P: Tensor, Q: Tensor, path: tuple[Tensor, ...] | None, options: dict[str, Any]) -> Tensor:
    return svd_update(t["y"] + 0.0, t["x"], P, t["E"], Q, t["mask"], path=path, **options)


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equals_the_dense_operator(blocks: int, mixed: bool, p: float) -> None:
    options: dict[str, Any] = {"scale": 1.5, "dropout_p": p, "seed": torch.tensor(4) if p else None}
    options |= MIXED if mixed else {}
    t = operands(blocks)
    path = tuple(torch.zeros_like(t[k]) for k in ("P", "E", "Q")) if mixed else None
    y = run(t, t["P"], t["Q"], path, options)
    ours = torch.autograd.grad(y.square().sum(), [t[k] for k in ("y", "x", "P", "E", "Q")])

    wide = {k: widened(t[k].detach(), blocks).requires_grad_() for k in ("P", "Q")}
    wide_path = (torch.zeros_like(wide["P"]), torch.zeros_like(t["E"]), torch.zeros_like(wide["Q"])) if mixed else None
    expected = run(t, wide["P"], wide["Q"], wide_path, options)
    theirs = list(torch.autograd.grad(expected.square().sum(), [t["y"], t["x"], wide["P"], t["E"], wide["Q"]]))
    for i, key in ((2, "P"), (4, "Q")):
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
    torch.testing.assert_close(S, x @ widened(Q, blocks).t())
    torch.testing.assert_close(out_of_rank(S, P, OUT), S @ widened(P, blocks))
    torch.testing.assert_close(over_rows(S, x, Q.shape[1]), narrowed(S.t() @ x, Q, blocks))
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
