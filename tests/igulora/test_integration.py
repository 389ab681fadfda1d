"""The core inside the machinery of real runs: activation checkpointing, torch.compile, DDP, 16-bit bases, tied heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import igulora

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def llama(**changes) -> nn.Module:
    options = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).train()


def batch(g: torch.Generator) -> dict[str, torch.Tensor]:
    """Four sequences: one with part of its labels ignored, one with all, one with padding."""
    ids = torch.randint(1, 40, (4, 9), generator=g)
    labels, attended = ids.clone(), torch.ones_like(ids)
    labels[0, :5] = labels[1] = -100
    attended[2, 6:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": attended}


def train(
    model: nn.Module, config: igulora.IGUConfig, wrap: Callable[[nn.Module], nn.Module] = lambda m: m
) -> list[float]:
    igulora.adapt(model, config)
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-3))
    controller, wrapped = igulora.Controller(model), wrap(model)
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    losses = []
    for _ in range(16):
        losses.append(float(controller.backward(lambda b: wrapped(**b).loss, batch(g))))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert sum(controller.live_ranks().values()) == controller.history[-1]["budget"]
    assert all(p.grad is None for n, p in model.named_parameters() if "base_layer" in n)
    return losses


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"path_pass": "separate"}, {"estimator": "instantaneous", "dropout": 0.2}])
def test_activation_checkpointing_of_a_language_model(config, reentrant, options) -> None:
    options = config(orthogonality=0.1, **options)
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert train(model, options) == train(llama(), options)


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("path_pass", ["mixed", "separate"])
def test_distributed_data_parallel_of_one_process(config, tmp_path: Path, bucket_view, path_pass) -> None:
    options = config(orthogonality=0.1, path_pass=path_pass, modules_to_save=["lm_head"])
    alone = train(llama(), options)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        together = train(
            llama(), options, lambda m: nn.parallel.DistributedDataParallel(m, gradient_as_bucket_view=bucket_view)
        )
    finally:
        torch.distributed.destroy_process_group()
    assert together == alone


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_without_a_break(net, config, trainer, batches, dropout) -> None:
    torch._dynamo.reset()  # the limit of recompilations counts those of other tests
    ends = []
    for compiled in (False, True):
        model, controller, optimizer = trainer(net(), config(dropout=dropout))
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        torch.manual_seed(0)
        for x, y in batches(16):
            controller.backward(lambda b, forward=forward: (forward(b[0]) - b[1]).square().mean(), (x, y))
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
        assert sum(controller.live_ranks().values()) == 8
        ends.append(model.igulora_bank.weight.clone())
    if not dropout:  # the compiler draws its seeds from a generator of its own
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_bfloat16_base_keeps_float32_masters(config) -> None:
    low, full = train(llama().to(torch.bfloat16), config()), train(llama(), config())
    assert low == pytest.approx(full, rel=5e-3)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_saving_a_tied_module_unties_a_copy_of_it(config, saved) -> None:
    model = llama(tie_word_embeddings=True)
    weight = model.lm_head.weight.detach().clone()
    train(model, config(modules_to_save=[saved]))
    igulora.remove(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weight)
