"""Which part an operator belongs to, forward and backward, and that nothing stays hooked."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import igulora
from igulora.context import PathContext
from igulora.controller import Controller
from igulora.measure.parts import ADAPTER, BASE, OPTIMIZER, ORTHOGONALITY, PARTS, PATH, REST, PartTracker, State, part
from igulora.measure.parts import split as split_amount


class Seen(TorchDispatchMode):
    """Parts of the operators that ran, by name."""

    def __init__(self, tracker: PartTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.found: list[tuple[str, State]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append((func._schema.name, self.tracker.state()))
        return func(*args, **(kwargs or {}))

    def parts_of(self, name: str) -> Counter[str]:
        """How often an operator ran in each part."""
        return Counter(state.part for operator, state in self.found if operator == name)


class LoraLinear(nn.Module):
    """An adapter in PEFT's form: a base layer, and two products beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class OwnWeight(nn.Module):
    """An adapter beside a frozen weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(2, 6))
        self.lora_B = nn.Parameter(torch.randn(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + x @ self.lora_A.t() @ self.lora_B.t()


def lora_net() -> nn.Sequential:
    """Two adapted layers, an activation and a trained head."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).requires_grad_(False)
    net[0], net[2] = LoraLinear(net[0], 2), LoraLinear(net[2], 2)
    net[3].requires_grad_(True)
    return net


def test_forward_and_backward_of_a_layer() -> None:
    net, x = lora_net(), torch.randn(5, 6)
    with PartTracker(net) as tracker, Seen(tracker) as seen:
        net(x).sum().backward()
    # Base: two forwards and one input gradient. Adapters: two products each; their backwards two each, but the first layer's input.
    assert seen.parts_of("aten::addmm") == {BASE: 2, REST: 1}
    assert seen.parts_of("aten::mm") == {BASE: 1, ADAPTER: 4 + 7, REST: 2}
    assert seen.parts_of("aten::tanh") == seen.parts_of("aten::tanh_backward") == {REST: 1}
    # Gradients of the adapters are theirs, those of the head are not.
    assert seen.parts_of("aten::detach")[ADAPTER] == 4
    assert seen.parts_of("aten::detach")[REST] >= 2


def test_a_frozen_weight_of_the_layers_own_is_a_base_product() -> None:
    net = nn.Sequential(OwnWeight(), OwnWeight())
    with PartTracker(net) as tracker, Seen(tracker) as seen:
        net(torch.randn(5, 6)).sum().backward()
    assert seen.parts_of("aten::mm") == {BASE: 2 + 1, ADAPTER: 4 + 7}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_keep_their_parts(reentrant: bool) -> None:
    net, x = lora_net(), torch.randn(5, 6, requires_grad=True)
    with PartTracker(net) as tracker, Seen(tracker) as seen:
        checkpoint(net, x, use_reentrant=reentrant).sum().backward()
    assert seen.parts_of("aten::addmm") == {BASE: 4, REST: 2 if reentrant else 1}
    assert seen.parts_of("aten::tanh") == {REST: 2}
    assert seen.parts_of("aten::mm")[BASE] == 2
    assert tracker.current() == REST


def test_a_step_of_ours(net, config, trainer, batches, loss_of) -> None:
    model, controller, optimizer = trainer(net(), config(estimator="instantaneous", window=1, orthogonality=0.1))
    with PartTracker(model) as tracker, Seen(tracker) as seen:
        for batch in batches(8):
            controller.backward(loss_of(model), batch)
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
    expected = {
        "igulora::svd_linear_fwd": ADAPTER,
        "igulora::svd_linear_bwd": ADAPTER,
        "igulora::orthogonality_grad_": ORTHOGONALITY,
        "igulora::importance_update": "scores",
        "igulora::allocate_triplets": "allocation",
        "aten::tanh_backward": REST,
        "aten::addcdiv_": OPTIMIZER,
    }
    for name, where in expected.items():
        assert set(seen.parts_of(name)) == {where}, name


def test_a_separate_path_pass_is_all_path_pass(net, config, trainer, batches, loss_of) -> None:
    model, controller, _ = trainer(net(), config(path_pass="separate", estimator="gauss"))
    with PartTracker(model) as tracker, Seen(tracker) as seen:
        controller.backward(loss_of(model), batches(1)[0])
    for name in ("igulora::svd_linear_fwd", "igulora::svd_linear_bwd"):
        assert seen.parts_of(name) == {ADAPTER: 4, PATH: 4}
    assert set(seen.parts_of("aten::tanh_backward")) == {REST, PATH}


def test_path_rows_have_their_share_of_a_mixed_batch(net, config, trainer, batches, loss_of) -> None:
    options = {"path_pass": "mixed", "estimator": "gauss", "ig_fraction": 0.5}
    model, controller, optimizer = trainer(net(), config(**options), loss_terms=lambda batch: torch.ones(6))
    for batch in batches(2):  # the first compares the losses of the parts
        with PartTracker(model) as tracker, Seen(tracker) as seen:
            controller.backward(loss_of(model), batch)
        optimizer.zero_grad()
        controller.step()
    for name in ("igulora::svd_linear_fwd", "igulora::svd_linear_bwd", "aten::tanh_backward"):
        states = {state for operator, state in seen.found if operator == name}
        assert states == {State(REST if "tanh" in name else ADAPTER, 3 / 9)}


def test_marks_of_a_loop_of_ones_own() -> None:
    net = lora_net()
    with part("scores"):  # no tracker: nothing happens
        pass
    with PartTracker(net) as tracker, Seen(tracker) as seen:
        with part("orthogonality"):
            penalty = net[0].lora_A.weight.square().sum()
        (net(torch.randn(5, 6)).sum() + penalty).backward()
    assert seen.parts_of("aten::pow")[ORTHOGONALITY] >= 2  # forward and backward
    assert REST not in seen.parts_of("aten::pow")


def test_an_unknown_part_suggests_the_nearest() -> None:
    with (
        pytest.raises(ValueError, match="expected part to be one of base products.*Did you mean 'optimizer'"),
        part("optimiser"),
    ):
        pass


def test_nothing_stays_hooked(net, config) -> None:
    kept = {name: vars(owner)[name] for owner, name in ((PathContext, "at"), (Controller, "step"), (F, "linear"))}
    kept["zero_grad"] = torch.optim.Optimizer.zero_grad
    model = igulora.adapt(net(), config())
    tracker = PartTracker(model)

    def breaks() -> None:
        with tracker:
            assert vars(Controller)["step"] is not kept["step"]
            tracker.open(ADAPTER, "nobody closes it")
            raise RuntimeError("a step that fails")

    with pytest.raises(RuntimeError, match="a step that fails"):
        breaks()
    assert vars(PathContext)["at"] is kept["at"]
    assert vars(Controller)["step"] is kept["step"]
    assert F.linear is kept["linear"]
    assert torch.optim.Optimizer.zero_grad is kept["zero_grad"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert tracker.current() == REST


def test_a_compiled_model_is_refused_and_nothing_stays_hooked() -> None:
    net = lora_net()
    compiled = nn.Sequential(torch.compile(net, backend="eager"))
    step = vars(Controller)["step"]
    with (
        pytest.raises(ValueError, match=r"got a compiled one \(0\); profile it before torch.compile"),
        PartTracker(compiled),
    ):
        pass
    assert vars(Controller)["step"] is step


def test_an_optimizer_of_another_make() -> None:
    class Descent:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.parameters = parameters

        @torch.no_grad()
        def step(self) -> None:
            for p in self.parameters:
                p.sub_(p.grad, alpha=0.1)

    net = lora_net()
    optimizer = Descent([net[3].weight])
    with PartTracker(net, optimizer) as tracker, Seen(tracker) as seen:
        net(torch.randn(5, 6)).sum().backward()
        optimizer.step()
    assert seen.parts_of("aten::sub_") == {OPTIMIZER: 1}
    assert "step" not in vars(optimizer)


def test_shares_add_up() -> None:
    assert dict(split_amount(10.0, State(BASE, 0.25))) == {BASE: 7.5, PATH: 2.5}
    assert dict(split_amount(10.0, State(PATH, 1.0))) == {PATH: 10.0}
    assert dict(split_amount(10.0, State(OPTIMIZER))) == {OPTIMIZER: 10.0}
    assert len(set(PARTS)) == 8
