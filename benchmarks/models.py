"""Loading the models of the registry and making their batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from igulora.training.demo import load_smollm2

from .cases import Case, ModelCase


def load_model(model: ModelCase) -> nn.Module:
    """The frozen base model in its dtype, in training mode, all parameters frozen.

    Raises:
        MissingExtra: the package that holds the weights is not installed.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, model.dtype)
    if model.config:
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dict(model.config))).to(dtype)
    else:
        base, _ = load_smollm2()
        base = base if base.dtype == dtype else base.to(dtype)  # which would round the rotary frequencies
    return base.requires_grad_(False).train()


def make_batch(model: nn.Module, rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """``rows`` sequences of ``length`` random tokens, each its own label; times do not depend on what they say."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def small_batch(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """A batch that costs next to nothing, with the case's rows, so that path sampling sees the same counts."""
    return make_batch(model, case.rows, 8, seed=1)
