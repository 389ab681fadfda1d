"""What cannot be adapted is refused, and the model is then what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import igulora

peft = pytest.importorskip("peft")
from igulora.peft import IGULoraConfig  # noqa: E402


def state(model: nn.Module) -> Any:
    kinds = [(name, id(module)) for name, module in model.named_modules()]
    return kinds, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def half_fine() -> nn.Module:
    """Layers that can be adapted, then one that cannot."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].weight = nn.Parameter(model[2].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


def test_a_layer_that_cannot_be_adapted_leaves_no_other_adapted() -> None:
    model = half_fine()
    before = state(model)
    with pytest.raises(ValueError, match="float8_e4m3fn, in a form that igulora cannot unpack") as ours:
        igulora.adapt(model, igulora.IGUConfig(r=2, method="lora"))
    with pytest.raises(ValueError, match="float8_e4m3fn") as theirs:
        peft.get_peft_model(model, IGULoraConfig(r=2, method="lora", target_modules=["0", "1", "2"]))
    assert str(theirs.value) == str(ours.value)
    assert state(model) == before
    assert not hasattr(model, "igulora_banks")


def test_a_second_adapter_that_cannot_be_added_leaves_the_first() -> None:
    inner = half_fine()
    model = peft.get_peft_model(inner, IGULoraConfig(r=2, method="lora", target_modules=["0"], init_lora_weights=False))
    bank, before = igulora.find_bank(model), state(inner)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        model.add_adapter("b", IGULoraConfig(r=2, method="lora", target_modules=["0", "1", "2"]))
    assert state(inner) == before
    assert igulora.find_bank(model) is bank
    assert list(model.peft_config) == ["default"]
    model.add_adapter("b", IGULoraConfig(r=3, method="lora", target_modules=["0", "1"]))
    model.set_adapter("b")
    assert igulora.find_bank(model).ranks() == {"0": 3, "1": 3}


def test_target_parameters_are_refused_with_what_to_use_instead() -> None:
    message = r"target_modules only, got target_parameters=\['experts.down_proj'\].*igulora\.adapt\(model, "
    with pytest.raises(ValueError, match=message):
        IGULoraConfig(r=2, method="lora", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    config = IGULoraConfig(r=2, method="lora", target_modules=["0"])
    config.target_parameters = ["experts.down_proj"]
    model = nn.Sequential(nn.Linear(4, 4))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, config)
    assert state(model) == before


def test_a_weight_that_cannot_be_written_is_refused_before_another_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    from igulora.bases.linear import LinearBase

    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        IGULoraConfig(r=2, method="lora", target_modules=["0", "1"], init_lora_weights=False),
    )
    layers = [model.base_model.model[i] for i in (0, 1)]
    monkeypatch.setattr(
        LinearBase, "fixed", lambda base: "it is in stone" if base.module is layers[1].base_layer else None
    )
    weights = [layer.weight.clone() for layer in layers]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"weights that can be written, got '1' \(nn.Linear\): it is in stone"):
            merge()
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, weights, strict=True))
        assert not any(layer.merged for layer in layers)
