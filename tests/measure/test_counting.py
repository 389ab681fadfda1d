"""Counting by part, what stays on the host, and waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from igulora.kernels import svd_linear
from igulora.measure.counting import Counting


def layer(device: str = "cpu") -> dict[str, torch.Tensor]:
    """Operands of an adapted layer of 12 to 20 features and rank 4."""
    shapes = {"weight": (20, 12), "P": (4, 20), "E": (4,), "Q": (4, 12), "mask": (4,)}
    made = {name: torch.ones(shape, device=device) for name, shape in shapes.items()}
    return {name: t.requires_grad_(name in "PEQ") for name, t in made.items()}


def test_parts() -> None:
    now = "one"
    x = torch.ones(3, 3)
    with Counting(lambda: now) as counting:
        x @ x
        now = "two"
        y = x + 1
        y.sum().item()
    assert {name: cost.launches for name, cost in counting.costs.items()} == {"one": 1, "two": 2}
    assert counting.costs["one"].flops == 2 * 27
    assert counting.costs["two"].moved == 36 + 36 + 36 + 4
    assert counting.syncs == {"aten::_local_scalar_dense": 1}
    assert counting.syncs_by_part == {"two": 1}
    assert counting.total.launches == 3


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_has_a_share_in_two_parts(device: str) -> None:
    pytest.importorskip("triton")
    a = layer(device)
    x = torch.ones(6, 12, device=device, requires_grad=True)
    counts = {}
    for now in ("adapter products", "path pass"):
        with Counting(lambda now=now: now, device=device) as counting:
            svd_linear(x, a["weight"], None, a["P"], a["E"], a["Q"], a["mask"])
        assert counting.launches == {"igulora::svd_linear_fwd": 1}
        counts[now] = counting.costs
    assert counts["adapter products"]["base products"].flops == 2 * 6 * 12 * 20
    assert counts["adapter products"]["adapter products"].flops == 2 * 6 * 4 * (12 + 20)
    assert list(counts["path pass"]) == ["path pass"]
    assert counts["path pass"]["path pass"] == sum(counts["adapter products"].values(), type(counting.total)())
    with Counting(device=device) as whole:
        svd_linear(x, a["weight"], None, a["P"], a["E"], a["Q"], a["mask"])
    assert whole.costs == {"step": counts["path pass"]["path pass"]}


def test_host_methods_are_waits() -> None:
    on_device = torch.ones(4)
    with Counting() as counting:
        drawn = torch.rand(4, generator=torch.Generator())
        drawn.tolist()
        (drawn * 2).numpy()
        on_device.tolist()
        on_device.cpu()
    assert counting.syncs == {"Tensor.tolist": 1, "Tensor.cpu": 1}
    assert not counting.launches


def test_what_cpu_tensors_give_on_another_device_stays_on_the_host() -> None:
    on_device = torch.ones(4, device="meta")
    with Counting(device="meta") as counting:
        host = torch.tensor([1.0, 2.0, 3.0, 4.0]) + 1
        host.tolist()
        moved = host.to("meta")
        assert moved.is_meta
        on_device.mul_(moved)
    assert counting.launches == {"aten::mul_": 1}
    assert not counting.syncs


def test_the_meta_device_counts_what_the_cpu_counts() -> None:
    def step(device: str) -> Counting:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 11)).to(
            device
        )
        tokens = torch.zeros(2, 5, dtype=torch.int64, device=device)
        with Counting(device=device) as counting:
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        return counting

    real, meta = step("cpu"), step("meta")
    assert real.launches == meta.launches
    assert real.costs == meta.costs
