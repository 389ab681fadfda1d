"""Adapters of a PEFT model on disk: PEFT's own files, ranks after compaction, other names, the meta device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import igulora

peft = pytest.importorskip("peft")
from igulora.peft import IGULoraConfig  # noqa: E402

CLASSIFIER = {"kind": "LlamaForSequenceClassification", "num_labels": 3}


def pruned(llama: Any, options: Any, batch: Any, train: Any, **changes: Any) -> Any:
    """A trained model, its controller and its optimizer; some modules have rank 0."""
    model = peft.get_peft_model(llama(), options(seed=1, **changes))
    ctl, opt = train(model, batch)
    assert 0 in ctl.live_ranks().values()
    return model, ctl, opt


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("compacted", [False, True])
def test_peft_1539_rank_0_and_ranks_of_their_own_load_again(
    llama: Any, options: Any, batch: Any, train: Any, say: Any, tmp_path: Path, low: bool, compacted: bool
) -> None:
    model, ctl, opt = pruned(llama, options, batch, train)
    if compacted:
        igulora.compact(model, opt, ctl)
    out = say(model, batch)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.igu_adapters."
    assert {k.removeprefix(prefix) for k in tensors if k.startswith(prefix)} == {"lora_P", "lora_E", "lora_Q", "mask"}
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low)
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(say(loaded, batch), out, rtol=1e-4, atol=1e-6)
    assert igulora.find_bank(loaded).ranks() == ctl.live_ranks()
    assert any(layer.shared is not None for layer in igulora.find_bank(loaded).layers)
    assert {layer.r for layer in igulora.find_bank(loaded).layers} == (
        set(ctl.live_ranks().values()) if compacted else {4}
    )


def test_under_other_names_twice_and_in_place_of_another(
    llama: Any, options: Any, batch: Any, train: Any, say: Any, tmp_path: Path
) -> None:
    model, ctl, opt = pruned(llama, options, batch, train)
    igulora.compact(model, opt, ctl)
    out = say(model, batch)
    model.save_pretrained(tmp_path)
    other = peft.get_peft_model(llama(), options(r=5, init_lora_weights=False))
    before = say(other, batch)
    for name in ("one", "two"):
        result = other.load_adapter(tmp_path, name)
        assert not result.missing_keys
        assert not result.unexpected_keys
    torch.testing.assert_close(say(other, batch), before, rtol=1e-4, atol=1e-6)
    other.set_adapter("two")
    torch.testing.assert_close(say(other, batch), out, rtol=1e-4, atol=1e-6)
    bank = igulora.find_bank(other)
    other.load_adapter(tmp_path, "default")  # hot: into rows of another number, the parameters stay
    other.set_adapter("default")
    torch.testing.assert_close(say(other, batch), out, rtol=1e-4, atol=1e-6)
    assert igulora.find_bank(other) is not bank
    assert igulora.find_bank(other).ranks() == ctl.live_ranks()


def test_the_direct_interface_takes_what_it_gave(llama: Any, options: Any, batch: Any, train: Any, say: Any) -> None:
    model, _, _ = pruned(llama, options, batch, train)
    state = peft.get_peft_model_state_dict(model)
    target = peft.inject_adapter_in_model(options(), llama())
    result = peft.set_peft_model_state_dict(target, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(say(target, batch), say(model, batch), rtol=1e-4, atol=1e-6)
    inner = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    by_names = peft.inject_adapter_in_model(options(), llama(), state_dict=inner)
    assert igulora.find_bank(by_names).names == igulora.find_bank(model).names


def test_another_models_adapter_raises_and_can_be_ignored(llama: Any, options: Any, tmp_path: Path) -> None:
    peft.get_peft_model(llama(), options()).save_pretrained(tmp_path)
    torch.manual_seed(0)
    import transformers

    wide = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2)
    )  # fmt: skip
    model = peft.get_peft_model(wide, options())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path, "default")
    with pytest.warns(UserWarning, match="not initialized from the model checkpoint"):
        model.load_adapter(tmp_path, "default", ignore_mismatched_sizes=True)


def test_a_trained_copy_is_saved_and_loaded(
    llama: Any, options: Any, batch: Any, train: Any, say: Any, tmp_path: Path
) -> None:
    batch = {"input_ids": batch["input_ids"], "labels": torch.tensor([0, 1, 2, 0])}
    model = peft.get_peft_model(llama(**CLASSIFIER), options(task_type="SEQ_CLS"))
    train(model, batch)
    model.save_pretrained(tmp_path)
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter_model.safetensors")
    loaded = peft.PeftModel.from_pretrained(llama(**CLASSIFIER), tmp_path)
    torch.testing.assert_close(say(loaded, batch), say(model, batch), rtol=1e-4, atol=1e-6)


def test_igulora_s_own_files_and_plain_lora_come_from_a_peft_model_too(
    llama: Any, options: Any, batch: Any, train: Any, say: Any, tmp_path: Path
) -> None:
    labels = {"input_ids": batch["input_ids"], "labels": torch.tensor([0, 1, 2, 0])}
    model = peft.get_peft_model(llama(**CLASSIFIER), options(task_type="SEQ_CLS"))
    ctl, opt = train(model, labels)
    out = say(model, batch)
    igulora.save_adapter(model, tmp_path / "own", ctl)
    own = igulora.load_adapter(llama(**CLASSIFIER), tmp_path / "own")
    torch.testing.assert_close(say(own, batch), out, rtol=1e-4, atol=1e-6)
    igulora.export_peft(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(llama(**CLASSIFIER), tmp_path / "lora")
    assert lora.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(say(lora, batch), out, rtol=1e-4, atol=1e-5)
    from igulora.checkpoint import load_checkpoint, save_checkpoint

    save_checkpoint(tmp_path / "check", model, opt, ctl)
    twin = peft.get_peft_model(llama(**CLASSIFIER), options(task_type="SEQ_CLS"))
    opt2 = torch.optim.AdamW(igulora.param_groups(twin, lr=3e-3))
    ctl2 = igulora.Controller(twin)
    load_checkpoint(tmp_path / "check", twin, opt2, ctl2)
    assert ctl2.global_step == 20
    torch.testing.assert_close(say(twin, batch), out, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_fresh_process_loads_after_one_import_and_peft_names_what_is_missing_without(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    peft.get_peft_model(model, IGULoraConfig(method="lora", r=2, target_modules=["0"])).save_pretrained(tmp_path)
    code = """
import sys, igulora
assert "peft" not in sys.modules and "transformers" not in sys.modules
import peft
from torch import nn
base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
try:
    peft.PeftModel.from_pretrained(base, sys.argv[1])
except KeyError as error:
    assert error.args == ("IGULORA",)
else:
    sys.exit("PEFT knows the method by itself: say so in docs/peft.md")
config = igulora.IGULoraConfig  # as "import igulora.peft" does
assert peft.PeftType("IGULORA") and config.__module__ == "igulora.peft.config"
peft.PeftModel.from_pretrained(base, sys.argv[1])
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path], check=True, timeout=240, env=env)
