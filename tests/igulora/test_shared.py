"""Layers that read one input share the passes over it, wherever and however the model is run, and change no number by it."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import igulora

D = 12


class Attention(nn.Module):
    """q, k and v of one input, or k and v of another."""

    def __init__(self, dropped: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(D, 8), nn.Linear(D, 8)
        self.v_proj, self.o_proj = nn.Linear(D, 8), nn.Linear(8, D)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q, k, v = self.q_proj(x), self.k_proj(other), self.v_proj(other)
        return x + self.o_proj(torch.tanh(q * k) * v)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(D, 10), nn.Linear(D, 10), nn.Linear(10, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One attention and one gated layer; optionally crossed with a second input, or recomputed in the backward."""

    def __init__(self, crossed: bool = False, recompute: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.mlp = Attention(), Mlp()
        self.crossed, self.recompute = crossed, recompute

    def inner(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(x, x.flip(1) if self.crossed else None))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.recompute)


def adapted(config: Any, block: nn.Module | None = None, *, alone: bool = False, **changes: Any) -> nn.Module:
    model = igulora.adapt(block if block is not None else Block(), config(**changes))
    with torch.no_grad():
        for layer in model.igulora_bank.layers:
            layer.lora_E.fill_(0.5)
    if alone:
        for layer in model.igulora_bank.layers:
            layer.shared = None
    return model


def groups(model: nn.Module) -> set[frozenset[str]]:
    """Names of the members of each group."""
    bank = model.igulora_bank
    of = {id(layer): name for name, layer in zip(bank.names, bank.layers, strict=True)}
    shared = {id(layer.shared): layer.shared for layer in bank.layers if layer.shared is not None}
    return {frozenset(of[id(layer)] for layer in group.layers) for group in shared.values()}


QKV = frozenset(f"attention.{n}_proj" for n in "qkv")
GATE_UP = frozenset({"mlp.gate_proj", "mlp.up_proj"})


def x_of(seed: int = 0) -> Tensor:
    return torch.randn(6, 5, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    y = model(x)
    y.square().sum().backward()
    grads = [p.grad.clone() for layer in model.igulora_bank.layers for p in (layer.lora_P, layer.lora_E, layer.lora_Q)]
    return [y.detach(), *grads]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_groups_are_found_by_structure(config) -> None:
    assert groups(adapted(config)) == {QKV, GATE_UP}
    some = adapted(config, target_modules=["q_proj", "v_proj", "up_proj"])
    assert groups(some) == {frozenset({"attention.q_proj", "attention.v_proj"})}


@pytest.mark.parametrize("recompute", [None, True, False])
@pytest.mark.parametrize("crossed", [False, True])
def test_same_numbers_as_alone(config, crossed: bool, recompute: bool | None) -> None:
    ours = adapted(config, Block(crossed, recompute))
    theirs = adapted(config, Block(crossed, recompute), alone=True)
    for seed in (0, 1):
        assert_same(run(ours, x_of(seed)), run(theirs, x_of(seed)))
        for model in (ours, theirs):
            model.zero_grad()


def test_members_called_with_another_input_leave(config) -> None:
    model = adapted(config, Block(crossed=True))
    with torch.no_grad():
        model(x_of())
        model(x_of())
    assert groups(model) == {frozenset({"attention.k_proj", "attention.v_proj"}), GATE_UP}
    assert model.get_submodule("attention.q_proj").shared is None


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_one_pass_for_a_group_and_one_for_its_gradients(config) -> None:
    model = adapted(config)
    with _Count() as count:
        model(x_of()).sum().backward()
    assert count.names["igulora::svd_project_fwd"] == count.names["igulora::svd_project_bwd"] == 2
    assert count.names["igulora::svd_linear_fwd"] == 7


@pytest.mark.parametrize("estimator", ["gauss", "trapezoid", "on-path", "instantaneous"])
@pytest.mark.parametrize("path_pass", ["mixed", "separate"])
def test_training_is_the_same(config, trainer, estimator: str, path_pass: str) -> None:
    window = {"window": 1} if estimator == "instantaneous" else {}
    results = []
    for alone in (False, True):
        torch.manual_seed(0)
        model, controller, optimizer = trainer(Block(), config(estimator=estimator, path_pass=path_pass, **window))
        if alone:
            for layer in model.igulora_bank.layers:
                layer.shared = None
        losses = []
        for seed in range(9):
            target = torch.zeros(6, 5, D)
            batch = (x_of(seed).detach(), target)
            losses.append(float(controller.backward(lambda b, m=model: (m(b[0]) - b[1]).square().mean(), batch)))
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
        results.append((losses, controller.importance.mean.clone(), model.igulora_bank.live.clone()))
    (ours, ours_mean, ours_live), (theirs, theirs_mean, theirs_live) = results
    assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(ours_mean, theirs_mean, rtol=1e-4, atol=1e-7)
    assert torch.equal(ours_live, theirs_live)


def test_dropout_is_drawn_once_for_a_group_and_again_in_recomputation(config) -> None:
    plain = run(adapted(config, Block(), dropout=0.4), x_of())
    for reentrant in (True, False):
        assert_same(run(adapted(config, Block(recompute=reentrant), dropout=0.4), x_of()), plain)


def test_compiled_without_a_break(config) -> None:
    eager, traced = adapted(config), adapted(config)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    assert_same(run(eager, x_of()), [compiled_run(compiled, traced, x_of()), *gradients(traced)])
    assert groups(traced) == {QKV, GATE_UP}


def compiled_run(compiled: Any, model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    y = compiled(x)
    y.square().sum().backward()
    return y.detach()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for layer in model.igulora_bank.layers for p in (layer.lora_P, layer.lora_E, layer.lora_Q)]


def test_an_interrupted_forward_leaves_a_working_model(config) -> None:
    model, twin = adapted(config), adapted(config, alone=True)
    handle = model.get_submodule("attention.k_proj").register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(MemoryError)
    )
    with pytest.raises(MemoryError):
        model(x_of())
    handle.remove()
    assert_same(run(model, x_of(1)), run(twin, x_of(1)))


def test_copies_and_pickles_group_their_own_layers(config) -> None:
    model = adapted(config)
    model(x_of())
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        igulora.find_bank(twin)
        assert groups(twin) == groups(model)
        mine = {id(layer) for layer in twin.igulora_bank.layers}
        assert all(id(m) in mine for layer in twin.igulora_bank.layers if layer.shared for m in layer.shared.layers)
        assert_same(run(twin, x_of()), run(copy.deepcopy(model), x_of()))
    one = io.BytesIO()
    torch.save(model.get_submodule("attention.q_proj"), one)
    whole = io.BytesIO()
    torch.save(model, whole)
    assert one.getbuffer().nbytes < whole.getbuffer().nbytes / 3  # a layer does not drag its siblings along


def test_compaction_and_merging(config) -> None:
    model = adapted(config)
    igulora.merge(model)
    merged = model(x_of())
    igulora.unmerge(model)
    torch.testing.assert_close(model(x_of()), merged, rtol=1e-4, atol=1e-5)
    layer = model.get_submodule("attention.k_proj")
    layer.merge()  # one member alone: the others go on
    torch.testing.assert_close(model(x_of()), merged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x_of()), merged, rtol=1e-4, atol=1e-5)


def test_an_input_changed_in_place_is_another_input(config) -> None:
    class Changing(Attention):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            x = x * 1.0
            q = self.q_proj(x)
            x.mul_(2.0)
            return q + self.k_proj(x) * self.v_proj(x)

    results = []
    for alone in (False, True):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(adapted(config, Changing(), alone=alone)(x_of()))
    torch.testing.assert_close(*results)


def test_a_member_in_another_mode_keeps_to_itself(config) -> None:
    model = adapted(config, dropout=0.5)
    model.get_submodule("attention.q_proj").eval()
    key = model.get_submodule("attention.k_proj")
    x = x_of()
    torch.manual_seed(0)
    with torch.no_grad():
        model.get_submodule("attention.q_proj")(x)
        first, second = key(x), key(x)
    assert not torch.equal(first, second)  # dropout is drawn


class Halving(nn.Linear):
    """A base with a forward of its own, as quantised layers have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


def test_a_base_with_a_forward_of_its_own_runs_it(config) -> None:
    torch.manual_seed(0)
    base = Halving(D, 7)
    layer = igulora.FusedSVDLinear(base, r=3, init="orthonormal", init_lambda=0.8)
    x = x_of()
    expected = base(x) + (x @ layer.lora_Q.t() * layer.lora_E) @ layer.lora_P
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.lora_Q.grad is not None
    plain = nn.Linear(D, 7)
    hooked = igulora.FusedSVDLinear(plain, r=3, init="orthonormal")
    plain.forward = lambda x: (
        torch.nn.functional.linear(x, plain.weight, plain.bias) + 1.0
    )  # what offloading libraries do
    torch.testing.assert_close(hooked(x), torch.nn.functional.linear(x, plain.weight, plain.bias) + 1.0)


def test_autocast_copies_a_shared_input_once(config) -> None:
    """q, k and v, gate and up save one copy of their x in autocast's dtype, not one each."""
    x = torch.randn(2, 3, D)
    kept: dict[bool, int] = {}
    for alone in (False, True):
        model = adapted(config, alone=alone)
        shapes: Counter[int] = Counter()

        def pack(t: Tensor, shapes: Counter[int] = shapes) -> Tensor:
            if t.dtype == torch.bfloat16 and t.shape == x.shape:
                shapes[t.data_ptr()] += 1
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
        kept[alone] = len(shapes)
    assert kept[True] - kept[False] == 3  # two of q, k, v and one of gate, up
