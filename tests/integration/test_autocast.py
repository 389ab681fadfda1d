"""Autocast: a float32 model computes in 16 bits as PyTorch's own operators would, and keeps float32 masters, gradients and scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import igulora

from .tiny import Block, End, block_batches, block_loss, train

DTYPES = [torch.bfloat16, torch.float16]


class Written(nn.Module):
    """An adapted layer as one would write it: PyTorch's own operators, which autocast knows."""

    def __init__(self, layer: igulora.FusedSVDLinear, alpha: float) -> None:
        super().__init__()
        self.base, self.alpha, self.coef = layer.base_layer, alpha, layer.scale * layer.mask
        self.P, self.E, self.Q = (nn.Parameter(p.detach().clone()) for p in (layer.lora_P, layer.lora_E, layer.lora_Q))

    def forward(self, x: Tensor) -> Tensor:
        S = nn.functional.linear(x, self.Q)
        return self.base(x) + nn.functional.linear(S * (self.alpha * self.coef * self.E), self.P.t())


def drawn(model: Block) -> Block:
    """Masters that every gradient depends on."""
    igulora.adapt(model, igulora.IGUConfig(method="lora", r=4, target_rank=4, init="orthonormal", init_lambda=0.3))
    return model


def written(model: Block, alpha: float, dtype: torch.dtype) -> dict[str, Written]:
    """The layers of ``model`` replaced by :class:`Written`."""
    layers = {
        n: Written(m, alpha).to(dtype) for n, m in model.named_children() if isinstance(m, igulora.FusedSVDLinear)
    }
    for name, layer in layers.items():
        layer.coef = layer.coef.to(dtype)
        setattr(model, name, layer)
    return layers


def factors(layers: dict[str, Written], factor: float) -> dict[tuple[str, str], Tensor]:
    return {(n, f"lora_{k}"): getattr(m, k).grad * factor for n, m in layers.items() for k in "PEQ"}


def assert_within(ours: dict[Any, Tensor], theirs: dict[Any, Tensor], exact: dict[Any, Tensor]) -> None:
    """Our error against float64 is at most twice that of PyTorch's operators, of all matrices together."""

    def error(found: dict[Any, Tensor]) -> float:
        return sum(float((found[k].double() - exact[k]).square().sum()) for k in exact) ** 0.5

    assert set(ours) == set(theirs) == set(exact)
    assert 0 < error(ours) <= 2 * error(theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.4], ids=["training rows", "path rows"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_within_twice_the_error_of_pytorch(dtype, alpha, recomputed) -> None:
    x, target = block_batches(1, sizes=(16,))[0]
    model = drawn(Block())
    bank = model.igulora_bank
    accumulator = bank.path

    def forward(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False) if recomputed else model(x)

    with torch.autocast("cpu", dtype=dtype):
        if alpha == 1.0:
            loss = block_loss(forward, (x, target))
            loss.backward()
        else:
            with bank.context.at(torch.full((16,), alpha), 0, 0, torch.ones(16)):
                loss = block_loss(forward, (x, target))
                loss.backward()
    ours = {k: v.clone() for k, v in bank.matrix_views(bank.grad if alpha == 1.0 else accumulator).items()}
    assert all(t.dtype == torch.float32 for t in ours.values())
    results = []
    for exactly in (False, True):
        twin = drawn(Block())
        layers = written(twin, alpha, torch.float64 if exactly else torch.float32)
        with torch.autocast("cpu", dtype=dtype, enabled=not exactly):
            batch = (x.double(), target.double()) if exactly else (x, target)
            y = (twin(batch[0]) - batch[1]).to(torch.float64 if exactly else torch.float32)
            y.square().mean().backward()
        results.append(factors(layers, 1.0 / alpha))  # path samples are without the chain rule's factor alpha
    assert_within(ours, *results)


@pytest.mark.parametrize(
    "options", [{}, {"path_pass": "separate"}, {"estimator": "on-path"}], ids=lambda o: "-".join(o.values()) or "mixed"
)
def test_a_whole_schedule_under_autocast_with_checkpointing(config, options) -> None:
    """Recomputation inside autocast changes no bit of a mixed-precision run, which stays near the float32 one until triplets are pruned.

    From then on rounding may decide between two that score alike, and the runs are two runs.
    """

    class Recomputed(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=False))

    def run(model: nn.Module, enabled: bool = True) -> End:
        def loss(forward: Any, batch: Any) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                return block_loss(forward, batch)

        made = config(dropout=0.2, init_lambda=0.3, orthogonality=0.1, ig_fraction=0.5, **options)
        return train(model, made, block_batches(16), loss)

    low = run(Block())
    run(Recomputed()).assert_same_bits(low)
    assert low.weight.dtype == low.mean.dtype == torch.float32
    before = config().t_init
    assert low.losses[:before] == pytest.approx(run(Block(), enabled=False).losses[:before], rel=2e-2)
