"""svd_update, the rank-r update of a base that runs its own forward: equal to svd_linear on the same base, in place and out of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from igulora.kernels import svd_linear, svd_project, svd_update

N, LENGTH, K, OUT, R = 4, 3, 9, 6, 5
F64 = torch.float64


def operands(seed: int = 0, r: int = R) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (N, LENGTH, K), "weight": (OUT, K), "bias": (OUT,), "P": (r, OUT), "E": (r,), "Q": (r, K)}
    t = {name: torch.randn(shape, generator=g, dtype=F64).requires_grad_() for name, shape in shapes.items()}
    t["mask"] = (torch.arange(r) % 3 != 1).to(F64)
    return t


FACTORS = ("P", "E", "Q", "mask")
MIXED: dict[str, Any] = {
    "alpha": torch.tensor([1.0, 1.0, 0.3, 0.6], dtype=F64),
    "train_groups": 2,
    "path_start": 2,
    "path_weight": torch.tensor([0.0, 0.0, 2.0, -1.0], dtype=F64),
}


def accumulators(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(t[k], requires_grad=False) for k in ("P", "E", "Q"))


def through_update(t: dict[str, Tensor], **options: Any) -> Tensor:
    y = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    return svd_update(y, t["x"], *(t[k] for k in FACTORS), **options)


def through_linear(t: dict[str, Tensor], **options: Any) -> Tensor:
    return svd_linear(t["x"], t["weight"], t["bias"], *(t[k] for k in FACTORS), **options)


@pytest.mark.parametrize("r", [0, 1, R])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equals_the_fused_layer(r: int, mixed: bool, p: float) -> None:
    results = []
    for run in (through_update, through_linear):
        t = operands(r=r)
        path = accumulators(t)
        options = {"scale": 1.5, "dropout_p": p, "seed": torch.tensor(4) if p else None}
        options |= {**MIXED, "path": path} if mixed else {}
        y = run(t, **options)
        y.square().sum().backward()
        results.append([y, *(t[k].grad for k in ("x", "weight", "bias", "P", "E", "Q")), *path])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_writes_into_the_base_output() -> None:
    t = operands()
    y = (t["x"] @ t["weight"].t()).detach()
    assert svd_update(y, t["x"], *(t[k] for k in FACTORS)) is y


def test_a_strided_output_is_left_alone() -> None:
    t = operands()
    wide = torch.zeros(N, LENGTH, 2 * OUT, dtype=F64)
    out = svd_update(wide[..., ::2], t["x"], *(t[k] for k in FACTORS))
    assert torch.count_nonzero(wide) == 0
    assert torch.count_nonzero(out)


def test_gradcheck() -> None:
    t = operands()

    def run(base: Tensor, x: Tensor, P: Tensor, E: Tensor, Q: Tensor) -> Tensor:
        return svd_update(base * 1.0, x, P, E, Q, t["mask"], torch.tensor(0.7, dtype=F64), scale=1.5)

    base = torch.randn(N, LENGTH, OUT, dtype=F64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(run, (base, *(t[k] for k in ("x", "P", "E", "Q"))))


def test_takes_a_given_s() -> None:
    t, u = operands(), operands()
    (S,) = svd_project(t["x"], [t["Q"]])
    ours, theirs = through_update(t, S=S), through_update(u)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name in ("x", "weight", "P", "E", "Q"):
        torch.testing.assert_close(t[name].grad, u[name].grad, rtol=1e-11, atol=1e-12)


def test_compiled_and_eager_agree() -> None:
    t, u = operands(), operands()
    run = torch.compile(through_update, fullgraph=True, backend="aot_eager")
    compiled, eager = run(t), through_update(u)
    compiled.square().sum().backward()
    eager.square().sum().backward()
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
    for name in ("x", "weight", "P", "E", "Q"):
        torch.testing.assert_close(t[name].grad, u[name].grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_under_autocast_a_float32_base_is_updated_in_float32(backward_inside: bool) -> None:
    def single(seed: int = 0) -> dict[str, Tensor]:
        return {k: v.detach().float().requires_grad_(k != "mask") for k, v in operands(seed).items()}

    t, u = single(), single()
    base = torch.randn(N, LENGTH, OUT, generator=torch.Generator().manual_seed(1))
    expected = svd_update(base.clone() * 1.0, u["x"], *(u[k] for k in FACTORS))
    expected.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = svd_update(base.clone() * 1.0, t["x"], *(t[k] for k in FACTORS))
        if backward_inside:
            y.sum().backward()
    if not backward_inside:
        y.sum().backward()
    assert torch.equal(y, expected)
    for name in ("x", "P", "E", "Q"):
        assert torch.equal(t[name].grad, u[name].grad), name


def test_a_base_run_without_gradients() -> None:
    t = operands()
    with torch.no_grad():
        y = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    svd_update(y, t["x"], *(t[k] for k in FACTORS)).sum().backward()
    assert t["Q"].grad is not None
    square = torch.randn(N, K, dtype=F64)
    before = square.clone()
    P = torch.ones(R, K, dtype=F64)
    svd_update(square, square, P, t["E"].detach(), t["Q"].detach(), t["mask"])  # a base that returned its input
    assert torch.equal(square, before)


def test_opcheck() -> None:
    t = {k: v.detach() for k, v in operands().items()}
    y = torch.zeros(N, LENGTH, OUT, dtype=F64)
    rest = (t["x"], *(t[k] for k in FACTORS), None, None)
    torch.library.opcheck(torch.ops.igulora.svd_update.default, (y, *rest, *[None] * 5, 1.5, 0.0, 1, 1))
    torch.library.opcheck(torch.ops.igulora.svd_update_.default, (y, *rest, None, 1.5, 0.0))


def test_bad_input_is_told_what_was_expected() -> None:
    t = operands()
    factors = [t[k] for k in FACTORS]
    with pytest.raises(ValueError, match="one leading shape"):
        svd_update(torch.zeros(N, OUT, dtype=F64), t["x"], *factors)
    with pytest.raises(ValueError, match="expected P of shape"):
        svd_update(torch.zeros(N, LENGTH, OUT + 1, dtype=F64), t["x"], *factors)
    with pytest.raises(ValueError, match="0 <= dropout_p < 1"):
        svd_update(torch.zeros(N, LENGTH, OUT, dtype=F64), t["x"], *factors, dropout_p=1.0)
