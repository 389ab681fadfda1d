"""Ten training steps through the Triton kernels are those through the references: losses, parameters, scores and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import igulora
from igulora.kernels.backend import use_backend

pytest.importorskip("triton")

STEPS, BATCH, LENGTH, WIDTH = 10, 4, 3, 12
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Block(nn.Module):
    """Two layers that share their input, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 20, bias=bias) for bias in (True, False))
        self.down_proj = nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass
class Trajectory:
    """What is compared, step by step."""

    losses: list[float]
    weights: list[Tensor]
    means: list[Tensor]
    deviations: list[Tensor]
    live: list[Tensor]


def train(backend: str, **options: Any) -> Trajectory:
    """Train on batches that are always the same ones."""
    torch.manual_seed(0)
    model = Block().to(DEVICE)
    fields: dict[str, Any] = {"window": 2, "t_init": 6, "t_final": 1, "delta_t": 1, "ig_every": 1, "ig_fraction": 0.5}
    config = igulora.IGUConfig(r=5, target_rank=3, total_steps=STEPS, **{**fields, **options})
    result = Trajectory([], [], [], [], [])
    with use_backend(backend):
        igulora.adapt(model, config)
        bank = igulora.find_bank(model)
        with torch.no_grad():
            # As after some training. At the start the orthogonality gradient is rounding alone (its penalty is a norm, and P and Q are
            # orthonormal), and where a gradient is rounding alone, Adam's step turns on its sign.
            bank.weight += 0.2 * torch.randn(bank.weight.shape).to(DEVICE)
            bank.lambdas.copy_(torch.randn(bank.triplets))
        optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))
        controller = igulora.Controller(model)
        for _ in range(STEPS):
            batch = (torch.randn(BATCH, LENGTH, WIDTH).to(DEVICE), torch.randn(BATCH, LENGTH, WIDTH).to(DEVICE))
            loss = controller.backward(lambda b: (model(b[0]) - b[1]).square().mean(), batch)
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            result.losses.append(float(loss))
            result.weights.append(bank.weight.cpu().clone())
            result.means.append(controller.importance.mean.cpu().clone())
            result.deviations.append(controller.importance.deviation.cpu().clone())
            result.live.append(bank.live.cpu().clone())
    return result


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("gauss", {"dropout": 0.2, "nodes": 2}),
        pytest.param("gauss", {"path_pass": "separate", "nodes": 2}, marks=pytest.mark.long),
        pytest.param("stratified", {"orthogonality": 0.0, "aggregate": "absolute"}, marks=pytest.mark.long),
        pytest.param("stratified", {"path_pass": "separate", "path": "factors"}, marks=pytest.mark.long),
        pytest.param("trapezoid", {"nodes": 3, "include_f0": True}, marks=pytest.mark.long),
        ("trapezoid", {"nodes": 3, "path_pass": "separate"}),
        pytest.param("on-path", {}, marks=pytest.mark.long),
        ("on-path-stratified", {"dropout": 0.2}),
        ("instantaneous", {}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_the_kernels_train_as_the_references_do(estimator: str, options: dict[str, Any]) -> None:
    ours, theirs = (train(backend, estimator=estimator, **options) for backend in ("triton", "reference"))
    assert not all(live.all() for live in theirs.live)  # ranks were pruned on the way
    for step in range(STEPS):
        assert torch.equal(ours.live[step], theirs.live[step]), f"masks after step {step}"
        for name in ("losses", "weights", "means", "deviations"):
            got, wanted = getattr(ours, name)[step], getattr(theirs, name)[step]
            torch.testing.assert_close(
                got, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, n=name, s=step: f"{n} after step {s}: {m}"
            )
