"""param_groups: lambda has its own learning rate, saved modules come along, nothing is lost or doubled."""

from __future__ import annotations

import pytest
import torch

import igulora
from igulora.optim import DEFAULT_LAMBDA_LR_RATIO


@pytest.mark.parametrize("save", [[], ["head"]])
def test_every_trainable_parameter_once(net, config, save) -> None:
    model = igulora.adapt(net(), config(modules_to_save=save))
    groups = igulora.param_groups(model, lr=1e-3, lambda_lr_ratio=20, weight_decay=0.1)
    assert [g["name"] for g in groups] == ["vectors", "lambda", *(["saved"] if save else [])]
    params = [id(p) for g in groups for p in g["params"]]
    assert sorted(params) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(params) == len(set(params))
    by_name = {g["name"]: g for g in groups}
    assert by_name["lambda"]["lr"] == pytest.approx(2e-2)
    assert by_name["lambda"]["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in by_name["lambda"]["params"])
    assert all(p.ndim == 2 for p in by_name["vectors"]["params"])
    assert (by_name["vectors"]["lr"], by_name["vectors"]["weight_decay"]) == (1e-3, 0.1)
    if save:
        assert (by_name["saved"]["lr"], by_name["saved"]["weight_decay"]) == (1e-3, 0.1)
    optimizer = torch.optim.AdamW(groups, fused=True)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in groups]


@pytest.mark.parametrize(
    ("init", "ratio"), [("orthonormal", DEFAULT_LAMBDA_LR_RATIO), ("gaussian", 1.0), ("zero", 1.0)]
)
def test_default_ratio_follows_the_start(net, config, init, ratio) -> None:
    groups = igulora.param_groups(igulora.adapt(net(), config(init=init)), lr=1.0)
    assert groups[1]["lr"] == ratio


def test_p_and_q_apart(net, config) -> None:
    model = igulora.adapt(net(), config())
    groups = igulora.param_groups(model, lr=1e-3, weight_decay=0.1, p_lr_ratio=4)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups[:2]] == [("P", 4e-3, 0.1), ("Q", 1e-3, 0.1)]
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    assert [{names[id(p)] for p in g["params"]} for g in groups] == [{"lora_P"}, {"lora_Q"}, {"lora_E"}]
    both = igulora.param_groups(model, lr=1e-3)[0]["params"]
    assert {id(p) for g in groups[:2] for p in g["params"]} == {id(p) for p in both}


def test_plain_lora_has_no_lambda_group(net) -> None:
    groups = igulora.param_groups(igulora.adapt(net(), igulora.IGUConfig(method="lora")), lr=1.0)
    assert [g["name"] for g in groups] == ["vectors"]


def test_parameters_survive_a_cast(net, config) -> None:
    model = igulora.adapt(net(), config())
    groups = igulora.param_groups(model, lr=1.0)
    model.to(torch.bfloat16)
    again = igulora.param_groups(model, lr=1.0)
    assert [[id(p) for p in g["params"]] for g in groups] == [[id(p) for p in g["params"]] for g in again]


def test_bad_arguments(net, config) -> None:
    with pytest.raises(ValueError, match="got a plain Net"):
        igulora.param_groups(net(), lr=1.0)
    model = igulora.adapt(net(), config())
    for lr in (0.0, -1.0):
        with pytest.raises(ValueError, match="lr > 0, got"):
            igulora.param_groups(model, lr=lr)
    with pytest.raises(ValueError, match="p_lr_ratio > 0, got 0"):
        igulora.param_groups(model, lr=1.0, p_lr_ratio=0)
    with pytest.raises(ValueError, match="lambda_lr_ratio >= 0, got -1"):
        igulora.param_groups(model, lr=1.0, lambda_lr_ratio=-1)
