"""Adapters of a PEFT model: several of them, on and off, merged, unloaded, mixed in one batch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import igulora

peft = pytest.importorskip("peft")
from igulora.peft import IGULoraConfig, IGULoraLinear  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


def two(llama: Any, options: Any) -> nn.Module:
    """A model with adapters "default" (active) and "b", both with effect."""
    torch.manual_seed(3)
    model = peft.get_peft_model(llama(), options(init_lora_weights=False))
    model.add_adapter("b", options(r=3, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
    return model


def trained(model: nn.Module) -> set[str]:
    return {n.split("igu_adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}


def test_a_fresh_adapter_leaves_the_outputs_bit_by_bit(llama: Any, options: Any, batch: Any, say: Any) -> None:
    before = say(llama(), batch)
    assert torch.equal(say(peft.get_peft_model(llama(), options()), batch), before)


@pytest.mark.parametrize("init", ["zero", "orthonormal"])
def test_without_initialisation_a_fresh_adapter_changes_outputs(
    llama: Any, options: Any, batch: Any, say: Any, init: str
) -> None:
    """PEFT's own tests make adapters with effect so."""
    before = say(llama(), batch)
    model = peft.get_peft_model(llama(), options(init=init, init_lora_weights=False))
    assert not torch.allclose(say(model, batch), before, atol=1e-3)


def test_the_model_computes_what_adapt_computes(llama: Any, options: Any, batch: Any, say: Any) -> None:
    ours = igulora.adapt(
        llama(),
        igulora.IGUConfig(r=4, target_rank=2, total_steps=100, window=2, seed=5, lora_alpha=8, init="orthonormal"),
    )
    theirs = peft.get_peft_model(llama(), options(seed=5, lora_alpha=8))
    mine, their = igulora.find_bank(ours), igulora.find_bank(theirs)
    assert mine.names == their.names
    assert torch.equal(mine.weight, their.weight)
    for bank in (mine, their):
        bank.lambdas.copy_(torch.linspace(-1, 1, bank.triplets))
    assert torch.equal(say(ours, batch), say(theirs, batch))


def test_each_adapter_has_a_bank_and_the_active_one_is_found(llama: Any, options: Any) -> None:
    model = two(llama, options)
    first = igulora.find_bank(model)
    assert len(first.layers) == 14
    model.set_adapter("b")
    second = igulora.find_bank(model)
    assert second is not first
    assert second.context is not first.context
    assert [n.rsplit(".", 1)[1] for n in second.names] == ["q_proj", "down_proj"] * 2
    assert model.igulora_config.r == 3
    model.set_adapter("default")
    assert igulora.find_bank(model) is first
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match=r"one active.*default, b"):
        igulora.find_bank(model)
    model.set_requires_grad("b", False)
    assert igulora.find_bank(model) is first


def test_only_the_active_adapter_is_trained(llama: Any, options: Any, batch: Any) -> None:
    model = two(llama, options)
    assert trained(model) == {"default"}
    model.set_adapter("b")
    assert trained(model) == {"b"}
    model(**batch).loss.backward()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_grad
    assert all(".b." in n for n in with_grad)
    with model.disable_adapter():
        assert trained(model) == set()
    assert trained(model) == {"b"}
    model.set_adapter("default", inference_mode=True)
    assert trained(model) == set()


def test_lambda_of_the_lora_start_stays_out_of_training(llama: Any, options: Any) -> None:
    model = peft.get_peft_model(llama(), options(method="lora", init="lora"))
    for _ in range(2):
        names = {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad}
        assert names == {"lora_P", "lora_Q"}
        with model.disable_adapter():
            pass
        model.set_requires_grad("default")


def test_disabled_adapters_give_the_base_model(llama: Any, options: Any, batch: Any, say: Any) -> None:
    base = say(llama(), batch)
    model = two(llama, options)
    active = say(model, batch)
    assert not torch.allclose(active, base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(say(model, batch), base)
    with igulora.adapters_disabled(model):
        assert torch.equal(say(model, batch), base)
    assert torch.equal(say(model, batch), active)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_keeps_the_outputs_and_unmerging_the_weights(
    llama: Any, options: Any, batch: Any, say: Any, safe: bool
) -> None:
    model = two(llama, options)
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    active = say(model, batch)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(say(model, batch), active, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="nothing to do"):
        model.merge_adapter()
    model.unmerge_adapter()
    for name, weight in weights.items():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=2e-6)
    torch.testing.assert_close(say(model, batch), active, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.base_model.model.model.layers[0].mlp.up_proj.unmerge()


def test_a_broken_adapter_is_not_merged_safely(llama: Any, options: Any) -> None:
    model = two(llama, options)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight.clone()
    layer.igu_adapters["default"].lora_E.data[0] = float("nan")
    with pytest.raises(ValueError, match="default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.parametrize("merge", [False, True])
def test_unloading_returns_a_plain_model(llama: Any, options: Any, batch: Any, say: Any, merge: bool) -> None:
    base, model = say(llama(), batch), two(llama, options)
    active = say(model, batch)
    plain = model.merge_and_unload() if merge else model.unload()
    assert not any(isinstance(m, IGULoraLinear) for m in plain.modules())
    assert not hasattr(plain, "igulora_banks")
    assert not hasattr(plain, "peft_config")
    torch.testing.assert_close(say(plain, batch), active if merge else base, rtol=1e-4, atol=1e-5)


def test_two_active_adapters_add_up(llama: Any, options: Any, batch: Any, say: Any) -> None:
    model = two(llama, options)
    model.base_model.set_adapter(["default", "b"])
    both = say(model, batch)
    model.merge_adapter()
    torch.testing.assert_close(say(model, batch), both, rtol=1e-4, atol=1e-5)
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    assert q.merged_adapters == ["default", "b"]
    model.unmerge_adapter()
    x = torch.randn(3, 16)
    delta = q.get_delta_weight("default") + q.get_delta_weight("b")
    torch.testing.assert_close(q(x), x @ (q.base_layer.weight + delta).t(), rtol=1e-4, atol=1e-5)


def test_an_active_frozen_adapter_is_a_part_of_the_base(
    llama: Any, options: Any, batch: Any, train: Any, say: Any
) -> None:
    """Path passes of one adapter, at any alpha, leave the other where it is: as if it had been merged before."""
    model = two(llama, options)
    merged = copy.deepcopy(model)
    model.base_model.set_adapter(["default", "b"])
    model.set_requires_grad("b", False)
    merged.set_adapter("b")
    merged.merge_adapter()
    for layer in merged.modules():  # b's update stays in the base weights, the layer forgets that it is one
        if isinstance(layer, IGULoraLinear):
            layer.merged_adapters.clear()
    merged.set_adapter("default")
    ctl, _ = train(model, batch, steps=9)
    other, _ = train(merged, batch, steps=9)
    torch.testing.assert_close(ctl.bank.weight, other.bank.weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ctl.importance.mean, other.importance.mean, rtol=2e-2, atol=1e-6)


def test_deleting_an_adapter_takes_its_bank_along(llama: Any, options: Any, batch: Any, say: Any) -> None:
    model = two(llama, options)
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert set(model.base_model.banks) == {"b"}
    assert igulora.find_bank(model).names[0].endswith("q_proj")
    model.delete_adapter("b")
    assert torch.equal(say(model.base_model.model, batch), say(llama(), batch))
    with pytest.raises(ValueError, match=r"got none"):
        igulora.find_bank(model)


def test_rows_of_a_batch_go_through_adapters_of_their_own(llama: Any, options: Any, batch: Any, say: Any) -> None:
    model = two(llama, options).eval()
    single = {"__base__": say(llama(), batch)}
    for name in ("default", "b"):
        model.set_adapter(name)
        single[name] = say(model, batch)
    names = ["b", "__base__", "default", "b"]
    with torch.no_grad():
        rows = model(input_ids=batch["input_ids"], adapter_names=names).logits
    for i, name in enumerate(names):
        torch.testing.assert_close(rows[i], single[name][i], rtol=1e-4, atol=1e-5)
    bank = igulora.find_bank(model.base_model)
    assert any(layer.shared is not None for layer in bank.layers) or model.active_adapter == "b"
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(input_ids=batch["input_ids"], adapter_names=["x"] * 4)
    with pytest.raises(ValueError, match="one of adapter_names per row"):
        model(input_ids=batch["input_ids"], adapter_names=["b"] * 3)
    model.train()
    with pytest.raises(ValueError, match="in training mode"):
        model(input_ids=batch["input_ids"], adapter_names=names)


def test_layers_that_read_one_input_share_it(llama: Any, options: Any) -> None:
    bank = igulora.find_bank(peft.get_peft_model(llama(), options()))
    groups = {id(layer.shared): layer.shared for layer in bank.layers if layer.shared is not None}
    assert sorted(len(g.layers) for g in groups.values()) == [2, 2, 3, 3]


def test_copies_and_pickles_stay_whole(llama: Any, options: Any, batch: Any, train: Any, say: Any) -> None:
    model = two(llama, options)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(say(twin, batch), say(model, batch), rtol=1e-4, atol=1e-6)
        assert igulora.find_bank(twin) is not igulora.find_bank(model)
        before = say(model, batch)
        train(twin, batch, steps=2)
        assert torch.equal(say(model, batch), before)
        assert not torch.equal(say(twin, batch), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_masters_are_float32_over_16_bit_weights(llama: Any, options: Any, dtype: torch.dtype, autocast: bool) -> None:
    model = peft.get_peft_model(llama().to(dtype), options(), autocast_adapter_dtype=autocast)
    model.to(dtype)
    kinds = {p.dtype for n, p in model.named_parameters() if "igu_" in n}
    assert kinds == {torch.float32}


def test_conv1d_and_rank_patterns(batch: Any, options: Any) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = peft.get_peft_model(
        transformers.GPT2LMHeadModel(config), options(target_modules=None, rank_pattern={r"h.1.attn.c_attn": 2}, init_lora_weights=False)
    )  # fmt: skip
    bank = igulora.find_bank(model)
    assert dict(zip(bank.names, [layer.r for layer in bank.layers], strict=True)) == {
        "transformer.h.0.attn.c_attn": 4,
        "transformer.h.1.attn.c_attn": 2,
    }
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape
    model.eval()
    with torch.no_grad():
        before = model(batch["input_ids"]).logits
        merged = model.merge_and_unload()(batch["input_ids"]).logits
    torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)


def test_the_status_peft_reports(llama: Any, options: Any) -> None:
    model = two(llama, options)
    status = model.get_model_status()
    assert (status.adapter_model_type, status.peft_types["default"]) == ("IGULoraModel", "IGULORA")
    assert status.available_adapters == ["b", "default"]
    assert status.requires_grad == {"default": True, "b": False}
    assert status.num_adapter_layers == 14
    assert model.get_layer_status()[0].module_type == "igulora.IGULoraLinear"


def test_what_cannot_be_adapted_is_named(llama: Any, options: Any) -> None:
    with pytest.raises(ValueError, match=r"convolutions only, got .model.norm. \(LlamaRMSNorm\)"):
        peft.get_peft_model(llama(), options(target_modules=["norm"]))
    model = peft.get_peft_model(llama(), options())
    with pytest.raises(TypeError, match="does not support add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "c")
    for call in (igulora.merge, igulora.unmerge, igulora.remove):
        with pytest.raises(ValueError, match="adapters PEFT keeps"):
            call(model)
    with pytest.raises(ValueError, match="whose igulora adapters PEFT keeps"):
        igulora.adapt(model, igulora.IGUConfig(method="lora"))
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"'attn.out_proj'.*exclude_modules"):
        peft.get_peft_model(attention, IGULoraConfig(method="lora", target_modules=["out_proj"]))


def test_injected_without_a_wrapper_as_transformers_does_it(llama: Any, options: Any, batch: Any, train: Any) -> None:
    model = llama()
    model.add_adapter(options(), adapter_name="one")
    ctl, _ = train(model, batch)
    assert sum(ctl.live_ranks().values()) == 28
    model.add_adapter(options(r=3), adapter_name="two")
    model.set_adapter("two")
    assert igulora.find_bank(model).triplets == 3 * 14


def test_conversion_to_lora_is_exact_at_the_adapter_s_rank(llama: Any, options: Any, batch: Any, say: Any) -> None:
    model = peft.get_peft_model(llama(), options(init_lora_weights=False))
    config, state = peft.convert_to_lora(model, rank=4)
    lora = peft.get_peft_model(llama(), config)
    peft.set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(say(lora, batch), say(model, batch), rtol=1e-4, atol=1e-5)
