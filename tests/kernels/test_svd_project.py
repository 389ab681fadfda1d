"""svd_project: S of several layers from one x; with svd_linear(..., S=S) the same numbers as each layer alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from igulora.kernels import svd_linear, svd_project

N, LENGTH, K = 4, 3, 9
F64 = torch.float64
LAYERS = ((6, 5), (4, 2), (7, 0))  # (out, rank)


def operands(seed: int = 0) -> tuple[Tensor, list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F64).requires_grad_()

    layers = [
        {"weight": draw(out, K), "P": draw(r, out), "E": draw(r), "Q": draw(r, K), "mask": torch.ones(r, dtype=F64)}
        for out, r in LAYERS
    ]
    return draw(N, LENGTH, K), layers


def run(shared: bool, **options: Any) -> list[Tensor]:
    """Outputs, gradients and accumulators of three layers on one x."""
    x, layers = operands()
    paths = [tuple(torch.zeros_like(t[k], requires_grad=False) for k in ("P", "E", "Q")) for t in layers]
    sampled = options.get("path_weight") is not None
    kinds = ("alpha", "train_groups", "path_start", "path_weight", "dropout_p", "seed")
    common = {k: options[k] for k in kinds if k in options}
    Ss: list[Tensor | None] = [None] * len(layers)
    if shared:
        Qs = [t["Q"] for t in layers]
        Ss = list(svd_project(x, Qs, **common, path_Qs=[p[2] for p in paths] if sampled else None))
    ys = [
        svd_linear(
            x,
            t["weight"],
            None,
            *(t[k] for k in ("P", "E", "Q", "mask")),
            **common,
            scale=1.5,
            S=S,
            path=path if sampled else None,
        )
        for t, S, path in zip(layers, Ss, paths, strict=True)
    ]
    torch.cat(ys, dim=-1).square().sum().backward()
    grads = [t[k].grad for t in layers for k in ("weight", "P", "E", "Q")]
    return [*ys, x.grad, *(g for g in grads if g is not None), *(a for path in paths for a in path)]


WEIGHT = torch.tensor([0.5, -1.0, 2.0, 1.0], dtype=F64)
ALPHA = torch.tensor([1.0, 0.8, 0.3, 0.6], dtype=F64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout_p": 0.4, "seed": torch.tensor(11)},
        {"alpha": ALPHA},
        {"alpha": ALPHA, "train_groups": 2, "path_start": 2, "path_weight": WEIGHT},
        {"alpha": ALPHA, "train_groups": 4, "path_start": 1, "path_weight": WEIGHT},
        {
            "alpha": ALPHA,
            "train_groups": 0,
            "path_start": 0,
            "path_weight": WEIGHT,
            "dropout_p": 0.2,
            "seed": torch.tensor(3),
        },
    ],
    ids=["plain", "dropout", "alpha", "mixed", "overlap", "path"],
)
def test_equals_the_layers_alone(options: dict[str, Any]) -> None:
    together, alone = run(True, **options), run(False, **options)
    assert len(together) == len(alone)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_gradcheck_of_the_pair() -> None:
    x, (t, u, _) = operands()

    def go(x: Tensor, Q1: Tensor, Q2: Tensor) -> Tensor:
        S1, S2 = svd_project(x, [Q1, Q2])
        one = svd_linear(x, t["weight"], None, t["P"], t["E"], Q1, t["mask"], S=S1)
        two = svd_linear(x, u["weight"], None, u["P"], u["E"], Q2, u["mask"], S=S2)
        return torch.cat((one, two), dim=-1)

    assert torch.autograd.gradcheck(go, (x, t["Q"], u["Q"]))


def test_a_member_that_is_not_used_gets_zeros() -> None:
    x, (t, u, _) = operands()
    S, _unused = svd_project(x, [t["Q"], u["Q"]])
    svd_linear(x, t["weight"], None, t["P"], t["E"], t["Q"], t["mask"], S=S).sum().backward()
    assert torch.count_nonzero(t["Q"].grad)
    assert torch.count_nonzero(u["Q"].grad) == 0


def test_results_have_storage_of_their_own() -> None:
    x, layers = operands()
    S = svd_project(x, [t["Q"] for t in layers])
    assert len({s.untyped_storage()._cdata for s in S}) == len(S)


def test_bad_input_is_told_what_was_expected() -> None:
    x, layers = operands()
    with pytest.raises(ValueError, match="at least one Q"):
        svd_project(x, [])
    with pytest.raises(ValueError, match=rf"shape \(r, {K}\), got \(2, 5\) at index 1"):
        svd_project(x, [layers[0]["Q"], torch.ones(2, 5, dtype=F64)])
    with pytest.raises(ValueError, match="expected x with"):
        svd_project(x[..., 1:], [layers[0]["Q"]])
    with pytest.raises(ValueError, match="path accumulators"):
        svd_project(x, [layers[0]["Q"]], path_start=0)
