"""Exact resume: a run is interrupted between any two of its calls, and what follows is the uninterrupted run, bit by bit."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import igulora
from igulora import find_bank
from igulora.checkpoint import load_checkpoint, save_checkpoint

# A loop resumed between optimizer.step() and scheduler.step() looks to PyTorch as if it called them in the wrong order.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")

SMALL = {"total_steps": 18, "t_init": 7, "t_final": 5, "delta_t": 2, "window": 2}
Optimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def adamw(**options: Any) -> Optimizer:
    return lambda groups: torch.optim.AdamW(groups, **options)


def adamw_with_tensor_rates(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Learning rates as compiled and captured steps want them."""
    for group in groups:
        group["lr"] = torch.tensor(group["lr"])
    return torch.optim.AdamW(groups, foreach=False)


# Options of the method; "optimizer", "accumulation", "compact" (a step after which the model is compacted) and "every" (interrupt at each
# n-th call only) are the loop's.
VARIANTS: dict[str, dict[str, Any]] = {
    "gauss, mixed": {"modules_to_save": ["head"], "every": 1},
    "gauss, separate": {"path_pass": "separate", "optimizer": adamw(fused=True)},
    "stratified, accumulation": {"estimator": "stratified", "window": 4, "t_init": 8, "accumulation": 3, "every": 2},
    "trapezoid, absolute": {"estimator": "trapezoid", "nodes": 5, "aggregate": "absolute", "window": 3, "t_init": 10},
    "on-path, parameters": {"estimator": "on-path", "budget_unit": "parameters", "optimizer": adamw(foreach=True)},
    "on-path-stratified, hard": {"estimator": "on-path-stratified", "prune": "hard", "min_rank": 1},
    "instantaneous, accumulation": {
        "estimator": "instantaneous", "window": 3, "t_init": 10, "accumulation": 2, "optimizer": adamw(amsgrad=True),
    },
    "adalora, sgd": {
        "method": "adalora", "window": 1, "orthogonality": 0.1,
        "optimizer": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    },
    "adafactor": {"optimizer": lambda groups: torch.optim.Adafactor(groups), "path": "factors"},
    "tensor learning rates": {"optimizer": adamw_with_tensor_rates, "include_f0": True, "estimator": "trapezoid"},
    "compacted in the final phase": {"compact": 15, "every": 3},
    "compacted while pruning": {"compact": 11, "prune": "hard", "orthogonality": 0.1, "modules_to_save": ["head"]},
    "random": {"method": "random", "prune": "hard", "optimizer": lambda groups: torch.optim.RMSprop(groups)},
    "magnitude": {"method": "magnitude", "orthogonality": 0.1},
    "lora": {"method": "lora"},
}  # fmt: skip


class Loop:
    """A training loop as a list of calls, any of which it can start with."""

    def __init__(self, net: Any, config: Any, batches: Any, variant: dict[str, Any]) -> None:
        self.own = {key: variant.get(key) for key in ("optimizer", "accumulation", "compact")}
        names = {key for key in variant if key not in ("every", *self.own)}
        self.config = config(**{**SMALL, "dropout": 0.2, **{key: variant[key] for key in names}})
        self.net = net
        self.accumulation = self.own["accumulation"] or 1
        self.data = batches(SMALL["total_steps"] * self.accumulation)
        self.calls: list[tuple[str, int]] = []
        for step in range(SMALL["total_steps"]):
            self.calls += [("backward", step * self.accumulation + k) for k in range(self.accumulation)]
            self.calls += [("optimizer", step), ("controller", step), ("zero_grad", step)]
            if step == self.own["compact"]:
                self.calls.append(("compact", step))
        self.losses: dict[int, float] = {}

    def start(self, model: nn.Module | None = None) -> Loop:
        """Build the run, on a model that is adapted already if one is given."""
        self.model = model if model is not None else igulora.adapt(self.net(), self.config)
        self.controller = igulora.Controller(self.model, accumulation_steps=self.accumulation, trace=["first"])
        groups = igulora.param_groups(self.model, lr=1e-2, lambda_lr_ratio=10.0)
        self.optimizer = (self.own["optimizer"] or adamw())(groups)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=18)
        return self

    def loss(self, batch: Any) -> torch.Tensor:
        """A loss that draws from every generator there is."""
        noise = random.random() + float(np.random.rand()) + random.gauss(0, 1) + float(np.random.randn())
        x = batch[0] + 0.01 * torch.rand(())
        return (self.model(x) - batch[1]).square().mean() * (1 + 0.01 * math.tanh(noise))

    def call(self, at: int) -> None:
        kind, index = self.calls[at]
        if kind == "backward":
            self.losses[at] = float(self.controller.backward(self.loss, self.data[index]))
        elif kind == "optimizer":
            self.optimizer.step()
        elif kind == "controller":
            self.controller.step()
        elif kind == "zero_grad":
            self.optimizer.zero_grad()
            self.scheduler.step()
        else:
            igulora.compact(self.model, self.optimizer, self.controller)

    def save(self, folder: Path) -> None:
        extra = {"scheduler": self.scheduler.state_dict()}
        save_checkpoint(folder, self.model, self.optimizer, self.controller, extra)

    def resume(self, folder: Path, compacted: bool) -> Loop:
        self.start(igulora.load_adapter(self.net(), folder) if compacted else None)
        extra = load_checkpoint(folder, self.model, self.optimizer, self.controller)
        self.scheduler.load_state_dict(extra["scheduler"])
        return self

    def state(self) -> dict[str, Any]:
        """Weights, masks, scores and optimizer as they are."""
        found: dict[str, Any] = dict(self.model.state_dict())
        found |= {"live": find_bank(self.model).live, "mean": self.controller.importance.mean}
        found |= {"deviation": self.controller.importance.deviation, "terms": self.controller.importance.terms}
        for i, entries in self.optimizer.state_dict()["state"].items():
            found |= {f"{i}.{key}": value for key, value in entries.items()}
        found = {key: value.clone() for key, value in found.items() if isinstance(value, torch.Tensor)}
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return found | {"history": self.controller.history, "series": repr(self.controller.series), "rates": rates}


def scramble(seed: int) -> None:
    """What another process has drawn before it resumes."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def check_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert same, key


@pytest.mark.parametrize("name", list(VARIANTS))
def test_any_interruption_is_resumed_bit_by_bit(net, config, batches, tmp_path, monkeypatch, name) -> None:
    """Each resumed run goes on for two steps, those of the final phase to the end; states are compared, so the rest follows."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of checkpoints, and nothing pulls the plug
    variant = VARIANTS[name]
    whole = Loop(net, config, batches, variant)
    scramble(1)
    whole.start()
    ends = {}
    compacted_at = len(whole.calls)
    for at, (kind, _) in enumerate(whole.calls):
        whole.save(tmp_path / str(at))
        whole.call(at)
        ends[at] = whole.state()
        if kind == "compact":
            compacted_at = at
    # Every kind of call comes up: the stride and the number of calls in a step have no common factor.
    stride = variant.get("every", 7 if whole.accumulation != 4 else 5)
    for at in range(0, len(whole.calls), stride):
        scramble(at + 100)
        again = Loop(net, config, batches, variant).resume(tmp_path / str(at), compacted=at > compacted_at)
        last = min(at + 2 * (whole.accumulation + 3), len(whole.calls) - 1)
        for i in range(at, last + 1):
            again.call(i)
        assert again.losses == {i: loss for i, loss in whole.losses.items() if at <= i <= last}, (name, at)
        check_same(again.state(), ends[last])


def test_loading_into_a_run_that_was_under_way_leaves_nothing_of_it(net, config, batches, tmp_path) -> None:
    loop = Loop(net, config, batches, {"window": 4, "t_init": 8, "accumulation": 3, "aggregate": "absolute"}).start()
    scramble(3)
    for at in range(10):
        loop.call(at)
    loop.save(tmp_path / "c")
    for at in range(10, 20):
        loop.call(at)
    wanted = loop.state()
    for at in range(20, 31):  # ends inside an accumulation
        loop.call(at)
    load_checkpoint(tmp_path / "c", loop.model, loop.optimizer, loop.controller)
    loop.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, T_max=18)
    extra = load_checkpoint(tmp_path / "c", loop.model, loop.optimizer, loop.controller)
    loop.scheduler.load_state_dict(extra["scheduler"])
    for at in range(10, 20):
        loop.call(at)
    check_same(loop.state(), wanted)


class Odd(torch.optim.SGD):
    """Keeps what optimizers of others keep: numbers, None, nested dicts, tensors of other shapes, and a value in its groups."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["odd"] = (0.5, [math.inf, None], {"a": {1: torch.ones(2)}})
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["nested"] = {"codes": torch.arange(3, dtype=torch.uint8), 2: (None, -math.inf), "2": "x"}


def test_optimizer_states_that_are_no_tensors_come_back(net, config, trainer, run, batches, tmp_path) -> None:
    model, controller, _ = trainer(net(), config())
    groups = igulora.param_groups(model, lr=1e-2)
    optimizer = Odd(groups, momentum=0.9)
    run(model, controller, optimizer, batches(2))
    save_checkpoint(tmp_path, model, optimizer, controller)
    other = Odd(igulora.param_groups(model, lr=1.0), momentum=0.1)
    load_checkpoint(tmp_path, model, other, controller)
    assert repr(other.state_dict()) == repr(optimizer.state_dict())
    assert other.param_groups[0]["odd"][1] == [math.inf, None]
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])
    optimizer.param_groups[0]["hook"] = print
    with pytest.raises(TypeError, match=r"expected the optimizer's groups.0.hook to hold .* got builtin_function"):
        save_checkpoint(tmp_path, model, optimizer, controller)
    assert load_checkpoint(tmp_path, model, other, controller) == {}


EXTRA = {
    "float": 0.1, "nan": math.nan, "inf": -math.inf, "tuple": (1, (2.5, "x")), "keys": {1: "one", "1": "text", (2, 3): None},
    "$odd": {"$tuple": 1}, "empty": [[], {}, ()], "numpy": np.float32(0.1), "large": 2**70,
}  # fmt: skip


def test_extra_values_come_back_as_they_were(net, config, trainer, tmp_path) -> None:
    model, controller, optimizer = trainer(net(), config())
    save_checkpoint(tmp_path, model, optimizer, controller, {**EXTRA, "tensor": torch.arange(3)})
    back = load_checkpoint(tmp_path, model, optimizer, controller)
    assert torch.equal(back.pop("tensor"), torch.arange(3))
    assert repr(back) == repr({**EXTRA, "numpy": float(np.float32(0.1))})
    for value, found in (({"f": print}, "builtin"), ({"a": [object()]}, "object"), ({"s": {1}}, "set")):
        with pytest.raises(TypeError, match=rf"expected extra\.\S+ to hold None, numbers, .* got {found}"):
            save_checkpoint(tmp_path, model, optimizer, controller, value)


OTHERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], str]] = {
    "another kind": (lambda groups: torch.optim.Adam(groups), "'AdamW', got Adam; build the same"),
    "other groups": (lambda groups: torch.optim.AdamW(groups[:1]), "parameter groups"),
    "another order": (
        lambda groups: torch.optim.AdamW([{**g, "params": g["params"][::-1]} for g in groups]), "in their order, got others",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OTHERS))
def test_the_state_of_another_optimizer_is_refused(net, config, trainer, run, batches, tmp_path, name) -> None:
    model, controller, optimizer = trainer(net(), config())
    run(model, controller, optimizer, batches(1))
    save_checkpoint(tmp_path, model, optimizer, controller)
    make, match = OTHERS[name]
    with pytest.raises(ValueError, match=match):
        load_checkpoint(tmp_path, model, make(igulora.param_groups(model, lr=1e-2)), controller)


def test_other_options_are_named(net, config, trainer, tmp_path) -> None:
    model, controller, optimizer = trainer(net(), config())
    save_checkpoint(tmp_path, model, optimizer, controller)
    other, again, opt = trainer(net(), config(total_steps=30, beta1=0.5))
    with pytest.raises(ValueError, match=r"others \(total_steps: 20 then, 30 now; beta1: 0.85 then, 0.5 now\)"):
        load_checkpoint(tmp_path, other, opt, again)
    other, again, opt = trainer(net(), config(recompute_inputs=True))
    load_checkpoint(tmp_path, other, opt, again)
