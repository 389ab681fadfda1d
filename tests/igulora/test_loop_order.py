"""A training loop that calls things in another order, or calls backward itself, is told so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import igulora


def trained(**options: object) -> tuple[nn.Module, igulora.Controller, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    config = igulora.IGUConfig(**{"r": 3, "total_steps": 40, "window": 2, "ig_every": 1, **options})
    igulora.adapt(model, config)
    return model, igulora.Controller(model), torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize("options", [{"method": "adalora"}, {"estimator": "instantaneous"}])
def test_zero_grad_before_step(options: dict[str, object]) -> None:
    """Scores would be made of zeros."""
    model, ctl, opt = trained(**options)
    ctl.backward(lambda x: loss_of(model, x), torch.randn(4, 5))
    opt.step()
    opt.zero_grad()
    with pytest.raises(ValueError, match="gradients in ctl.step.*before optimizer.zero_grad"):
        ctl.step()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"estimator": "gauss"}, r"expected ctl.backward\(loss_fn, batch\) for estimator='gauss'"),
        ({"method": "adalora"}, r"expected ctl.regularise\(\) between"),
        ({"method": "random", "orthogonality": 0.1}, r"expected ctl.regularise\(\) between"),
    ],
)
def test_a_backward_of_the_users_own(options: dict[str, object], match: str) -> None:
    model, ctl, opt = trained(**options)
    loss_of(model, torch.randn(4, 5)).backward()
    opt.step()
    with pytest.raises(ValueError, match=match):
        ctl.step()


@pytest.mark.parametrize(
    "options", [{"method": "adalora"}, {"method": "random"}, {"method": "adalora", "orthogonality": 0.0}]
)
def test_a_backward_of_the_users_own_with_the_penalty_is_the_same_run(options: dict[str, object]) -> None:
    weights = []
    for own in (False, True):
        model, ctl, opt = trained(**options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(30):
            x = torch.randn(4, 5, generator=generator)
            if own:
                loss_of(model, x).backward()
                ctl.regularise()
            else:
                ctl.backward(lambda x, m=model: loss_of(m, x), x)
            opt.step()
            ctl.step()
            opt.zero_grad()
        weights.append(ctl.bank.weight.clone())
    assert torch.equal(weights[0], weights[1])


def refused_in_the_end(step: Callable[[], None], match: str) -> None:
    """A single step may be left out (by a loss scaler); eight in a row are a mistake."""
    for _ in range(7):
        step()
    with pytest.raises(ValueError, match=match):
        step()


ESTIMATORS = [{"estimator": "gauss"}, {"estimator": "on-path"}, {"method": "adalora"}, {"method": "random"}]


@pytest.mark.parametrize("options", ESTIMATORS)
def test_an_optimizer_that_never_steps(options: dict[str, object]) -> None:
    model, ctl, opt = trained(**options)

    def step() -> None:
        ctl.backward(lambda x: loss_of(model, x), torch.randn(4, 5))
        ctl.step()
        opt.zero_grad()

    refused_in_the_end(step, r"optimizer.step\(\) to change adapters in 8 steps .* though there are gradients")


@pytest.mark.parametrize("options", [{"estimator": "gauss"}, {"estimator": "on-path"}, {"method": "magnitude"}])
def test_zero_grad_before_optimizer_step(options: dict[str, object]) -> None:
    model, ctl, opt = trained(**options)

    def step() -> None:
        ctl.backward(lambda x: loss_of(model, x), torch.randn(4, 5))
        opt.zero_grad()
        opt.step()
        ctl.step()

    refused_in_the_end(step, r"no gradients for it: call optimizer.zero_grad\(\) last")


def test_an_optimizer_of_other_parameters() -> None:
    model, ctl, _ = trained()
    opt = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)

    def step() -> None:
        ctl.backward(lambda x: loss_of(model, x), torch.randn(4, 5))
        opt.step()
        ctl.step()

    refused_in_the_end(step, "with an optimizer that holds the adapters' parameters")


class PastTheCount:
    """An optimizer whose writes PyTorch does not count."""

    def __init__(self, model: nn.Module) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]

    def step(self) -> None:
        for p in self.params:
            p.data.add_(p.grad, alpha=-0.1)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "one by one": lambda m: torch.optim.AdamW(igulora.param_groups(m, lr=1e-2), foreach=False),
    "foreach": lambda m: torch.optim.AdamW(igulora.param_groups(m, lr=1e-2), foreach=True),
    "fused": lambda m: torch.optim.AdamW(igulora.param_groups(m, lr=1e-2), fused=True),
    "past PyTorch's count": PastTheCount,
    "some parameters": lambda m: torch.optim.SGD([m[0].lora_P, m[0].lora_Q], lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_every_kind_are_seen_to_step(name: str) -> None:
    model, ctl, _ = trained(init_lambda=0.5)
    opt = OPTIMIZERS[name](model)
    for step in range(40):
        if step == 20:
            model, ctl = copy.deepcopy((model, ctl))
            opt = OPTIMIZERS[name](model)
        ctl.backward(lambda x, m=model: loss_of(m, x), torch.randn(4, 5))
        opt.step()
        ctl.step()
        opt.zero_grad()


def test_steps_that_a_loss_scaler_leaves_out_are_no_error() -> None:
    """Its first scale is often far too high; the weights stand still meanwhile."""
    model, ctl, opt = trained(estimator="gauss")
    for step in range(20):
        factor = float("inf") if step < 14 else 1.0
        ctl.backward(lambda x, m=model: loss_of(m, x), torch.randn(4, 5), scale=factor)
        if step >= 14:
            opt.step()
        ctl.step()
        opt.zero_grad()
    assert ctl.global_step == 20
