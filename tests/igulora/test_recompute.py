"""recompute_inputs: inputs of adapted layers are left out of memory and made again, bit by bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import igulora
from igulora.measure.memory import water_of
from igulora.recompute import Recompute


class Norm(nn.Module):
    """A root-mean-square norm as transformers writes it, with a frozen weight in 16 bits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width).bfloat16() + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """Norm, gated MLP, residual: inputs of all three linears are products."""

    def __init__(self, width: int = 32, inner: int = 64) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.gate_proj = nn.Linear(width, inner, bias=False, dtype=torch.bfloat16)
        self.up_proj = nn.Linear(width, inner, bias=False, dtype=torch.bfloat16)
        self.down_proj = nn.Linear(inner, width, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


class Stack(nn.Module):
    def __init__(self, blocks: int = 2, checkpointing: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x.float().pow(2).mean()


def adapted(recompute: bool, model: nn.Module | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = igulora.IGUConfig(r=4, method="lora", recompute_inputs=recompute, **options)
    model = igulora.adapt(Stack() if model is None else model, config)
    with torch.no_grad():
        for layer in igulora.find_bank(model).layers:
            layer.lora_P.normal_()
    return model


def gradients(model: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(3, 5, 32).bfloat16().requires_grad_() if x is None else x
    model(x).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert x.grad is not None
    return [*found, x.grad]


class Own(nn.Linear):
    """A linear layer with a forward of its own: the update is written into what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_bases_with_a_forward_of_their_own_recompute_too() -> None:
    found, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        stack = Stack()
        for block in stack.blocks:
            block.down_proj = Own(64, 32, bias=False, dtype=torch.bfloat16)
        model = adapted(recompute, stack)
        gradients(model)
        found.append(gradients(model))
        x = torch.randn(64, 16, 32).bfloat16().requires_grad_()
        kept.append(
            water_of(lambda model=model, x=x: model(x).backward(), lambda model=model, x=x: model(x).backward()).kept
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[0] - kept[1] == 2 * 64 * 16 * (32 + 64) * 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_bits(dropout: float, checkpointing: bool) -> None:
    models = []
    for recompute in (False, True):
        torch.manual_seed(0)
        models.append(adapted(recompute, Stack(checkpointing=checkpointing), dropout=dropout).train())
    for _ in range(2):  # the first pass tries the recipes out, the second uses them
        kept, made_again = (gradients(model) for model in models)
        assert len(kept) > 10
        assert all(torch.equal(a, b) for a, b in zip(kept, made_again, strict=True))


def test_the_inputs_are_left_out_of_memory() -> None:
    """Per block: the norm's output, read by gate and up, and the product that down reads."""
    kept = []
    for recompute in (False, True):
        model = adapted(recompute)
        x = torch.randn(64, 16, 32).bfloat16().requires_grad_()
        model(x).backward()
        kept.append(
            water_of(lambda model=model, x=x: model(x).backward(), lambda model=model, x=x: model(x).backward()).kept
        )
    rows, itemsize, blocks = 64 * 16, 2, 2
    assert kept[0] - kept[1] == blocks * rows * (32 + 64) * itemsize


def test_an_input_that_nothing_else_keeps_is_kept() -> None:
    layer = adapted(True).blocks[0].down_proj
    x = torch.randn(4, 64).bfloat16().requires_grad_()
    for source in (
        x,
        x + 1,
        torch.relu(x),
        x.view(2, 2, 64),
    ):  # a leaf, and operators that keep nothing or the result itself
        layer(source).float().sum().backward()
    assert layer.recompute._exact == {}


def test_a_recipe_that_is_not_exact_is_not_used() -> None:
    """A cast between two 16-bit types rounds, and the graph does not say that it was there."""
    recompute = Recompute()
    x = torch.randn(8, 8, requires_grad=True)
    frozen = torch.rand(8).bfloat16()
    product = frozen * (x * x).to(torch.float16).to(torch.bfloat16)
    assert recompute.of(product) is None
    assert list(recompute._exact.values()) in ([], [False])


def test_a_cast_in_a_wide_product_is_not_guessed() -> None:
    """In float32 a factor may have come from any narrower type."""
    x = torch.randn(8, 8, requires_grad=True)
    assert Recompute().of(torch.rand(8) * (x * x).to(torch.bfloat16)) is None
    assert Recompute().of(torch.rand(8) * (x * x)) is not None


def test_zeros_decide_nothing() -> None:
    recompute = Recompute()
    a, b = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    assert recompute.of((a * 0.0) * b) is None
    assert recompute._exact == {}
    assert recompute.of(a * b) is not None


def test_an_input_that_was_changed_in_place_is_kept() -> None:
    a, b = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    product = a * b
    with torch.no_grad():
        product.clamp_(min=0)
    assert Recompute().of(product) is None


def test_what_is_changed_before_the_backward_is_noticed_as_ever() -> None:
    model = adapted(True)
    gradients(model)
    loss = model(torch.randn(3, 5, 32).bfloat16().requires_grad_())
    with torch.no_grad():
        model.blocks[0].down_proj.lora_Q.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_product_that_is_checkpointed_alone_is_kept() -> None:
    """What it keeps belongs to the checkpoint, which must not be asked in the forward."""

    class Alone(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            inner = checkpoint(
                lambda g, u: nn.functional.silu(g) * u, self.gate_proj(h), self.up_proj(h), use_reentrant=False
            )
            return x + self.down_proj(inner)

    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        stack = Stack()
        stack.blocks = nn.ModuleList(Alone() for _ in range(2))
        model = adapted(recompute, stack)
        gradients(model)
        found.append(gradients(model))
        assert model.blocks[0].down_proj.recompute is None or model.blocks[0].down_proj.recompute._exact == {}
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_under_autocast_the_wide_input_is_left_out_too() -> None:
    """Layers on their own cast x inside the operator; what they do not keep then is the 16-bit copy."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Stack()
        for block in model.blocks:
            block.float()
        adapted(recompute, model)
        x = torch.randn(64, 16, 32).requires_grad_()

        def step(model: nn.Module = model, x: Tensor = x) -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(x)
            loss.backward()

        step()
        kept = water_of(step, step).kept
        results.append((kept, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert results[1][0] < results[0][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_on_the_meta_device_inputs_are_kept() -> None:
    model = adapted(True).to("meta")
    x = torch.randn(3, 5, 32, device="meta", dtype=torch.bfloat16).requires_grad_()
    model(x).backward()
    assert x.grad is not None
    assert model.blocks[0].down_proj.recompute._exact == {}


def test_all_members_of_a_group_take_the_same_recipe() -> None:
    model = adapted(True)
    gradients(model)
    block = model.blocks[0]
    assert block.gate_proj.shared is block.up_proj.shared is not None
    gate = [layer for layer in block.gate_proj.shared.layers if layer.recompute._exact]
    assert len(gate) == 1
    assert list(block.down_proj.recompute._exact.values()) == [True]


def test_a_graph_can_be_walked_twice() -> None:
    one, other = adapted(False), adapted(True)
    x = torch.randn(3, 5, 32).bfloat16()
    found = []
    for model in (one, other):
        gradients(model)
        torch.manual_seed(2)
        y = x.clone().requires_grad_()
        loss = model(y)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_copies_recompute_too() -> None:
    model = adapted(True)
    gradients(model)
    twin = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(twin), strict=True))
    assert twin.blocks[0].down_proj.recompute is not model.blocks[0].down_proj.recompute


def test_a_whole_run_is_the_same_with_and_without() -> None:
    losses = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Stack()
        igulora.adapt(model, igulora.IGUConfig(r=4, total_steps=60, window=4, ig_every=2, recompute_inputs=recompute))
        optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))
        controller = igulora.Controller(model)
        data = torch.Generator().manual_seed(3)
        seen = []
        for _ in range(24):
            x = torch.randn(4, 5, 32, generator=data).bfloat16()
            loss = controller.backward(lambda b, model=model: model(b.requires_grad_()), x)
            seen.append(loss.item())
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
        losses.append(seen)
    assert losses[0] == losses[1]
