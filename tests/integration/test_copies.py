"""Copies, files, processes, inference mode, hooks and function transforms: a model is its numbers, however it came about."""

from __future__ import annotations

import copy
import io
import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import igulora

from .tiny import Block, End, block_batches, block_loss, llama

LR = 1e-2


def started(config: Any, **options: Any) -> tuple[nn.Module, igulora.Controller, torch.optim.Optimizer]:
    model = igulora.adapt(
        Block(), config(**{"orthogonality": 0.1, "init_lambda": 0.3, "dropout": 0.2, "ig_fraction": 0.5, **options})
    )
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=LR))
    return model, igulora.Controller(model), optimizer


def go_on(parts: tuple[nn.Module, igulora.Controller, torch.optim.Optimizer], start: int, stop: int) -> list[float]:
    """Steps ``start`` to ``stop`` of a run."""
    model, controller, optimizer = parts
    torch.manual_seed(100 + start)
    losses = []
    for batch in block_batches(20)[start:stop]:
        losses.append(float(controller.backward(lambda b: block_loss(model, b), batch)))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    return losses


# -- copies -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"aggregate": "absolute", "estimator": "stratified"}, {"estimator": "on-path"}], ids=str
)
@pytest.mark.parametrize("at", [5, 12], ids=["in a window of the warm-up", "while pruning"])
def test_a_copy_of_a_whole_run_goes_on_as_the_run_does(config, options, at) -> None:
    """Model, controller and optimizer copied together, in the middle of a window."""
    parts = started(config, window=3, t_init=10, **options)
    go_on(parts, 0, at)
    twin = copy.deepcopy(parts)
    assert twin[1].bank is twin[0].igulora_bank
    assert twin[1].bank is not parts[1].bank
    theirs = End.of(go_on(twin, at, 20), twin[1])
    held = End.of([], parts[1])
    End.of(go_on(parts, at, 20), parts[1]).assert_same_bits(theirs)
    go_on(parts, 0, 1)
    End.of(theirs.losses, twin[1]).assert_same_bits(theirs)  # the original's further steps reach no copy
    assert not torch.equal(held.weight, theirs.weight)


def test_a_copied_controller_allows_as_many_micro_batches_as_its_original(config) -> None:
    torch.manual_seed(0)
    model = igulora.adapt(Block(), config(window=2, t_init=10))
    twin, controller = copy.deepcopy((model, igulora.Controller(model, accumulation_steps=12)))
    batches = block_batches(13)
    for batch in batches[:12]:
        controller.backward(lambda b: block_loss(twin, b), batch)
    with pytest.raises(ValueError, match=r"expected ctl.step\(\) after each optimizer step"):
        controller.backward(lambda b: block_loss(twin, b), batches[12])


def test_a_copy_that_nobody_steps_is_stopped_as_its_original_is(config) -> None:
    batch = block_batches(1)[0]

    def plain_loop(model: nn.Module) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(12):
            block_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    for twin in (copy.deepcopy(igulora.adapt(Block(), config())), through_file(igulora.adapt(Block(), config()))):
        with pytest.raises(ValueError, match="expected an igulora.Controller"):
            plain_loop(twin)


def test_passes_that_leave_layers_out_are_counted(config) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.which = "second"

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, self.which)(x)

    for own in (True, False):
        torch.manual_seed(0)
        model = igulora.adapt(Branches(), config(estimator="instantaneous", orthogonality=0.0))
        controller = igulora.Controller(model, accumulation_steps=3)
        for model.which in ("second", "first", "second"):
            if own:
                model(torch.randn(2, 4)).sum().backward()
            else:
                controller.backward(lambda x, model=model: model(x).sum(), torch.randn(2, 4))
        # Of a backward of the user's own it is known which parameters it reached: here two passes reached one, and one the other.
        assert controller.bank.context.unstepped == (2 if own else 3)


@pytest.mark.parametrize("way", ["safetensors", "accelerate"])
def test_whole_models_are_saved_by_others(config, tmp_path, way) -> None:
    """Parameters lie in one buffer; who looks for tensors that share a storage takes none for a copy of another."""
    torch.manual_seed(1)
    model = igulora.adapt(Block(), config())
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    weight = model.igulora_bank.weight.clone()
    twin = igulora.adapt(Block(), config())
    if way == "safetensors":
        from safetensors.torch import load_model, save_model

        save_model(model, str(tmp_path / "model.safetensors"))
        assert load_model(twin, str(tmp_path / "model.safetensors")) == (set(), [])
    else:
        accelerate = pytest.importorskip("accelerate")
        for each, act in ((model, "save_state"), (twin, "load_state")):
            accelerator = accelerate.Accelerator(cpu=True)
            accelerator.prepare(each)
            getattr(accelerator, act)(str(tmp_path))
    assert torch.equal(igulora.find_bank(twin).weight, weight)


def test_a_state_dict_is_the_models_memory(config) -> None:
    model = igulora.adapt(Block(), config())
    weight = model.igulora_bank.weight.clone()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.mul_(2.0)
    assert torch.equal(model.igulora_bank.weight, 2.0 * weight)


def through_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_state(assign: bool) -> Callable[[nn.Module], nn.Module]:
    def load(model: nn.Module) -> nn.Module:
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        twin = igulora.adapt(Block(), model.igulora_config)
        twin.load_state_dict(state, assign=assign)
        return twin

    return load


TWINS = {
    "deepcopy": copy.deepcopy,
    "torch.save": through_file,
    "state_dict": through_state(False),
    "state_dict assigned": through_state(True),
    "shared memory": lambda m: copy.deepcopy(m).share_memory(),
    "to and back": lambda m: copy.deepcopy(m).to(torch.float64).to(torch.float32),
}


@pytest.mark.parametrize("name", list(TWINS))
def test_every_twin_is_the_model_and_trains_as_it(config, name) -> None:
    parts = started(config)
    go_on(parts, 0, 16)
    model = parts[0]
    twin = TWINS[name](model)
    x = block_batches(1)[0][0]
    # Until its bank is packed a twin's layers do not share their inputs: q, k, v are three products, not one.
    torch.testing.assert_close(twin.eval()(x), model.eval()(x))
    igulora.find_bank(twin)
    assert torch.equal(twin(x), model(x))
    assert list(twin.state_dict()) == list(model.state_dict())
    ends = []
    for m in (model.train(), twin.train()):
        controller = igulora.Controller(m)
        ends.append(End.of(go_on((m, controller, torch.optim.AdamW(igulora.param_groups(m, lr=LR))), 0, 4), controller))
    if name == "to and back":  # the base's path through float64 is exact; so are the masters'
        ends[1].live = ends[0].live
    if "state_dict" in name:  # which triplets live is the controller's to keep
        ends[1].live = ends[0].live
    ends[1].assert_same_bits(ends[0])


def test_the_state_dict_holds_the_base_and_the_adapters_once(config) -> None:
    model = igulora.adapt(Block(), config())
    names = {n for n, _ in Block().named_parameters()}
    wanted = {f"{n.rpartition('.')[0]}.base_layer.{n.rpartition('.')[2]}" for n in names}
    wanted |= {f"{n.rpartition('.')[0]}.{part}" for n in names for part in ("lora_P", "lora_E", "lora_Q", "mask")}
    assert set(model.state_dict()) == wanted
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert torch.nn.utils.parameters_to_vector(p for p in model.parameters() if p.requires_grad).numel() == trainable


def test_a_vector_of_parameters_goes_in_and_out(config) -> None:
    model = igulora.adapt(Block(), config(init_lambda=0.3))
    x = block_batches(1)[0][0]
    before = model.eval()(x)
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert not torch.equal(model(x), before)
    with torch.no_grad():
        start = 0
        for p in model.parameters():
            p.copy_(vector[start : start + p.numel()].view_as(p))
            start += p.numel()
    assert torch.equal(model(x), before)


def test_a_model_goes_to_another_process_and_comes_back(config) -> None:
    torch.manual_seed(0)
    model = igulora.adapt(nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)), config(init_lambda=0.3)).eval()
    x = block_batches(1)[0][0]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        merged = pool.apply(
            igulora.merge, (copy.deepcopy(model),)
        )  # processes of PyTorch share the tensors they are sent
    assert not model[0].merged
    assert torch.equal(merged(x), igulora.merge(model)(x))


# -- inference --------------------------------------------------------------------------------------------------------------


class Doubling(nn.Linear):
    """A base with a forward of its own: its output is updated in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


def doubled() -> Block:
    model = Block()
    for name in ("q_proj", "down_proj", "head"):
        plain = getattr(model, name)
        layer = Doubling(plain.in_features, plain.out_features)
        layer.load_state_dict(plain.state_dict())
        setattr(model, name, layer)
    return model


@pytest.mark.parametrize("make", [Block, doubled])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_first_and_training_after(config, make, mode) -> None:
    """The first forward ever in inference mode, with a tensor made there; the same numbers, and nothing changed by it."""
    ends = []
    for first in (False, True):
        model = igulora.adapt(make(), config(init_lambda=0.3, ig_fraction=0.5, dropout=0.2))
        if first:
            held = {k: v.clone() for k, v in model.state_dict().items()}
            with mode():
                model.eval()
                x = torch.randn(4, 5, 12)
                kept = x.clone()
                y = model(x)
                assert torch.equal(model(x), y)
                assert torch.equal(x, kept)
                model.train()
            with torch.enable_grad():
                torch.testing.assert_close(
                    model.eval()(kept.clone() if mode is torch.no_grad else torch.tensor(kept.tolist())), y
                )
            model.train()
            assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
        controller = igulora.Controller(model)
        optimizer = torch.optim.SGD(igulora.param_groups(model, lr=LR))
        ends.append(End.of(go_on((model, controller, optimizer), 0, 16), controller))
    ends[1].assert_same_bits(ends[0])


def test_adapting_and_loading_inside_inference_mode_says_nothing_false(config) -> None:
    model = igulora.adapt(Block(), config(init_lambda=0.3)).eval()
    x = block_batches(1)[0][0]
    with torch.inference_mode():
        igulora.merge(model)
        merged = model(x)
        igulora.unmerge(model)
    torch.testing.assert_close(model(x), merged, rtol=1e-4, atol=1e-5)


# -- layers in unusual company ----------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer called twice in a forward, on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(x))))


@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_a_layer_called_twice_gets_both_gradients(config, alpha) -> None:
    model = igulora.adapt(Twice(), config(init_lambda=0.3, method="lora", init="orthonormal", target_rank=4))
    bank, (x, y) = model.igulora_bank, block_batches(1)[0]
    accumulator = bank.path
    with bank.context.at(torch.full((6,), alpha), 6, 0, torch.ones(6)):
        block_loss(model, (x, y)).backward()
    ours = {k: v.clone() for k, v in bank.matrix_views(accumulator).items()}
    weights = {n: m.base_layer.weight + alpha * m.delta_weight() for n, m in model.named_children()}
    for name, layer in model.named_children():
        P, E, Q = (p.detach().clone().requires_grad_() for p in (layer.lora_P, layer.lora_E, layer.lora_Q))
        state = {f"{n}.weight": w.detach() for n, w in weights.items()}
        state |= {f"{n}.bias": m.base_layer.bias for n, m in model.named_children()}
        state[f"{name}.weight"] = layer.base_layer.weight + alpha * (P.t() * (layer.scale * E)) @ Q
        out = torch.func.functional_call(Twice(), state, (x,))
        (out - y).square().mean().backward()
        for part, leaf in (("lora_P", P), ("lora_E", E), ("lora_Q", Q)):
            torch.testing.assert_close(ours[name, part] * alpha, leaf.grad, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(getattr(layer, part).grad, leaf.grad, rtol=1e-4, atol=1e-6)


def test_gradients_of_the_input_of_a_frozen_model(config) -> None:
    model, x = igulora.adapt(Block(), config(init_lambda=0.3)), block_batches(1)[0][0].requires_grad_()
    model.requires_grad_(False)
    (ours,) = torch.autograd.grad(model(x).square().sum(), x)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    igulora.merge(model)
    (theirs,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_function_transforms(config) -> None:
    """functional_call with other adapters, whose gradients reach them and not the model's."""
    model, x = igulora.adapt(Block(), config(init_lambda=0.3)), block_batches(1)[0][0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    igulora.find_bank(other)
    state = {k: v.detach() for k, v in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, state, (x,)), other(x))
    state = {k: v.requires_grad_() for k, v in state.items()}
    torch.func.functional_call(model, state, (x,)).sum().backward()
    assert state["head.lora_P"].grad.any()
    assert not model.igulora_bank.grad.any()


def test_hooks_see_what_goes_through_a_layer(config) -> None:
    model, seen = igulora.adapt(Block(), config(init_lambda=0.3)), []
    plain = model(x := block_batches(1)[0][0])
    handles = [
        model.k_proj.register_forward_pre_hook(lambda m, args: seen.append("before") or (args[0] * 1.0,)),
        model.k_proj.register_forward_hook(lambda m, args, out: seen.append("after") or out * 1.0),
        model.k_proj.register_full_backward_hook(lambda m, gin, gout: seen.append("backward")),
        model.k_proj.lora_P.register_hook(lambda g: seen.append("gradient")),
    ]
    y = model(x.requires_grad_())
    torch.testing.assert_close(y, plain)  # another input object: the layer computes its S itself
    y.sum().backward()
    assert seen[:2] == ["before", "after"]
    assert set(seen[2:]) == {"backward", "gradient"}
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_trains_and_comes_back(config, dtype) -> None:
    parts = started(config)
    held = parts[0].igulora_bank.weight.clone()
    parts[0].to(dtype)
    assert torch.equal(igulora.find_bank(parts[0]).weight, held)
    model, controller, optimizer = parts
    for x, y in block_batches(16):
        controller.backward(lambda b: block_loss(model, b), (x.to(dtype), y.to(dtype)))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    bank = model.igulora_bank
    assert bank.weight.dtype == controller.importance.mean.dtype == torch.float32
    assert bank.weight.isfinite().all()
    trained = bank.weight.clone()
    model.float()
    assert torch.equal(igulora.find_bank(model).weight, trained)
    assert int(bank.live.sum()) == 16


def test_a_language_model_survives_copy_and_file(config) -> None:
    model = igulora.adapt(llama(), config(init_lambda=0.3)).eval()
    ids = torch.randint(3, 40, (2, 7))
    expected = model(input_ids=ids).logits
    for twin in (copy.deepcopy(model), through_file(model)):
        igulora.find_bank(twin)
        assert torch.equal(twin(input_ids=ids).logits, expected)
