"""Compiled models: one graph for each kind of pass, whatever alpha, masks, budgets and numbers of tokens; the numbers of eager training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import CompileContext
from torch.utils.checkpoint import checkpoint

import igulora

from .tiny import Block, End, bert, block_batches, block_loss, llama, token_batches, token_loss, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf"
    ),  # the compiler's own look at hidden states
]
# No two of these numbers, nor numbers of sequences with or of path rows, nor sizes of the model are equal: the compiler takes what it first
# finds equal for one variable.
SIZES, LENGTHS = (14, 18, 22), (5, 6, 13, 15)


class Graphs:
    """A backend that notes which graphs it is given: each is (frame, how often that frame was compiled before)."""

    def __init__(self, backend: str) -> None:
        self.inner = lookup_backend(backend)
        self.seen: list[tuple[int, int]] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        compiled = CompileContext.current_compile_id()
        graph = (compiled.frame_id, compiled.frame_compile_id)
        if graph not in self.seen:  # the compiler may start a graph over
            self.seen.append(graph)
        return self.inner(module, inputs, **options)


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The limit of recompilations counts those of other tests; and pytest would keep the compiler's trace, of every graph's text."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(graphs: Graphs, **options: Any) -> Callable[[nn.Module], Any]:
    """Compiles a model as a whole; a graph break raises."""
    return lambda model: torch.compile(model, backend=graphs, fullgraph=True, **options)


def trained(config: Any, graphs: Graphs | None = None, dynamic: bool | None = True, **options: Any) -> End:
    """A whole schedule of :class:`Block`: warm-up, pruning with soft masks, final phase; sizes change at every step."""
    wrap = whole(graphs, dynamic=dynamic) if graphs else lambda m: m
    options = {"orthogonality": 0.1, "init_lambda": 0.3, "ig_fraction": 0.5, **options}
    return train(Block(), config(**options), block_batches(20, SIZES, LENGTHS), block_loss, wrap)


# Passes with samples and passes without; on the path there are also those at alpha that are no sample, and where training and path rows
# have passes of their own, both.
KINDS = [
    ({"estimator": "gauss"}, 2),
    ({"estimator": "gauss", "path_pass": "separate"}, 2),
    ({"estimator": "stratified", "ig_every": 2}, 2),
    pytest.param(
        {"estimator": "stratified", "path_pass": "separate", "aggregate": "absolute"}, 2, marks=pytest.mark.long
    ),
    pytest.param({"estimator": "trapezoid", "include_f0": True}, 2, marks=pytest.mark.long),
    ({"estimator": "trapezoid", "path_pass": "separate"}, 3),
    pytest.param({"estimator": "on-path", "path": "factors"}, 2, marks=pytest.mark.long),
    ({"estimator": "on-path-stratified", "ig_every": 2}, 3),
    ({"estimator": "instantaneous", "window": 1}, 1),
]


@pytest.mark.parametrize(
    ("options", "kinds"), KINDS, ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else ""
)
def test_each_kind_of_pass_is_compiled_once(config, options, kinds) -> None:
    graphs = Graphs("eager")
    trained(config, graphs, **options).assert_close(trained(config, **options))
    assert len(graphs.seen) == kinds


@pytest.mark.parametrize(
    ("path_pass", "graphs_expected"), [("mixed", 3), pytest.param("separate", 4, marks=pytest.mark.long)]
)
def test_sizes_become_variables_by_themselves(config, path_pass, graphs_expected) -> None:
    """Without ``dynamic=True`` the first change of a size compiles once more; passes of path rows alone have sizes of their own."""
    graphs = Graphs("aot_eager")
    trained(config, graphs, dynamic=None, path_pass=path_pass).assert_close(trained(config, path_pass=path_pass))
    assert len(graphs.seen) == graphs_expected


@pytest.mark.slow
def test_a_language_model_is_two_graphs(config) -> None:
    graphs = Graphs("eager")
    options = config(orthogonality=0.1, ig_fraction=0.5)
    batches = token_batches(20, SIZES, LENGTHS)
    compiled = train(llama(), options, batches, token_loss, whole(graphs, dynamic=True))
    compiled.assert_close(train(llama(), options, batches, token_loss))
    assert len(graphs.seen) == 2


@pytest.mark.long
def test_an_encoder_with_a_head_to_train_is_two_graphs(config) -> None:
    graphs = Graphs("eager")
    options = config(ig_fraction=0.5, modules_to_save=["classifier"])
    batches = token_batches(16, SIZES, LENGTHS, classes=3)
    compiled = train(bert(), options, batches, token_loss, whole(graphs, dynamic=True))
    compiled.assert_close(train(bert(), options, batches, token_loss))
    assert len(graphs.seen) == 2


@pytest.mark.slow
def test_by_inductor(config) -> None:
    """With sizes as variables: the accumulators are views of one buffer, of which Inductor once wrote the wrong places."""
    graphs = Graphs("inductor")
    trained(config, graphs).assert_close(trained(config))
    assert len(graphs.seen) == 2


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, passes: int = 1) -> list[Tensor]:
    """Gradients of the input and of every adapter, the backward run ``passes`` times through one graph."""
    x = x.clone().requires_grad_()
    bank = igulora.find_bank(model)
    bank.grad.zero_()
    bank.bind_grads()
    torch.manual_seed(3)
    loss = forward(x).square().mean()
    for i in range(passes):
        loss.backward(retain_graph=i < passes - 1)
    assert x.grad is not None
    return [loss.detach(), x.grad, bank.grad.clone()]


def block(config: Any, **options: Any) -> Block:
    """Adapted, and away from the start."""
    return igulora.adapt(
        Block(), config(init_lambda=0.3, method="lora", init="orthonormal", target_rank=4, **options)
    ).train()


@pytest.mark.parametrize("compiled", [False, True])
def test_axolotl_3800_a_graph_that_is_kept_gives_its_gradients_again(config, compiled) -> None:
    """Peers write the input's gradient into memory that a second backward reads."""
    model, x = block(config), torch.randn(4, 5, 12)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with torch._functorch.config.patch(donated_buffer=False):  # what PyTorch asks of whoever keeps a compiled graph
        once, twice = gradients(model, forward, x), gradients(model, forward, x, passes=2)
    for one, two in zip(once[1:], twice[1:], strict=True):
        assert torch.equal(two, one + one)


def test_peft_3020_dropout_and_checkpointing_inside_a_compiled_model(config) -> None:
    """Recomputation drops the same entries: the gradient is that of the very function that the forward computed."""
    model, x = block(config, dropout=0.5), torch.randn(4, 5, 12)

    def recomputed(x: Tensor) -> Tensor:
        return model.head(checkpoint(model.body, x, use_reentrant=False))

    compiled = torch.compile(recomputed, backend="aot_eager", fullgraph=True)
    first, again = gradients(model, compiled, x), gradients(model, compiled, x)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    bank = igulora.find_bank(model)
    for name in ("q_proj", "gate_proj"):  # inside the checkpoint
        view, slopes = bank.matrix_views(bank.weight)[name, "lora_Q"], bank.matrix_views(first[2])[name, "lora_Q"]
        direction = slopes / slopes.norm()
        held, losses = view.clone(), []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                view.copy_(held + step * direction)
            losses.append(gradients(model, compiled, x)[0])
        with torch.no_grad():
            view.copy_(held)
        torch.testing.assert_close((losses[0] - losses[1]) / 2e-2, slopes.norm(), rtol=1e-2, atol=0)


@pytest.mark.slow
def test_blocks_compiled_one_by_one(config) -> None:
    """Regional compilation: every decoder layer is the same code, compiled as often as a model of one layer would be."""

    def by_region(graphs: Graphs) -> Callable[[nn.Module], nn.Module]:
        def wrap(model: nn.Module) -> nn.Module:
            for layer in model.model.layers:
                layer.compile(backend=graphs, fullgraph=True)
            return model

        return wrap

    graphs, options = Graphs("eager"), config(ig_fraction=0.5)
    batches = token_batches(16, (14,), (5,))
    compiled = train(llama(), options, batches, token_loss, by_region(graphs))
    compiled.assert_close(train(llama(), options, batches, token_loss))
    assert len(graphs.seen) == 4  # two layers, with path samples and without
