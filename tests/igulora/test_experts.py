"""Experts as 3-D parameters: triplets for every expert's slice, in models as transformers builds them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import igulora
from igulora import find_bank
from igulora.adapt import adapted_layers
from igulora.experts import AdaptedExperts, ExpertLinear

transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 40, (4, 6), generator=torch.Generator().manual_seed(5))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
MODELS = {
    "Mixtral": {"intermediate_size": 12, "num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 12, "intermediate_size": 20, "num_experts": 5, "norm_topk_prob": True},
    "GptOss": {"intermediate_size": 12, "num_local_experts": 4, "sliding_window": 8},
}


def build(kind: str = "Mixtral", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **MODELS[kind], **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if (
                "experts" in name or "router" in name or "mlp.gate" in name
            ):  # large enough to matter, and to route apart
                param.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def options(**changes: Any) -> igulora.IGUConfig:
    values = {
        "r": 3, "target_rank": 1, "total_steps": 20, "t_init": 7, "t_final": 5, "delta_t": 2, "window": 2, "ig_every": 1,
        "ig_fraction": 1.0, "init": "orthonormal", "target_modules": [], "target_parameters": EXPERTS, "lora_alpha": 6,
    }  # fmt: skip
    return igulora.IGUConfig(**{**values, **changes})


def trained_look(model: nn.Module, seed: int = 1) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model):
        nn.init.normal_(layer.lora_E, generator=g)
        layer.mask.copy_((torch.rand(layer.r, generator=g) < 0.7).float())
    return model


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def dense(model: nn.Module, plain: nn.Module, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """The weights of the 3-D parameters with alpha times the update added, as functions of the adapter's parameters."""
    out = {}
    for name, layer in zip(find_bank(model).names, adapted_layers(model), strict=True):
        parameter, index = name.rsplit(".", 1)
        coefficients = layer.scale * layer.mask * layer.lora_E * alpha
        delta = (layer.lora_P.t() * coefficients) @ layer.lora_Q
        stored = plain.get_parameter(parameter)
        assert int(index) == len(out.setdefault(parameter, []))
        out[parameter].append(
            stored[int(index)]
            + (delta if stored[0].shape == delta.shape and not layer.base_layer.transposed else delta.t())
        )
    return {name: torch.stack(values) for name, values in out.items()}


def plain_loss(model: nn.Module, plain: nn.Module, ids: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """The loss of the plain model with dense updates, which autograd differentiates."""
    return torch.func.functional_call(plain, dense(model, plain, alpha), (), {"input_ids": ids, "labels": ids}).loss


@pytest.mark.parametrize("kind", MODELS)
def test_the_start_is_the_base_model_and_every_expert_has_triplets(kind) -> None:
    model = build(kind)
    before = logits(model)
    parameters = {name: param.data_ptr() for name, param in model.named_parameters()}
    igulora.adapt(model, options())
    bank = find_bank(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    experts = 5 if kind == "Qwen3Moe" else 4
    assert len(bank.names) == 2 * 2 * experts
    assert "model.layers.0.mlp.experts.gate_up_proj.3" in bank.names
    assert all(
        bank.names[i] == name
        for i, (name, m) in enumerate((n, m) for n, m in model.named_modules() if isinstance(m, ExpertLinear))
    )
    kept = {
        name.replace(".base_layer", ""): p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name
    }
    assert kept == parameters, "a base weight was copied"
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_outputs_and_gradients_are_those_of_dense_weights(kind, targets) -> None:
    plain = build(kind)
    model = trained_look(igulora.adapt(build(kind), options(target_parameters=targets)))
    ours = model(input_ids=IDS, labels=IDS).loss
    theirs = plain_loss(model, plain, IDS)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert float((logits(model) - logits(plain)).abs().max()) > 1e-3
    params = [p for layer in adapted_layers(model) for p in (layer.lora_P, layer.lora_E, layer.lora_Q)]
    expected = torch.autograd.grad(theirs, params)
    ours.backward()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-4, atol=1e-6)
    assert any(bool(g.any()) for g in expected)


def test_an_expert_without_tokens_gets_gradients_of_zero() -> None:
    model = trained_look(igulora.adapt(build(), options()))
    for layer in adapted_layers(model):
        layer.mask.fill_(1.0)
    for param in model.parameters():
        param.grad = None
    model(input_ids=IDS[:1, :1]).logits.square().sum().backward()  # one token: two experts of four
    moved = {}
    for name, layer in zip(find_bank(model).names, adapted_layers(model), strict=True):
        gradients = [layer.lora_P.grad, layer.lora_E.grad, layer.lora_Q.grad]
        assert all(g is not None for g in gradients)
        assert len({bool(g.any()) for g in gradients}) == 1
        moved.setdefault(name.rsplit(".", 1)[0], []).append(bool(gradients[0].any()))
    assert [sum(experts) for experts in moved.values()] == [2] * 4


@pytest.mark.parametrize("kind", MODELS)
def test_an_alpha_for_every_sequence_reaches_its_tokens(kind) -> None:
    model, plain = trained_look(igulora.adapt(build(kind), options())), build(kind)
    alphas = torch.tensor([1.0, 0.25, 0.6, 0.0])
    with find_bank(model).context.at(alphas):
        ours = logits(model)
    for i, alpha in enumerate(alphas.tolist()):
        with torch.no_grad():
            call = torch.func.functional_call(plain, dense(model, plain, alpha), (), {"input_ids": IDS[i : i + 1]})
        torch.testing.assert_close(ours[i : i + 1], call.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_mixed_batch_trains_and_samples_as_separate_passes_do(kind) -> None:
    found = {}
    for path_pass in ("mixed", "separate"):
        model = trained_look(igulora.adapt(build(kind), options(path_pass=path_pass, orthogonality=0.0)))
        model.train()
        controller = igulora.Controller(model)
        controller.backward(lambda b, m=model: m(**b).loss, {"input_ids": IDS, "labels": IDS})
        bank = find_bank(model)
        assert controller.passes.sampled
        found[path_pass] = bank.grad.clone(), bank.path.clone()
    for mixed, separate in zip(*found.values(), strict=True):
        torch.testing.assert_close(mixed, separate, rtol=1e-3, atol=1e-6)
        assert bool(mixed.any())


def test_the_path_sample_is_the_gradient_at_its_alpha() -> None:
    """Each path row's gradient with respect to dense weights at alpha, chained to the factors: ALGORITHMS 1."""
    model, plain = trained_look(igulora.adapt(build(), options())), build()
    bank, alpha = find_bank(model), 0.3
    bank.path.zero_()
    one = torch.ones(2)
    with bank.context.at(one * alpha, 0, 0, one):
        model(input_ids=IDS[:2], labels=IDS[:2]).loss.backward()
    params = [p for layer in adapted_layers(model) for p in (layer.lora_P, layer.lora_E, layer.lora_Q)]
    expected = torch.autograd.grad(plain_loss(model, plain, IDS[:2], alpha), params)
    for layer, start in zip(adapted_layers(model), range(0, len(params), 3), strict=True):
        for sample, gradient in zip(bank.context.accumulators[layer.slot], expected[start : start + 3], strict=True):
            torch.testing.assert_close(sample.reshape(gradient.shape) * alpha, gradient, rtol=1e-4, atol=1e-6)
    assert all(param.grad is None or not param.grad.any() for param in params)


@pytest.mark.parametrize("kind", MODELS)
def test_merge_unmerge_and_remove(kind) -> None:
    model = trained_look(igulora.adapt(build(kind), options()))
    adapted, base = logits(model), logits(build(kind))
    assert float((adapted - base).abs().max()) > 1e-3
    igulora.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5)
    igulora.unmerge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5)
    with igulora.adapters_disabled(model):
        torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-5)
    igulora.remove(igulora.merge(model))
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5)
    plain = build(kind)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("kind", MODELS)
def test_save_and_load(tmp_path, kind) -> None:
    model = trained_look(igulora.adapt(build(kind), options(target_modules="all-linear")))
    names = find_bank(model).names
    assert any("q_proj" in name for name in names)
    other = igulora.load_adapter(build(kind), igulora.save_adapter(model, tmp_path))
    assert find_bank(other).names == names
    assert other.igulora_config == model.igulora_config
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"gate_up_proj.* the model's is"):
        igulora.load_adapter(build(kind, hidden_size=24), tmp_path)


def test_copies_and_pickles() -> None:
    model = trained_look(igulora.adapt(build(), options()))
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)
        part = adapted_layers(other)[0].base_layer
        assert part.experts is other.model.layers[0].mlp.experts.base_layer
        with torch.no_grad():
            adapted_layers(other)[0].lora_E.add_(1.0)
        assert float((logits(other) - logits(model)).abs().max()) > 0


@pytest.mark.parametrize("method", ["igu", "adalora"])
def test_a_schedule_prunes_whole_experts(method) -> None:
    changes = {"window": 1} if method == "adalora" else {}
    model = igulora.adapt(build(), options(method=method, **changes)).train()
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))
    controller = igulora.Controller(model)
    ids = IDS.clamp(max=9)
    losses = []
    for _ in range(20):
        losses.append(float(controller.backward(lambda b: model(**b).loss, {"input_ids": ids, "labels": ids})))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    ranks = controller.live_ranks()
    assert losses[-1] < losses[0]
    assert sum(ranks.values()) == len(ranks)
    assert {0, 2} <= set(ranks.values())
    before = logits(model.eval())
    igulora.compact(model, optimizer, controller)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointed in (False, True):
        model = trained_look(igulora.adapt(build(), options())).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append(find_bank(model).grad.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_bfloat16_experts_keep_float32_masters() -> None:
    model = trained_look(igulora.adapt(build(intermediate_size=16).bfloat16(), options()))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(bool(torch.isfinite(layer.lora_E.grad).all()) for layer in adapted_layers(model))
    merged = logits(igulora.merge(model))
    torch.testing.assert_close(merged, out.logits, rtol=0, atol=0.15)


def test_ranks_by_parameter_and_by_expert() -> None:
    pattern = {"experts.down_proj": 1, "layers.1.mlp.experts.down_proj.2": 2, "gate_up_proj.0": 0}
    ranks = find_bank(igulora.adapt(build(), options(rank_pattern=pattern))).ranks()
    assert ranks["model.layers.0.mlp.experts.down_proj.2"] == 1
    assert ranks["model.layers.0.mlp.experts.gate_up_proj.0"] == 0
    assert ranks["model.layers.0.mlp.experts.gate_up_proj.1"] == 3
    pattern = {"layers.1.mlp.experts.down_proj.2": 2, "experts.down_proj": 1}
    ranks = find_bank(igulora.adapt(build(), options(rank_pattern=pattern))).ranks()
    assert ranks["model.layers.1.mlp.experts.down_proj.2"] == 2
    with pytest.raises(ValueError, match="experts.down_prj"):
        igulora.adapt(build(), options(rank_pattern={"experts.down_prj": 1}))


def test_all_linear_leaves_experts_alone_and_exclusions_hold() -> None:
    model = igulora.adapt(build(), options(target_modules="all-linear", target_parameters=[]))
    assert not any("experts" in name for name in find_bank(model).names)
    model = igulora.adapt(build(), options(exclude_modules=["layers.0"]))
    assert {name.split(".")[2] for name in find_bank(model).names} == {"1"}


class OwnExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(2, 3, 4))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.fc = OwnExperts(), nn.Linear(4, 4)


def refused(model: nn.Module, match: str, error: type[Exception] = ValueError, **changes: Any) -> None:
    before = [type(m) for m in model.modules()]
    with pytest.raises(error, match=match):
        igulora.adapt(model, options(**changes))
    assert [type(m) for m in model.modules()] == before
    assert not hasattr(model, "igulora_bank")


def test_parameters_that_cannot_be_adapted_are_named() -> None:
    refused(build(), "matches none. Did you mean .*down_proj", target_parameters=["experts.down_prj"])
    refused(Own(), "OwnExperts is none of the experts", target_parameters=["experts.down_proj"])
    refused(build(), "it has 2 dimensions, not three; name its module", target_parameters=["q_proj.weight"])
    refused(build().to(torch.float8_e4m3fn), "float8_e4m3fn")
    refused(build(), "list of names", TypeError, target_parameters="experts.down_proj")
    parallel = build()
    parallel.model.layers[0].mlp.experts._is_expert_parallel = True
    refused(parallel, "expert parallelism")
    with pytest.raises(ValueError, match="adapted already"):
        igulora.adapt(igulora.adapt(build(), options()), options())


def test_a_router_loss_that_couples_rows_is_refused_in_a_mixed_batch() -> None:
    model = igulora.adapt(build(output_router_logits=True), options())
    with pytest.raises(ValueError, match="router balancing loss"):
        igulora.Controller(model)


def test_tokens_that_belong_to_no_sequence_are_refused() -> None:
    model = igulora.adapt(build(), options())
    with find_bank(model).context.at(torch.ones(5)), pytest.raises(ValueError, match="tokens of 5 sequences"):
        logits(model)


def test_the_wrapped_module_still_answers_for_its_own() -> None:
    model = igulora.adapt(build(), options())
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, AdaptedExperts)
    assert experts.num_experts == 4
    with pytest.raises(AttributeError):
        _ = experts.nothing_of_the_kind


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("source", ["model", "folder"])
@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_peft_loads_exported_experts(tmp_path, kind, source, targets) -> None:
    peft = pytest.importorskip("peft")
    model = trained_look(
        igulora.adapt(build(kind), options(target_parameters=targets, target_modules=["q_proj"], dropout=0.1))
    )
    for layer in adapted_layers(model)[:4]:
        layer.mask.zero_()  # of the first layer nothing lives but a part of its experts
    held = model if source == "model" else igulora.save_adapter(model, tmp_path / "saved")
    for uniform in (False, True):
        folder = igulora.export_peft(held, tmp_path / f"out-{uniform}", uniform_rank=uniform)
        other = peft.PeftModel.from_pretrained(build(kind), folder).eval()
        torch.testing.assert_close(logits(other), logits(model.eval()), rtol=0, atol=1e-5)
        assert float((logits(other) - logits(build(kind))).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_peft_loads_experts_without_any_layer(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = trained_look(igulora.adapt(build(), options()))
    for name, layer in zip(find_bank(model).names, adapted_layers(model), strict=True):
        if "layers.0.mlp.experts.gate_up_proj" in name:
            layer.mask.zero_()
    other = peft.PeftModel.from_pretrained(build(), igulora.export_peft(model, tmp_path)).eval()
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-5)
    for layer in adapted_layers(model):
        layer.mask.zero_()
    with pytest.raises(ValueError, match="got none; train the adapter first"):
        igulora.export_peft(model, tmp_path)


def test_blocks_and_ranks_by_parameter_and_by_slice() -> None:
    whole, one = "layers.1.mlp.experts.down_proj", "layers.1.mlp.experts.down_proj.2"
    config = options(
        target_modules=["o_proj"],
        block_pattern={"experts.gate_up_proj": 4, whole: 2, one: 1},
        rank_pattern={"experts.down_proj": 2, "o_proj": 1},
    )
    model = igulora.adapt(build(), config)
    for name, rank in find_bank(model).ranks().items():
        assert rank == config.rank_at_start(name)
        blocks, r = config.blocks_of(name), config.rank_of(name)
        assert rank == blocks * r
        if "gate_up_proj" in name:
            assert (blocks, r) == (4, 3)
        elif "down_proj" in name:
            assert (blocks, r) == (2 if whole in name and not name.endswith(one) else 1, 2)
        else:
            assert (blocks, r) == (1, 1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match="expected block_pattern to name adapted layers, got 'experts.up_proj'"):
        igulora.adapt(build(), options(block_pattern={"experts.up_proj": 2}))
