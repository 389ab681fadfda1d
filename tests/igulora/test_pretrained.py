"""``save_pretrained`` of a transformers model with adapters in it says that nobody will load what it writes."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch

import igulora

transformers = pytest.importorskip("transformers")

SAYS = "under names that from_pretrained does not know.*igulora.save_adapter"


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    llama = transformers.LlamaForCausalLM(shape)
    igulora.adapt(llama, igulora.IGUConfig(method="lora", r=2, init_lambda=0.5, init="gaussian"))
    return llama


def test_it_warns_and_writes_all_the_same(model: Any, tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match=SAYS):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_copy_saves_itself_and_warns(model: Any, tmp_path: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.fill_(7.0)
    with pytest.warns(UserWarning, match=SAYS):
        other.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert bool((load_file(tmp_path / "model.safetensors")["lm_head.weight"] == 7.0).all())


def test_merged_and_removed_it_is_saved_as_any_model(model: Any, tmp_path: Any) -> None:
    ids = torch.arange(6).reshape(1, 6)
    expected = model.eval()(ids).logits
    igulora.remove(igulora.merge(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, expected)


def test_a_pickled_model_comes_back(model: Any) -> None:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False).eval()
    ids = torch.arange(6).reshape(1, 6)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
