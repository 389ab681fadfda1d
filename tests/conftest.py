"""Tiny models and runs that several test files share."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import igulora
from igulora.benchmarks import allocator

# Kernels that a test asks for by name are interpreted where there is no GPU; all other tests run the references.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:  # what somebody tuned on this machine must not decide which kernels are tested
    os.environ["IGULORA_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "igulora-tests")
os.environ.setdefault("IGULORA_BACKEND", "reference")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long") or "long" in config.getoption("-m").split():
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="runs for minutes: --long"))


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_not_collected() -> None:
    """What is alive between two files, the libraries that is, stays out of garbage collections, which would walk over a million objects."""
    gc.collect()
    gc.freeze()


class Net(nn.Module):
    """Four linear layers of three shapes; ``body`` holds two of them, ``head`` comes last and is the narrowest."""

    def __init__(self, seed: int = 0, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(8, 12, bias=bias)
        self.body = nn.ModuleDict({"up": nn.Linear(12, 10, bias=bias), "down": nn.Linear(10, 12, bias=bias)})
        self.head = nn.Linear(12, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + self.body["down"](torch.tanh(self.body["up"](h)))
        return self.head(h)


@pytest.fixture
def net() -> Callable[..., Net]:
    """Class of the tiny model: ``net(seed=0)``."""
    return Net


@pytest.fixture
def config() -> Callable[..., igulora.IGUConfig]:
    """Small options that prune within twenty steps; keyword arguments replace them."""

    def make(**changes: Any) -> igulora.IGUConfig:
        options: dict[str, Any] = {
            "r": 4,
            "target_rank": 2,
            "total_steps": 20,
            "t_init": 7,
            "t_final": 5,
            "delta_t": 2,
            "window": 2,
            "ig_every": 1,
            "init": "orthonormal",
            "orthogonality": 0.0,
        }
        return igulora.IGUConfig(**{**options, **changes})

    return make


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Launches a kernel from autograd's thread, as a loss does: a thread whose first call is one of cuBLAS makes PyTorch warn.
    torch.ones(2, device="cuda", requires_grad=True).exp().sum().backward()
    return torch.device("cuda")


def batches_of(count: int, size: int = 6, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Regression batches (x, target) for :class:`Net`."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 8, generator=g), torch.randn(size, 3, generator=g)) for _ in range(count)]


@pytest.fixture
def batches() -> Callable[..., list[tuple[Tensor, Tensor]]]:
    """``batches(count, size=6, seed=5)``."""
    return batches_of


@pytest.fixture
def loss_of() -> Callable[[nn.Module], Callable[[Any], Tensor]]:
    """``loss_of(model)`` is a loss function of a batch."""

    def make(model: nn.Module) -> Callable[[Any], Tensor]:
        return lambda batch: (model(batch[0]) - batch[1]).square().mean()

    return make


@pytest.fixture
def run(loss_of: Any) -> Callable[..., list[float]]:
    """``run(model, controller, optimizer, batches)`` takes one step per batch and returns the losses."""

    def go(
        model: nn.Module,
        controller: igulora.Controller,
        optimizer: torch.optim.Optimizer,
        batches: Iterable[Any],
        set_to_none: bool = True,
    ) -> list[float]:
        losses = []
        for batch in batches:
            losses.append(float(controller.backward(loss_of(model), batch)))
            optimizer.step()
            controller.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        return losses

    return go


@pytest.fixture
def trainer() -> Callable[..., tuple[nn.Module, igulora.Controller, torch.optim.Optimizer]]:
    """``trainer(model, config)``: the adapted model, its controller and an AdamW with igulora's parameter groups."""

    def make(
        model: nn.Module, config: igulora.IGUConfig, lr: float = 1e-2, **options: Any
    ) -> tuple[nn.Module, igulora.Controller, torch.optim.Optimizer]:
        igulora.adapt(model, config)
        optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=lr, lambda_lr_ratio=10.0))
        return model, igulora.Controller(model, **options), optimizer

    return make


@pytest.fixture(autouse=True)
def _allocator_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that time steps set the process's allocator for good; here one process runs many."""
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda large=True: None)
