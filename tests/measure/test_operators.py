"""What igulora's operators are counted as, against the launches that Triton's interpreter makes of them: equal to the byte."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from igulora.kernels import allocate_triplets, importance_update, orthogonality_grad_, svd_linear, svd_update
from igulora.kernels.backend import interpreting, use_backend
from igulora.kernels.fused.common import padded_rank
from igulora.kernels.svd_project import svd_project
from igulora.measure.costs import Cost
from igulora.measure.counting import Counting
from igulora.measure.operators import ADAPTER, BASE, Architecture

pytestmark = pytest.mark.skipif(not interpreting(), reason="loads and stores are counted by Triton's interpreter")
# What launchers take the CPU for under the interpreter.
INTERPRETED = Architecture("sm_86", 4)


@pytest.fixture(scope="module")
def counted() -> Any:
    """The counter of the kernels' own tests, by its path."""
    path = Path(__file__).resolve().parents[1] / "kernels" / "fused" / "counted.py"
    spec = importlib.util.spec_from_file_location("_counted_for_measure", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.counted


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Call:
    """Operands of a layer in float16, and what of a mixed batch goes with them."""

    def __init__(self, M: int, K: int, N: int, R: int, kind: str, blocks: int = 1) -> None:
        self.x = draw(M, K).half().requires_grad_()
        self.weight = draw(N, K).half()
        shapes = ((R, N // blocks), (R,), (R, K // blocks))
        self.masters = [draw(*shape).requires_grad_() for shape in shapes]
        self.mask = torch.ones(R)
        self.options: dict[str, Any] = {"scale": 1.25}
        groups = 5
        if kind in ("mixed", "overlapping", "separate"):
            factor = torch.full((groups,), 0.5)
            train = {"mixed": 4, "overlapping": groups, "separate": 0}[kind]
            start = {"mixed": 4, "overlapping": 1, "separate": 0}[kind]
            accumulators = tuple(torch.zeros_like(t) for t in self.masters)
            self.options |= {"alpha": factor, "path_weight": factor.clone(), "train_groups": train, "path_start": start}
            self.options["path"] = accumulators
        if kind == "dropout":
            self.options |= {"dropout_p": 0.25, "seed": torch.tensor(3)}
        self.bias = draw(N).half() if kind == "bias" else None


def both(counted: Any, run: Any) -> tuple[dict[str, Cost], list[tuple[str, Any]]]:
    """Costs by part as counted for the interpreter's architecture, and the launches that it made."""
    with Counting(lambda: "rest", where=INTERPRETED) as counting:
        run()
    with use_backend("triton"), counted() as made:
        run()
    return counting.costs, made.launches


def agree(cost: Cost, launches: list[tuple[str, Any]], addends: int = 0) -> None:
    """Launches and bytes are equal; ``addends`` are bytes that library products read back."""
    assert cost.launches == len(launches)
    assert cost.read == sum(t.read for _, t in launches) + addends
    assert cost.written == sum(t.written for _, t in launches)


@pytest.mark.parametrize("kind", ["plain", "bias", "mixed", "overlapping", "separate", "dropout"])
@pytest.mark.parametrize(
    ("M", "K", "N", "R", "blocks"), [(40, 48, 32, 7, 1), (35, 600, 70, 33, 1), (40, 96, 64, 28, 4)]
)
def test_a_layer_forward_and_backward(counted: Any, kind: str, M: int, K: int, N: int, R: int, blocks: int) -> None:
    call = Call(M, K, N, R, kind, blocks)

    def run() -> None:
        y = svd_linear(call.x, call.weight, call.bias, *call.masters, call.mask, **call.options)
        wanted = (call.x, *call.masters) if kind != "separate" else (call.x,)
        torch.autograd.grad(y, wanted, torch.ones_like(y))

    costs, launches = both(counted, run)
    # The form of this architecture is the library's product, which the interpreter does not see. Rows in both ranges are walked, and
    # counted, once for each in the pass over x; the interpreter tells addresses apart, not programs.
    twice = 2 * (M - M // 5) * (K + blocks * padded_rank(R // blocks)) if kind == "overlapping" else 0
    agree(costs[ADAPTER], launches, addends=2 * (M * N + M * K) + twice)
    product = Cost(2, 2 * (M * K + 2 * N * K + M * N), 2 * (M * N + M * K), 4 * M * N * K)
    assert costs[BASE] == product


@pytest.mark.parametrize(("R", "blocks"), [(7, 1), (12, 4)])
def test_an_update_of_a_base_that_runs_itself(counted: Any, R: int, blocks: int) -> None:
    call = Call(40, 48, 32, R, "plain", blocks)

    def run() -> None:
        y = svd_update(torch.zeros(40, 32, dtype=torch.float16), call.x, *call.masters, call.mask)
        torch.autograd.grad(y, (call.x, *call.masters), torch.ones_like(y))

    costs, launches = both(counted, run)
    agree(costs[ADAPTER], launches)


@pytest.mark.parametrize("mixed", [False, True])
def test_layers_of_one_input(counted: Any, mixed: bool) -> None:
    x, Qs = draw(40, 300).half(), [draw(r, 300).requires_grad_() for r in (7, 0, 16, 5, 4)]
    options: dict[str, Any] = {}
    if mixed:
        factor = torch.full((5,), 0.5)
        options = {"alpha": factor, "path_weight": factor.clone(), "train_groups": 4, "path_start": 4}
        options["path_Qs"] = [torch.zeros_like(Q) for Q in Qs]

    def run() -> None:
        S = svd_project(x, Qs, **options)
        torch.autograd.grad(S, Qs, [torch.ones_like(s) for s in S])

    costs, launches = both(counted, run)
    agree(costs[ADAPTER], launches)


def test_a_layer_that_is_given_its_S(counted: Any) -> None:
    call = Call(40, 48, 32, 7, "plain")

    def run() -> None:
        (S,) = svd_project(call.x, [call.masters[2]])
        y = svd_linear(call.x, call.weight, None, *call.masters, call.mask, S=S)
        torch.autograd.grad(y, (call.x, *call.masters), torch.ones_like(y))

    costs, launches = both(counted, run)
    agree(costs[ADAPTER], launches, addends=2 * (40 * 32 + 40 * 48))


def test_scores_orthogonality_and_allocation(counted: Any) -> None:
    weight, path, grad = draw(400), draw(400), draw(400)
    mean, deviation = torch.zeros(400), torch.zeros(400)
    regions, groups = [0, 12, 30, 360, 40, 1], [0, 3, 4, 30]
    scores, layer = draw(50), torch.arange(50) // 10

    def run() -> None:
        importance_update(weight, path, mean, deviation, regions)
        orthogonality_grad_(weight, grad, groups, 0.1)
        allocate_triplets(scores, torch.tensor(20), layer, min_rank=1)

    costs, launches = both(counted, run)
    agree(costs["scores"], launches[:2])
    agree(costs["orthogonality"], launches[2:5])
    agree(costs["allocation"], launches[5:])
