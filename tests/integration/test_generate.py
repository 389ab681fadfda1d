"""Generation with a key-value cache: the adapted model says what the base says at the start, and what the merged model says later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import igulora

from .tiny import block_loss, llama, token_batches, token_loss, train  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "sampling": {"do_sample": True, "top_k": 5},
}


def prompts() -> dict[str, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(7))
    attended = torch.ones_like(ids)
    ids[0, :3], attended[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": attended}


def said(model: nn.Module, way: str) -> Tensor:
    torch.manual_seed(11)
    return model.generate(**prompts(), max_new_tokens=12, min_new_tokens=12, **{"do_sample": False, **WAYS[way]})


@pytest.fixture(scope="module")
def trained() -> Callable[[], nn.Module]:
    """Copies of a model after a whole schedule, its weights large enough to differ from the base's words."""
    options = igulora.IGUConfig(
        r=4,
        target_rank=2,
        total_steps=20,
        t_init=7,
        t_final=5,
        delta_t=2,
        window=2,
        ig_every=1,
        init_lambda=0.5,
        dropout=0.1,
    )
    model = llama()
    train(model, options, token_batches(20), token_loss, lr=0.5)
    model.eval()
    return lambda: copy.deepcopy(model)


@pytest.mark.parametrize("way", list(WAYS))
def test_at_the_start_it_says_what_the_base_says(config, way) -> None:
    base = llama().eval()
    assert torch.equal(said(igulora.adapt(llama(), config(dropout=0.1)).eval(), way), said(base, way))


@pytest.mark.parametrize("way", list(WAYS))
def test_after_training_it_says_what_the_merged_model_says(trained, way) -> None:
    adapted, merged = trained(), igulora.remove(igulora.merge(trained()))
    words = said(adapted, way)
    assert torch.equal(words, said(merged, way))
    assert not torch.equal(words, said(llama().eval(), way))
    adapted.igulora_bank.context.check_stepped()  # generating is no training


def test_logits_with_a_cache_are_those_without(trained) -> None:
    model, ids = trained(), prompts()["input_ids"]
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits
        cache, parts = None, []
        for i in range(ids.shape[1]):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_generation_between_training_steps_changes_nothing(config) -> None:
    """As an evaluation in the middle of a run does."""

    def interrupted(model: nn.Module) -> Callable[..., Any]:
        def forward(**batch: Tensor) -> Any:
            state = torch.get_rng_state()
            model.eval()
            said(model, "greedy")
            model.train()
            torch.set_rng_state(state)
            return model(**batch)

        return forward

    options = {
        "orthogonality": 0.1,
        "dropout": 0.2,
        "ig_fraction": 0.5,
        "path_pass": "separate",
        "estimator": "on-path",
    }
    # Generation inside a loss function would run at the pass's own alpha; here alpha matters to training alone.
    plain = train(llama(), config(**options), token_batches(9), token_loss)
    again = train(llama(), config(**options), token_batches(9), token_loss, interrupted)
    again.assert_same_bits(plain)
