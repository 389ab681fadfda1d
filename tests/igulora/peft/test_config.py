"""IGULoraConfig: AdaLoRA's names, conflicts, refusals, the round trip through adapter_config.json; registration with PEFT."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import igulora

peft = pytest.importorskip("peft")
from igulora.peft import IGULoraConfig, IGULoraModel, registration  # noqa: E402
from igulora.peft.config import ADALORA_NAMES  # noqa: E402

THEIRS = {
    "init_r": 12, "target_r": 4, "tinit": 20, "tfinal": 30, "deltaT": 5, "total_step": 100, "orth_reg_weight": 0.25,
    "lora_dropout": 0.1,
}  # fmt: skip


def test_adalora_arguments_are_other_names_of_ours() -> None:
    ours = {ADALORA_NAMES[k]: v for k, v in THEIRS.items()}
    one = IGULoraConfig(**THEIRS, lora_alpha=32, beta1=0.8, beta2=0.9, target_modules=["q_proj"])
    other = IGULoraConfig(**ours, lora_alpha=32, beta1=0.8, beta2=0.9, target_modules=["q_proj"])
    assert one == other
    assert {name: getattr(one, name) for name in THEIRS} == THEIRS
    assert (one.r, one.target_rank, one.dropout, one.scale) == (12, 4, 0.1, 32 / 12)


def test_every_argument_of_adalora_config_is_taken_or_refused_by_name() -> None:
    import inspect

    takes = set(inspect.signature(IGULoraConfig.__init__).parameters)
    # LoRA's own, which AdaLoRA inherits and does not use.
    lora_only = {
        "megatron_config", "megatron_core", "eva_config", "corda_config", "lora_ga_config", "use_qalora", "qalora_group_size",
        "use_bdlora", "arrow_config", "ensure_weight_tying", "alora_invocation_tokens", "lora_bias", "target_parameters",
        "layer_replication", "runtime_config", "monteclora_config", "velora_config", "kasa_config",
    }  # fmt: skip
    missing = {n for n in inspect.signature(peft.AdaLoraConfig.__init__).parameters if n not in takes} - lora_only
    assert missing == set()


@pytest.mark.parametrize(("theirs", "ours"), ADALORA_NAMES.items())
def test_two_values_for_one_option_raise_and_name_both(theirs: str, ours: str) -> None:
    value = THEIRS[theirs]
    options: dict[str, Any] = {"total_steps": 100, ours: value}
    other = value + 1 if isinstance(value, int) else value / 2
    with pytest.raises(ValueError, match=rf"{ours}.*{theirs}.*give one of them"):
        IGULoraConfig(**options, **{theirs: other})
    assert getattr(IGULoraConfig(**options, **{theirs: value}), ours) == value


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"r": 0, "target_rank": 0}, "no layer would be adapted"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"task_type": "NOTHING"}, "task type"),
        ({"target_rank": 40}, "target_rank <= r"),
        ({"rank_pattern": {"q_proj": [True, False]}}, "rank_pattern"),
    ],
)
def test_what_has_no_meaning_here_is_refused_when_the_config_is_made(option: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        IGULoraConfig(total_steps=1000, **option)


def test_peft_2337_a_schedule_without_room_for_pruning_is_refused_when_the_config_is_made() -> None:
    with pytest.raises(ValueError, match="total_steps > t_init"):
        IGULoraConfig(init_r=4, target_r=2, tinit=80, tfinal=20, total_step=100)
    with pytest.raises(ValueError, match="expected total_steps"):
        IGULoraConfig(init_r=4, target_r=2)


def test_the_json_round_trip_returns_an_equal_config(tmp_path: Path) -> None:
    config = IGULoraConfig(
        **THEIRS, target_modules=["v_proj", "q_proj"], modules_to_save=["score"], rank_pattern={"q_proj": 3}, task_type="SEQ_CLS",
        layers_to_transform=[0, 1], seed=3,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "IGULORA"
    assert not set(ADALORA_NAMES) & set(written)
    for cls in (IGULoraConfig, peft.PeftConfig):
        assert cls.from_pretrained(tmp_path) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_the_plain_config_is_what_igulora_itself_takes() -> None:
    config = IGULoraConfig(**THEIRS, target_modules={"b", "a"}, exclude_modules=["c"])
    plain = config.plain()
    assert type(plain) is igulora.IGUConfig
    assert (plain.target_modules, plain.exclude_modules, plain.modules_to_save) == (["a", "b"], ["c"], [])
    assert igulora.IGUConfig.from_dict(plain.to_dict()) == plain


def test_the_method_is_registered_once_and_again_without_harm() -> None:
    member = peft.PeftType.IGULORA
    assert registration.peft_type() is member is peft.PeftType("IGULORA") is peft.PeftType["IGULORA"]
    assert member in list(peft.PeftType)
    assert str(member) == "PeftType.IGULORA"
    assert member == "IGULORA"
    registration.register(IGULoraConfig, IGULoraModel)
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["IGULORA"] is IGULoraModel
    assert [m.name for m in peft.PeftType].count("IGULORA") == 1
    assert pickle.loads(pickle.dumps(member)) is member


def test_a_changed_peft_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "PeftType", type("PeftType", (str,), {"__members__": {}}))
    with pytest.raises(ImportError, match=r"as its version 0\.21 does.*install peft==0\.21"):
        registration.peft_type()
