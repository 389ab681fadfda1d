"""A training loop that calls things in another order, or calls backward itself, is told so."""

from __future__ import annotations

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
        ({"method": "random"}, r"expected ctl.regularise\(\) between"),
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
