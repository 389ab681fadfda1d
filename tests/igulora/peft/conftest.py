"""A small Llama, batches and configurations for the tests of the PEFT method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Batch = dict[str, Tensor]


@pytest.fixture
def llama() -> Callable[..., nn.Module]:
    """``llama(seed=0)``: two layers, grouped queries, random weights."""

    def make(seed: int = 0, kind: str = "LlamaForCausalLM", **changes: Any) -> nn.Module:
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0, **changes,
        )  # fmt: skip
        return getattr(transformers, kind)(config)

    return make


@pytest.fixture
def batch() -> Batch:
    """Four sequences of nine tokens with their labels."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (4, 9), generator=g)
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture
def options() -> Callable[..., Any]:
    """Small options that prune within twenty steps; keyword arguments replace them."""
    from igulora.peft import IGULoraConfig

    def make(**changes: Any) -> Any:
        values: dict[str, Any] = {
            "r": 4, "target_rank": 2, "total_steps": 20, "t_init": 7, "t_final": 5, "delta_t": 2, "window": 2, "ig_every": 1,
            "init": "orthonormal", "normalize": "none", "target_modules": "all-linear", "task_type": "CAUSAL_LM",
        }  # fmt: skip
        return IGULoraConfig(**{**values, **changes})

    return make


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """What the model says in evaluation mode; its mode is what it was."""
    training = model.training
    model.eval()
    out = model(input_ids=batch["input_ids"]).logits
    model.train(training)
    return out


@pytest.fixture
def say() -> Callable[[nn.Module, Batch], Tensor]:
    """``say(model, batch)``: its outputs in evaluation mode."""
    return logits


@pytest.fixture
def train() -> Callable[..., Any]:
    """``train(model, batch, steps=20)`` with a controller; returns controller and optimizer."""
    import igulora

    def run(model: nn.Module, batch: Batch, steps: int = 20, lr: float = 3e-3) -> tuple[Any, torch.optim.Optimizer]:
        opt = torch.optim.AdamW(igulora.param_groups(model, lr=lr))
        ctl = igulora.Controller(model)
        for _ in range(steps):
            ctl.backward(lambda b: model(**b).loss, batch)
            opt.step()
            ctl.step()
            opt.zero_grad()
        return ctl, opt

    return run
