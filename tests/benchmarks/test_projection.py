"""Projections: what two shallow models say of a deep one, what meta tensors are answered, shapes, and the committed page."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("triton")

from igulora.benchmarks.cases import CASES, MODELS, Case
from igulora.benchmarks.methods import METHODS
from igulora.benchmarks.models import load_model
from igulora.benchmarks.projection import page as projection_page
from igulora.benchmarks.projection.checks import FIGURES, against_counted, against_pytorch, shape_of
from igulora.benchmarks.projection.meta import MetaDevice, comparisons_of_a_sort
from igulora.benchmarks.projection.project import (
    Projected,
    StepCount,
    count_steps,
    extrapolated,
    grown,
    mean_of,
    project,
    project_method,
)
from igulora.benchmarks.projection.shapes import Shape, find_shape, frozen, linears_of
from igulora.benchmarks.record import newest
from igulora.measure.costs import Cost
from igulora.measure.counting import Counting
from igulora.measure.roofline import CARDS, PROJECTION, Roofline

NAMES = ("floor", "instantaneous", "default", "peft-lora", "peft-adalora")
TINY = Shape(
    "tiny",
    "tiny",
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    },
)
CASE = Case("tiny", "tiny", rows=4, length=16, rank=8, target_rank=4)
ENCODER = Shape(
    "encoder",
    "encoder",
    {
        "model_type": "roberta",
        "architectures": ["RobertaForSequenceClassification"],
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
    },
)


def check_projected_is_counted_in_full_depth(name: str, shape: Shape) -> None:
    """To the byte."""
    roofline = Roofline()
    projected = project_method(name, shape, CASE, roofline)
    deep = count_steps(name, shape, CASE, shape.layers, roofline.card.where)
    assert projected.keys() == deep.keys()
    for kind, (share, count) in deep.items():
        assert projected[kind].cost == count.cost
        assert projected[kind].syncs == dict(count.syncs)
        assert projected[kind].share == share
        assert projected[kind].device_s == pytest.approx(count.device_seconds(roofline), rel=1e-9)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n == "default" else n for n in NAMES])
def test_two_shallow_models_say_what_a_deep_one_costs(name: str) -> None:
    assert TINY.even
    check_projected_is_counted_in_full_depth(name, TINY)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            marks=pytest.mark.long,
        ),
        {"model_type": "smollm3", "no_rope_layer_interval": 2},
        pytest.param(
            {
                "model_type": "gemma3_text",
                "sliding_window": 8,
                "head_dim": 16,
                "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            },
            marks=pytest.mark.long,
        ),
    ],
    ids=lambda config: config["model_type"],
)
def test_where_layers_differ_all_of_them_are_counted(config: dict[str, object]) -> None:
    shape = Shape("uneven", "uneven", {**TINY.config, **config})
    assert not shape.even
    check_projected_is_counted_in_full_depth("instantaneous", shape)


def test_launches_of_a_fused_optimizer_do_not_grow_evenly_and_are_exact_all_the_same() -> None:
    """24 layers have 336 matrices of 36 a launch, which no straight line through 14 and 28 hits."""
    shape = Shape("deep", "deep", {**TINY.config, "num_hidden_layers": 24})
    where = Roofline().card.where
    counts = [count_steps("peft-lora", shape, CASE, depth, where)["step"][1] for depth in (1, 2)]
    cost, _, _ = extrapolated(*counts, 23, Roofline())
    deep = count_steps("peft-lora", shape, CASE, 24, where)["step"][1]
    assert cost == deep.cost
    assert cost.launches != counts[0].cost.launches + 23 * (counts[1].cost.launches - counts[0].cost.launches)


def test_grown() -> None:
    assert grown([1, 9], [1, 2, 3, 9], 3) == [1, 2, 3, 2, 3, 2, 3, 9]
    assert grown([], [4], 2) == [4, 4]
    assert grown([5], [5], 7) == [5]
    with pytest.raises(ValueError, match="a block put in"):
        grown([1, 2], [3, 4, 5], 2)


@pytest.mark.long
def test_an_encoder_that_classifies() -> None:
    made = project(ENCODER, Case("e", "e", rows=4, length=16, rank=4, target_rank=2), Roofline(), NAMES)
    assert list(made["methods"]) == list(NAMES)
    means = {name: entry["mean"] for name, entry in made["methods"].items()}
    assert means["floor"]["launches"] < means["instantaneous"]["launches"] < means["peft-adalora"]["launches"]
    assert means["instantaneous"]["syncs"] == 0
    assert means["peft-adalora"]["syncs"] == 3 * 6 + 1  # one list of flags for each matrix, and the threshold
    assert made["what"] == PROJECTION


def test_heads_are_not_adapted() -> None:
    with MetaDevice():
        model = ENCODER.build()
        method = METHODS["instantaneous"](model, Case("e", "e", 4, 16, 4, 2, targets=linears_of(model)))
    assert len(method.controller.bank.names) == 3 * 6
    assert not any("classifier" in name for name in method.controller.bank.names)


def test_projected_is_what_is_counted() -> None:
    """Of a model with weights on this machine; the tiny model's rotary frequencies were cast with its weights: one copy more."""
    base, case = load_model(MODELS["tiny"]), CASES["tiny-4x16"]
    found = against_counted(base, case, NAMES, Roofline().card.where)
    assert list(found) == list(NAMES)
    for kinds in found.values():
        for kind in kinds.values():
            assert set(kind["operators_that_differ"]) == {"aten::_to_copy"}
            projected, counted = (kind[key] for key in ("projected", "counted"))
            assert counted["launches"] - projected["launches"] == 1
            assert 0 < counted["read"] - projected["read"] < 100
            assert counted["flops"] == projected["flops"]
            assert counted["syncs"] == projected["syncs"]
    assert found["peft-adalora"]["step"]["counted"]["syncs"] == 15
    assert all(set(kind["error"]) == set(FIGURES) for kinds in found.values() for kind in kinds.values())


@pytest.mark.parametrize("name", ["floor", "instantaneous", "peft-adalora"])
def test_counters_agree_with_pytorch(name: str) -> None:
    found = against_pytorch(load_model(MODELS["tiny"]), CASES["tiny-4x16"], [name])[name]
    assert found["operators_that_differ"] == {}
    assert found["calls"] == found["calls_by_profiler"] > 200
    assert found["product_flops"] == found["product_flops_by_profiler"] > 0
    assert found["flops"] == found["flops_by_counter"] > found["product_flops"]


def test_shape_of_a_model_builds_its_like() -> None:
    base = load_model(MODELS["tiny"])
    twin = shape_of(base, "tiny").build()
    assert {n: (p.shape, p.dtype) for n, p in base.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in twin.named_parameters()
    }


# -- the meta device --------------------------------------------------------------------------------------------------


def test_answers() -> None:
    with MetaDevice():
        t = torch.zeros(3, 2, device="meta")
        assert t.tolist() == [[1.0, 1.0]] * 3
        assert t.cpu().sum() == 6
        assert t.sum().item() == 1.0
        assert t.to(torch.int64).sum().item() == 1
        assert (t == 0).all()
        assert t.is_meta


def test_sorting_on_the_device_waits_as_often_as_with_values() -> None:
    n = 512
    with MetaDevice() as device, Counting(device="meta") as counting:
        ordered = sorted(torch.zeros(n, device="meta").unbind())
        assert all(bool(a <= b) for a, b in itertools.pairwise(ordered[:50]))
    assert counting.syncs["aten::_local_scalar_dense"] == device.comparisons
    with Counting() as real:
        sorted(torch.rand(n, generator=torch.Generator().manual_seed(0)).add(torch.zeros(n)).unbind())
    expected = real.syncs["aten::_local_scalar_dense"]
    assert device.comparisons - 49 == pytest.approx(expected, rel=0.03)
    assert comparisons_of_a_sort(n) == pytest.approx(expected, rel=0.03)


def test_a_sort_on_the_host_grows_faster_than_the_model() -> None:
    """Of one and two blocks' 56 triplets each, projected to 40 blocks."""

    def of(blocks: int) -> StepCount:
        n = 56 * blocks
        waits = comparisons_of_a_sort(n)
        cost = Cost(100 * blocks + waits)
        return StepCount(cost, Counter({"aten::_local_scalar_dense": waits}), Counter(), comparisons=waits, triplets=n)

    cost, syncs, _ = extrapolated(of(1), of(2), 39, Roofline())
    assert (cost, syncs) == (of(40).cost, of(40).syncs)


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(frozen()))
def test_frozen_configurations_have_as_many_parameters_as_published(name: str) -> None:
    shape = frozen()[name]
    assert sum(p.numel() for p in shape.build().parameters()) == shape.parameters


def check_refused(folder: Path, text: str, message: str) -> None:
    """A folder whose config.json reads ``text`` is no shape."""
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        find_shape(str(folder))


def test_shapes_by_name(tmp_path) -> None:
    assert find_shape("Llama-3-8B").name == "llama-3-8b"
    assert find_shape("meta-llama/Llama-2-7b-hf").name == "llama-2-7b"
    (tmp_path / "config.json").write_text(json.dumps(TINY.config), encoding="utf-8")
    assert find_shape(str(tmp_path)).layers == 4
    assert find_shape(str(tmp_path / "config.json")).config == TINY.config
    with pytest.raises(ValueError, match="Did you mean 'llama-3-8b'"):
        find_shape("lama-3-8b")
    with pytest.raises(ValueError, match="does not exist"):
        find_shape(str(tmp_path / "other.json"))
    check_refused(tmp_path, "{", "not JSON")
    check_refused(tmp_path, '{"model_type": "llama"}', "without num_hidden_layers")


@pytest.mark.parametrize("name", sorted(frozen()))
def test_layers_of_frozen_configurations_are_alike(name: str) -> None:
    assert frozen()[name].even


def test_a_configuration_may_have_names_of_its_own(tmp_path) -> None:
    """GPT-J's is GPT-2's naming with linear layers."""
    config = {
        "model_type": "gptj",
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 48,
        "rotary_dim": 8,
        "vocab_size": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shape = find_shape(str(tmp_path))
    assert (shape.layers, shape.longest, shape.even) == (4, 48, True)
    check_projected_is_counted_in_full_depth("instantaneous", shape)
    assert len(linears_of(shape.build())) == 6
    check_refused(tmp_path, '{"model_type": "gptj"}', "without n_layer from")
    check_refused(tmp_path, '{"model_type": "gptjj", "n_layer": 4}', "Did you mean 'gptj'")


MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4},
            r"attn.c_attn \(Conv1D\); dense models work: Llama",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 4, **MIXTURE},
            "MixtralForCausalLM that keep all matrices in nn.Linear",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": [0, 1], **MIXTURE},
            r"mlp.experts \(Qwen3MoeExperts\)",
        ),
        (
            {
                "model_type": "deepseek_v3",
                "first_k_dense_replace": 3,
                "n_routed_experts": 8,
                "n_group": 2,
                "topk_group": 1,
                **MIXTURE,
            },
            r"mlp.experts \(DeepseekV3Experts\)",
        ),
        ({"model_type": "t5", "num_layers": 4}, "AutoModelForCausalLM can make a model, got other: Unrecognized"),
        (
            {
                "model_type": "deberta-v2",
                "architectures": ["DebertaV2ForSequenceClassification"],
                "relative_attention": True,
            },
            "whose step can run without values, got other",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_models_that_would_be_misread_are_refused(config: dict[str, object], message: str) -> None:
    """The layers that differ come after the two that a projection looks at."""
    common = {k: v for k, v in TINY.config.items() if k not in ("architectures", "model_type", "num_key_value_heads")}
    with pytest.raises(ValueError, match=message):
        project_method("floor", Shape("other", "other", {**common, **config}), CASE, Roofline())


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'peft-lora'"):
        project(TINY, CASE, Roofline(), ["peft-lor"])


def test_means_are_weighted_by_share() -> None:
    kinds = {
        "plain": Projected(0.75, Cost(4, 80, 40, 8), {}, 0.1, 0.2, 0.2),
        "path": Projected(0.25, Cost(8, 120, 80, 16), {"item": 3, "nonzero": 1}, 0.5, 0.4, 0.6),
    }
    expected = {
        "launches": 5,
        "syncs": 1,
        "read": 90,
        "written": 50,
        "flops": 10,
        "device_s": 0.2,
        "host_s": 0.25,
        "step_s": 0.3,
    }
    assert mean_of(kinds) == pytest.approx(expected)


# -- the committed page -----------------------------------------------------------------------------------------------


def test_the_page_is_what_the_newest_record_renders_to() -> None:
    record = json.loads(newest(projection_page.FOLDER).read_text(encoding="utf-8"))
    expected = projection_page.render(record)
    assert projection_page.PAGE.read_text(encoding="utf-8") == expected, (
        "run python -m igulora.benchmarks.projection.page --render"
    )


def test_the_page_says_what_it_is() -> None:
    record = json.loads(newest(projection_page.FOLDER).read_text(encoding="utf-8"))
    assert record["what"] == PROJECTION
    assert all(made["what"] == PROJECTION for made in (*record["projections"], *record["cards"]))
    tables = projection_page.render(record).split("\n## ")
    models = [text for text in tables if text.splitlines()[0].endswith(tuple(f" on {card}" for card in CARDS))]
    assert len(models) == len(record["projections"])
    assert all(PROJECTION in text for text in models)
