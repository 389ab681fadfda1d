"""import_peft: what PEFT trained gives the same outputs here, and training goes on from it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import igulora
from igulora import find_bank
from igulora.adapt import adapted_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*have invalid shape"
    ),  # PEFT's, of the layers that its own AdaLoRA pruned to rank 0
    pytest.mark.filterwarnings(
        "ignore:The following rank_pattern keys"
    ),  # PEFT's, of the pattern that its own AdaLoRA wrote
]
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(5))
LABELS = torch.tensor([0, 2, 1])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "v_proj", "up_proj"]
INIT_R, TOTAL, T_INIT, T_FINAL, DELTA = 5, 24, 4, 6, 3


def llama(cls: str = "LlamaForCausalLM", **changes: Any) -> nn.Module:
    options = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(0)
    return getattr(transformers, cls)(transformers.LlamaConfig(**options)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    options = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options, bos_token_id=1, eos_token_id=1)).eval()


def drawn(model: nn.Module, seed: int = 1) -> nn.Module:
    """Adapter values as after a run: PEFT's B starts at zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.copy_(torch.randn(param.shape, generator=g) * 0.3)
    return model


def lora(base: nn.Module, folder: Path, **options: Any) -> Any:
    model = drawn(peft.get_peft_model(base, peft.LoraConfig(**options))).eval()
    model.save_pretrained(folder)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def same_outputs(ours: nn.Module, theirs: nn.Module, base: nn.Module, atol: float = 1e-5) -> None:
    expected = logits(theirs)
    assert float((expected - logits(base)).abs().max()) > 1e-2
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=atol)


LORAS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": TARGETS},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": TARGETS,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"v_proj": 1, r"^model\.layers\.0\.self_attn\.q_proj": 9},
    },
    "wider than a layer": {"r": 20, "lora_alpha": 6, "target_modules": TARGETS},
}


@pytest.mark.parametrize("kind", LORAS)
def test_lora_by_its_singular_values(tmp_path, kind) -> None:
    theirs = lora(llama(), tmp_path, **LORAS[kind])
    ours = igulora.import_peft(llama(), tmp_path).eval()
    same_outputs(ours, theirs, llama())
    modules = dict(theirs.named_modules())
    for name, layer in zip(find_bank(ours).names, adapted_layers(ours), strict=True):
        their = modules[f"base_model.model.{name}"]
        delta = their.get_delta_weight("default")
        torch.testing.assert_close(layer.delta_weight(), delta, rtol=1e-5, atol=1e-6)
        size = their.r["default"]
        assert layer.r == size
        values = torch.linalg.svdvals(delta)
        kept = min(size, values.numel())
        torch.testing.assert_close(layer.scale * layer.lora_E[:kept], values[:kept], rtol=1e-5, atol=1e-6)
        for rows in (layer.lora_P, layer.lora_Q):
            directions = rows[: min(size, layer.in_features, layer.out_features)]
            torch.testing.assert_close(directions @ directions.t(), torch.eye(len(directions)), rtol=0, atol=1e-6)
    assert list(find_bank(ours).names) == [n for n, m in ours.named_modules() if isinstance(m, igulora.FusedSVDLinear)]


def test_lora_of_gpt2_with_transposed_weights(tmp_path) -> None:
    targets = ["c_attn", "c_proj"]
    theirs = lora(gpt2(), tmp_path, r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out=True)
    same_outputs(igulora.import_peft(gpt2(), tmp_path), theirs, gpt2())


def test_lora_with_a_trained_head(tmp_path) -> None:
    cls = {"cls": "LlamaForSequenceClassification", "num_labels": 3}
    theirs = lora(llama(**cls), tmp_path, r=3, target_modules=TARGETS, task_type="SEQ_CLS")
    with torch.no_grad():
        theirs.base_model.model.score.modules_to_save["default"].weight.normal_()
    theirs.save_pretrained(tmp_path)
    ours = igulora.import_peft(llama(**cls), tmp_path)
    same_outputs(ours, theirs, llama(**cls))
    assert ours.igulora_config.modules_to_save == ["score"]
    assert [n for n, p in ours.named_parameters() if p.requires_grad and "lora" not in n] == ["score.module.weight"]


def test_lora_in_half_precision(tmp_path) -> None:
    lora(llama(), tmp_path, r=3, target_modules=TARGETS)
    half = {k: v.bfloat16() for k, v in load_file(tmp_path / WEIGHTS).items()}
    save_file(half, tmp_path / WEIGHTS)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    same_outputs(igulora.import_peft(llama(), tmp_path), theirs, llama())


@pytest.mark.parametrize("method", ["igu", "adalora", "lora"])
def test_more_triplets_than_the_lora_has_start_at_nothing(tmp_path, method) -> None:
    theirs = lora(llama(), tmp_path, r=3, lora_alpha=6, target_modules=TARGETS)
    config = igulora.IGUConfig(method=method, r=7, total_steps=200, lora_alpha=14)
    ours = igulora.import_peft(llama(), tmp_path, config)
    same_outputs(ours, theirs, llama())
    assert ours.igulora_config.init == (
        "lora" if method == "lora" else "orthonormal"
    )  # lambda learns as fast as suits the rows
    for layer in adapted_layers(ours):
        assert layer.r == 7
        assert layer.scale == 2.0
        value = layer.lora_P if method == "lora" else layer.lora_E
        assert not value[3:].any()
        assert value[:3].abs().min() > 0
        for rows in (layer.lora_Q,) if method == "lora" else (layer.lora_P, layer.lora_Q):
            torch.testing.assert_close(rows @ rows.t(), torch.eye(7), rtol=0, atol=1e-6)
        assert layer.lora_E.requires_grad == (method != "lora")


def test_an_imported_lora_is_pruned_from_its_own_triplets(tmp_path, config) -> None:
    theirs = lora(llama(), tmp_path, r=4, target_modules=TARGETS)
    ours = igulora.import_peft(llama(), tmp_path, config(r=4, target_rank=2))
    same_outputs(ours, theirs, llama())
    losses = train(ours, igulora.Controller(ours), 20)
    assert losses[-1] < losses[0]
    assert sum(find_bank(ours).ranks().values()) == 2 * len(find_bank(ours).names)


def train(model: nn.Module, controller: igulora.Controller, steps: int) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))
    labels = {"labels": IDS} if "Causal" in type(model).__name__ else {"labels": LABELS}
    losses = []
    for _ in range(steps):
        losses.append(float(controller.backward(lambda b: model(**b).loss, {"input_ids": IDS, **labels})))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    model.eval()
    return losses


@pytest.mark.parametrize("uniform", [False, True])
def test_lora_in_and_out_again(tmp_path, uniform) -> None:
    theirs = lora(llama(), tmp_path / "in", **LORAS["patterns"])
    ours = igulora.import_peft(llama(), tmp_path / "in")
    igulora.export_peft(ours, tmp_path / "out", uniform_rank=uniform)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "out")
    same_outputs(again, theirs, llama())
    save_then_load = igulora.load_adapter(llama(), igulora.save_adapter(ours, tmp_path / "kept"))
    same_outputs(save_then_load, theirs, llama())


def adalora(folder: Path, steps: int, base: nn.Module | None = None, **changes: Any) -> Any:
    """PEFT's own AdaLoRA, trained ``steps`` steps and saved."""
    base = llama("LlamaForSequenceClassification", num_labels=3) if base is None else base
    options = {
        "init_r": INIT_R, "target_r": 2, "total_step": TOTAL, "tinit": T_INIT, "tfinal": T_FINAL, "deltaT": DELTA, "lora_alpha": 8,
        "target_modules": TARGETS, "task_type": "SEQ_CLS",
    }  # fmt: skip
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.AdaLoraConfig(**{**options, **changes}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    labels = IDS if changes.get("task_type") == "CAUSAL_LM" else LABELS
    for step in range(steps):
        model(input_ids=IDS, labels=labels).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return model


def classifier() -> nn.Module:
    return llama("LlamaForSequenceClassification", num_labels=3)


def reloaded(folder: Path, base: nn.Module | None = None) -> Any:
    """What PEFT makes of the folder: between two of its allocations a live model has triplets that it does not save."""
    return peft.PeftModel.from_pretrained(classifier() if base is None else base, folder).eval()


# Before the first allocation, right after one, between two, and when ranks are fixed.
@pytest.mark.parametrize("steps", [3, 7, 9, 13, TOTAL])
def test_adalora_at_any_step_of_its_schedule(tmp_path, steps) -> None:
    adalora(tmp_path, steps)
    theirs = reloaded(tmp_path)
    ours = igulora.import_peft(classifier(), tmp_path)
    same_outputs(ours, theirs, classifier())
    modules = dict(theirs.named_modules())
    pruned = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
    assert (pruned is None) == (steps <= T_INIT)
    for name, layer in zip(find_bank(ours).names, adapted_layers(ours), strict=True):
        their = modules[f"base_model.model.{name}"]
        assert torch.equal(layer.lora_P, their.lora_B["default"].t())
        assert torch.equal(layer.lora_E, their.lora_E["default"].flatten())
        assert torch.equal(layer.lora_Q, their.lora_A["default"])
        torch.testing.assert_close(layer.delta_weight(), their.get_delta_weight("default"), rtol=1e-6, atol=1e-7)
        assert layer.r == (INIT_R if pruned is None else sum(pruned[f"{name}.lora_E"]))
    assert find_bank(ours).ranks() == {
        n: layer.r for n, layer in zip(find_bank(ours).names, adapted_layers(ours), strict=True)
    }


def test_peft_1539_a_layer_of_rank_zero_is_imported(tmp_path) -> None:
    adalora(tmp_path, TOTAL, target_r=1, lora_alpha=40)
    theirs = reloaded(tmp_path)
    ours = igulora.import_peft(classifier(), tmp_path)
    assert 0 in find_bank(ours).ranks().values()
    same_outputs(ours, theirs, classifier())
    assert igulora.Controller(ours).budget == find_bank(ours).triplets


@pytest.mark.parametrize("method", ["igu", "adalora"])
def test_training_goes_on_with_a_config_from_the_imported_ranks(tmp_path, config, method) -> None:
    adalora(tmp_path, 10)
    changes = {"estimator": None, "window": 1} if method == "adalora" else {}
    options = config(method=method, r=9, target_rank=1, modules_to_save=[], lora_alpha=3, **changes)
    ours = igulora.import_peft(classifier(), tmp_path, options)
    bank = find_bank(ours)
    imported = bank.triplets
    assert len(bank.names) < imported < INIT_R * len(bank.names)
    controller = igulora.Controller(ours)
    assert controller.budget == imported
    assert not controller.importance.updates
    same_outputs(ours, reloaded(tmp_path), classifier())
    losses = train(ours, controller, 20)
    assert losses[-1] < losses[0]
    assert [entry["budget"] for entry in controller.history] == sorted(
        (e["budget"] for e in controller.history), reverse=True
    )
    assert sum(controller.live_ranks().values()) == len(bank.names)
    fresh = igulora.load_adapter(classifier(), igulora.save_adapter(ours, tmp_path / "kept", controller))
    torch.testing.assert_close(logits(fresh), logits(ours), rtol=0, atol=1e-6)


def test_the_folders_own_schedule_goes_on_from_a_step(tmp_path) -> None:
    steps = 10
    model = adalora(tmp_path, steps)
    ours = igulora.import_peft(classifier(), tmp_path, step=steps)
    config, bank = ours.igulora_config, find_bank(ours)
    assert (config.method, config.target_rank, config.total_steps) == ("adalora", 2, TOTAL - steps)
    assert (config.t_init, config.t_final, config.delta_t, config.orthogonality) == (3, T_FINAL, DELTA, 0.5)
    schedule, theirs = igulora.Controller(ours).allocator.schedule, model.base_model.rankallocator
    assert schedule.target == theirs.target_bgt
    assert schedule.initial == bank.triplets
    controller = igulora.Controller(ours)
    train(ours, controller, TOTAL - steps)
    assert sum(controller.live_ranks().values()) == theirs.target_bgt


def test_the_cubic_budget_from_a_step_between_is_the_same_curve(tmp_path) -> None:
    options = {"init_r": 40, "total_step": 400, "tinit": 10, "tfinal": 40, "deltaT": 1}
    model = adalora(tmp_path, 0, **options)
    allocator, at = model.base_model.rankallocator, 100
    now, _ = allocator.budget_schedule(at)
    pattern = {}
    for i, name in enumerate(
        sorted(
            name.removesuffix(".lora_E.default")
            for name, _ in model.base_model.model.named_parameters()
            if "lora_E" in name
        )
    ):
        share = now // 6 + (i < now % 6)
        pattern[f"{name}.lora_E"] = [j < share for j in range(40)]
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(tmp_path)
    ours = igulora.import_peft(classifier(), tmp_path, step=at)
    schedule = igulora.Controller(ours).allocator.schedule
    assert schedule.initial == now
    for step in range(at + 10, 400):
        assert abs(schedule.budget(step - at) - allocator.budget_schedule(step)[0]) <= 3


def test_after_the_last_allocation_ranks_stay(tmp_path) -> None:
    adalora(tmp_path, TOTAL - 2)
    ours = igulora.import_peft(classifier(), tmp_path, step=TOTAL - 2)
    assert ours.igulora_config.method == "lora"
    before = find_bank(ours).ranks()
    train(ours, igulora.Controller(ours), 3)
    assert find_bank(ours).ranks() == before
    assert all(layer.lora_E.requires_grad for layer in adapted_layers(ours))


def test_zero_lambdas_without_a_rank_pattern_were_pruned(tmp_path) -> None:
    adalora(tmp_path, 3)
    tensors = load_file(tmp_path / WEIGHTS)
    keys = sorted(key for key in tensors if key.endswith("lora_E"))
    tensors[keys[0]][1:3] = 0.0
    tensors[keys[1]][:] = 0.0
    save_file(tensors, tmp_path / WEIGHTS)
    ours = igulora.import_peft(classifier(), tmp_path)
    names = [key.removeprefix("base_model.model.").removesuffix(".lora_E") for key in keys]
    ranks = find_bank(ours).ranks()
    assert [ranks[name] for name in names] == [INIT_R - 2, 0, *[INIT_R] * 4]
    same_outputs(ours, reloaded(tmp_path), classifier())


def test_an_untrained_adalora_keeps_all_its_triplets(tmp_path) -> None:
    adalora(tmp_path, 0)
    ours = igulora.import_peft(classifier(), tmp_path, step=0)
    assert set(find_bank(ours).ranks().values()) == {INIT_R}
    torch.testing.assert_close(logits(ours), logits(reloaded(tmp_path)), rtol=0, atol=1e-6)


def test_an_alpha_of_zero_stands_for_the_rank(tmp_path) -> None:
    adalora(tmp_path, 10, lora_alpha=0)
    same_outputs(igulora.import_peft(classifier(), tmp_path), reloaded(tmp_path), classifier())


def test_adalora_of_gpt2(tmp_path) -> None:
    adalora(
        tmp_path,
        10,
        gpt2(),
        target_modules=["c_attn", "c_fc"],
        task_type="CAUSAL_LM",
        fan_in_fan_out=True,
        lora_alpha=40,
    )
    same_outputs(igulora.import_peft(gpt2(), tmp_path), reloaded(tmp_path, gpt2()), gpt2())


def test_adalora_in_and_out_as_a_plain_lora(tmp_path) -> None:
    adalora(tmp_path / "in", 13)
    ours = igulora.import_peft(classifier(), tmp_path / "in")
    again = reloaded(igulora.export_peft(ours, tmp_path / "out"))
    same_outputs(again, reloaded(tmp_path / "in"), classifier())


@pytest.fixture
def folder(tmp_path) -> Path:
    lora(llama(), tmp_path, r=3, target_modules=TARGETS)
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


def refused(folder: Path, match: str, error: type[Exception] = ValueError, **options: Any) -> None:
    """The error comes, and the model is as it was."""
    model = llama()
    before = {name: type(module) for name, module in model.named_modules()}
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        igulora.import_peft(model, folder, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in values.items())
    assert all(param.requires_grad for param in model.parameters())
    assert not hasattr(model, "igulora_bank")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "LORA or ADALORA .* got 'IA3'"),
        ({"use_dora": True}, "use_dora=True: DoRA's magnitudes"),
        ({"bias": "all"}, "bias='none' .* got 'all'"),
        ({"lora_bias": True}, "biases of B"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1, 2]}, "trained tokens"),
        ({"r": "three"}, "expected r to be a number"),
        ({"r": 4}, "files of two adapters were mixed"),
        ({"rank_pattern": {"q_proj": 2}}, "files of two adapters were mixed"),
        ({"rank_pattern": ["q_proj"]}, "expected rank_pattern to be a table"),
        ({"alpha_pattern": {"q_proj(": 2}}, "expected expressions as keys of alpha_pattern"),
        ({"alpha_pattern": {"q_proj": "2"}}, "expected numbers in alpha_pattern"),
        ({"modules_to_save": "score"}, "expected modules_to_save to be a list"),
    ],
)
def test_configs_that_cannot_be_imported(folder, changes, match) -> None:
    edit(folder, **changes)
    refused(folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, k: t.pop(k), "expected A, B of"),
        (lambda t, k: t.update({k: t[k][:2].clone()}), "factors of one rank"),
        (lambda t, k: t.update({k: t[k] * float("nan")}), "expected finite numbers"),
        (lambda t, k: t.update({"lm_head.weight": t[k].clone()}), "begin with 'base_model.model.'"),
        (lambda t, k: t.update({"base_model.model.model.embed_tokens.weight": t[k].clone()}), "save_embedding_layers=False"),
        (lambda t, k: t.update({"base_model.model.e.lora_embedding_A": t[k].clone()}), "adapters of embeddings"),
        (lambda t, k: t.update({k: torch.zeros(3, 16, 1, 1)}), "a convolution"),
        (lambda t, k: t.clear(), "at least one adapted layer"),
        (lambda t, k: t.update({k: torch.zeros(3, 16, dtype=torch.int64)}), "factors of one rank"),
    ],
)  # fmt: skip
def test_tensors_that_cannot_be_imported(folder, change, match) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors, next(key for key in tensors if key.endswith("q_proj.lora_A.weight")))
    save_file(tensors, folder / WEIGHTS)
    refused(folder, match)


def test_a_pickle_is_not_read(folder) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, "a pickle, which can run any program .*save_pretrained")
    (folder / "adapter_model.bin").unlink()
    refused(folder, f"expected {WEIGHTS}", FileNotFoundError)
    (folder / CONFIG).unlink()
    refused(folder, f"expected {CONFIG} .* PEFT wrote", FileNotFoundError)


def test_a_truncated_file_is_named(folder) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused(folder, "truncated or foreign")


def test_the_adapter_of_another_model(tmp_path) -> None:
    lora(llama(intermediate_size=28), tmp_path / "wide", r=3, target_modules=TARGETS)
    refused(tmp_path / "wide", r"up_proj: \(out, in\) = \(28, 16\), the model's is \(24, 16\)")
    lora(llama(num_hidden_layers=3), tmp_path / "deep", r=3, target_modules=TARGETS)
    refused(tmp_path / "deep", "layers.2.self_attn.q_proj: .* not in the model")


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_a_tied_head(tmp_path) -> None:
    model = peft.get_peft_model(
        llama(tie_word_embeddings=True), peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"])
    )
    drawn(model).save_pretrained(tmp_path, save_embedding_layers=False)
    model = llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.* tied to another module"):
        igulora.import_peft(model, tmp_path)


def test_options_that_do_not_fit(folder, tmp_path) -> None:
    refused(folder, "raise r", config=igulora.IGUConfig(r=2, total_steps=200))
    refused(folder, "which has no schedule", step=3)
    refused(folder, "expected an IGUConfig", TypeError, config={"r": 8})
    adalora(tmp_path / "ada", 3)
    with pytest.raises(ValueError, match="leave one out"):
        igulora.import_peft(classifier(), tmp_path / "ada", igulora.IGUConfig(total_steps=200), step=3)
    with pytest.raises(ValueError, match=f"0 <= step < {TOTAL}"):
        igulora.import_peft(classifier(), tmp_path / "ada", step=TOTAL)
    adapted = igulora.import_peft(classifier(), tmp_path / "ada")
    with pytest.raises(ValueError, match="adapted already"):
        igulora.import_peft(adapted, tmp_path / "ada")


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ({}, None),
        ({"model.layers.0.self_attn.q_proj.lora_E": [True] * INIT_R}, "of .* live, got none"),
        ("short", "which rows of .* live"),
    ],
)
def test_rank_patterns_that_do_not_fit(tmp_path, pattern, match) -> None:
    adalora(tmp_path, 10)
    if pattern == "short":
        whole = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
        pattern = {name: [*flags, True] for name, flags in whole.items()}
    edit(tmp_path, rank_pattern=pattern)
    if match is None:  # without one, what is in the file is what there is
        assert sum(find_bank(igulora.import_peft(classifier(), tmp_path)).ranks().values())
        return
    with pytest.raises(ValueError, match=match):
        igulora.import_peft(classifier(), tmp_path)
