"""export_peft: an unmodified PEFT loads what we wrote to the same logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import igulora
from igulora import find_bank
from igulora.export import lora_factors

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LAYERS = 12  # so that layers.1 is a prefix of layers.10 and layers.11


def llama(cls: str = "LlamaForCausalLM", **changes) -> nn.Module:
    options = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(0)
    return getattr(transformers, cls)(transformers.LlamaConfig(**options)).eval()


def trained_look(model: nn.Module, seed: int = 1) -> None:
    """Values, and live ranks of every size from none to all, as after a run of pruning."""
    g = torch.Generator().manual_seed(seed)
    bank = find_bank(model)
    for i, layer in enumerate(bank.layers):
        nn.init.normal_(layer.lora_E, generator=g)
        live = torch.arange(layer.r) < (i + i // 10) % (layer.r + 1)
        layer.mask.copy_(live[torch.randperm(layer.r, generator=g)])
    bank.live.copy_(bank.mask)


def options(**changes) -> igulora.IGUConfig:
    return igulora.IGUConfig(
        **{"r": 4, "target_rank": 2, "total_steps": 200, "lora_alpha": 6, "init": "orthonormal", **changes}
    )


def load_in_peft(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing and of unexpected keys
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(base, folder).eval()


IDS = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(5))


def test_factors() -> None:
    g = torch.Generator().manual_seed(0)
    P, Q, E = torch.randn(5, 7, generator=g), torch.randn(5, 3, generator=g), torch.randn(5, generator=g)
    E[1], mask = 0.0, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    A, B = lora_factors(P, E, Q, mask, -1.5)
    assert A.shape == (3, 3)
    assert B.shape == (7, 3)
    torch.testing.assert_close(B @ A, -1.5 * (P.t() * (mask * E)) @ Q)
    A, B = lora_factors(P[:0], E[:0], Q[:0], mask[:0], 1.0)
    assert A.shape == (0, 3)
    assert B.shape == (7, 0)


def test_causal_language_model(tmp_path) -> None:
    model = igulora.adapt(llama(), options())
    trained_look(model)
    ranks = find_bank(model).ranks()
    one, eleven = (f"model.layers.{i}.self_attn.q_proj" for i in (1, 11))
    assert ranks[one] != ranks[eleven]
    assert 0 in ranks.values()
    folder = igulora.export_peft(model, tmp_path, base_model="some/model")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["task_type"] == "CAUSAL_LM"
    assert written["base_model_name_or_path"] == "some/model"
    assert set(written["target_modules"]) == {n for n, r in ranks.items() if r}
    other = load_in_peft(llama(), folder)
    with torch.no_grad():
        base, ours, theirs = llama()(IDS).logits, model(IDS).logits, other(IDS).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert float((ours - base).abs().max()) > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(other.merge_and_unload()(IDS).logits, ours, rtol=0, atol=1e-5)
    for name, rank in ranks.items():
        key = f"base_model.model.{name}.lora_A.weight"
        assert (key in load_file(folder / "adapter_model.safetensors")) == (rank > 0)


def test_layers_one_and_eleven_differ(tmp_path) -> None:
    model = igulora.adapt(llama(), options(target_modules=r".*layers\.(1|11)\.self_attn\.v_proj"))
    bank = find_bank(model)
    for layer, live in zip(bank.layers, (1, 3), strict=True):
        nn.init.ones_(layer.lora_E)
        layer.mask[live:] = 0.0
    other = load_in_peft(llama(), igulora.export_peft(model, tmp_path))
    shapes = {n: tuple(p.shape) for n, p in other.named_parameters() if "lora_A" in n}
    assert sorted(shapes.values()) == [(1, 16), (3, 16)]
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("compacted", [False, True])
def test_from_a_folder_and_from_the_model(tmp_path, compacted) -> None:
    model = igulora.adapt(llama(num_hidden_layers=2), options(dropout=0.1))
    trained_look(model)
    if compacted:
        igulora.compact(model)
    one = igulora.export_peft(model, tmp_path / "one")
    two = igulora.export_peft(igulora.save_adapter(model, tmp_path / "saved"), tmp_path / "two")
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    first, second = (json.loads((folder / "adapter_config.json").read_text()) for folder in (one, two))
    known_by_the_model_only = ("task_type", "base_model_name_or_path")
    assert {k: v for k, v in first.items() if k not in known_by_the_model_only} == {
        k: v for k, v in second.items() if k not in known_by_the_model_only
    }
    assert first["lora_dropout"] == 0.1
    with torch.no_grad():
        ours, theirs = model(IDS).logits, load_in_peft(llama(num_hidden_layers=2), two)(IDS).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["model", "folder"])
def test_sequence_classifier_with_its_head(tmp_path, source) -> None:
    cls = "LlamaForSequenceClassification"
    model = igulora.adapt(llama(cls, num_hidden_layers=2, num_labels=3), options(modules_to_save=["score"]))
    trained_look(model)
    nn.init.normal_(model.score.module.weight, generator=torch.Generator().manual_seed(2))
    held = model if source == "model" else igulora.save_adapter(model, tmp_path / "saved")
    folder = igulora.export_peft(held, tmp_path / "out")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["score"]
    assert written["task_type"] == ("SEQ_CLS" if source == "model" else None)
    other = load_in_peft(llama(cls, num_hidden_layers=2, num_labels=3), folder)
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


class Names(nn.Module):
    """Names that begin and end with each other's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 6)
        self.fc1 = nn.Linear(6, 6)
        self.fc11 = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "fc1": nn.Linear(6, 6)})

    def forward(self, x):
        return self.block["fc1"](self.block["fc"](self.fc11(self.fc1(self.fc(x)))))


# Live ranks of fc, fc1, fc11, block.fc, block.fc1: every case of a shorter name beside a longer one, dead ones included.
@pytest.mark.parametrize("ranks", [(1, 2, 3, 4, 1), (2, 1, 1, 1, 4), (3, 0, 1, 2, 2), (0, 3, 0, 2, 1), (2, 2, 2, 0, 0)])
def test_names_that_contain_each_other(tmp_path, ranks) -> None:
    model = igulora.adapt(Names().eval(), options())
    bank = find_bank(model)
    for layer, live in zip(bank.layers, ranks, strict=True):
        nn.init.ones_(layer.lora_E)
        layer.mask[live:] = 0.0
    other = load_in_peft(Names().eval(), igulora.export_peft(model, tmp_path))
    x = torch.randn(4, 6)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-5)
    for name, live in zip(bank.names, ranks, strict=True):
        found = [
            tuple(p.shape) for n, p in other.named_parameters() if n == f"base_model.model.{name}.lora_A.default.weight"
        ]
        assert found == ([(live, 6)] if live else [])


def test_nothing_left_to_export(tmp_path) -> None:
    model = igulora.adapt(Names(), options())
    with pytest.raises(ValueError, match="got none; train the adapter first"):
        igulora.export_peft(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="igulora_config.json"):
        igulora.export_peft(tmp_path / "no such folder", tmp_path)
    with pytest.raises(ValueError, match="plain Names"):
        igulora.export_peft(Names(), tmp_path)


def test_lora_start_exports(tmp_path) -> None:
    model = igulora.adapt(Names().eval(), igulora.IGUConfig(method="lora", target_rank=3, lora_alpha=6))
    for layer in find_bank(model).layers:
        nn.init.normal_(layer.lora_P, std=0.1)
    other, x = load_in_peft(Names().eval(), igulora.export_peft(model, tmp_path)), torch.randn(4, 6)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-5)


def test_a_merged_model_exports_the_same_adapter(tmp_path) -> None:
    model = igulora.adapt(Names(), options())
    trained_look(model)
    igulora.export_peft(model, tmp_path / "one")
    igulora.export_peft(igulora.merge(model), tmp_path / "two")
    a, b = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("one", "two"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def serve(base: nn.Module, folder: Path) -> nn.Module:
    """What a server makes of an adapter folder: it knows ``r``, ``lora_alpha``, tensor names and shapes, and nothing of patterns."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list)
    assert not any("." in target for target in config["target_modules"]), (
        "a server compares with the last part of a name"
    )
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling, modules, pairs = config["lora_alpha"] / config["r"], dict(base.named_modules()), {}
    for key, value in tensors.items():
        name, side, end = key.rsplit(".", 2)
        assert end == "weight"
        assert name.startswith("base_model.model.")
        name = name.removeprefix("base_model.model.")
        assert name.rsplit(".", 1)[-1] in config["target_modules"]
        pairs.setdefault(name, {})[side] = value
    with torch.no_grad():
        for name, pair in pairs.items():
            A, B = pair["lora_A"], pair["lora_B"]
            assert A.shape[0] == B.shape[1] == config["r"]
            delta = scaling * B @ A
            modules[name].weight += delta if isinstance(modules[name], nn.Linear) else delta.t()
    return base


@pytest.mark.parametrize("source", ["model", "folder"])
def test_a_server_that_ignores_patterns_serves_the_uniform_export(tmp_path, source) -> None:
    model = igulora.adapt(llama(), options())
    trained_look(model)
    ranks = find_bank(model).ranks()
    assert set(ranks.values()) == {0, 1, 2, 3, 4}
    held = model if source == "model" else igulora.save_adapter(model, tmp_path / "saved")
    folder = igulora.export_peft(held, tmp_path / "out", uniform_rank=True)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 4)
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert written["target_modules"] == sorted(projections)
    with torch.no_grad():
        ours = model(IDS).logits
        torch.testing.assert_close(serve(llama(), folder)(IDS).logits, ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(load_in_peft(llama(), folder)(IDS).logits, ours, rtol=0, atol=1e-5)


def test_the_plain_export_is_not_one_for_such_a_server(tmp_path) -> None:
    model = igulora.adapt(llama(num_hidden_layers=2), options())
    trained_look(model)
    with pytest.raises(AssertionError):
        serve(llama(num_hidden_layers=2), igulora.export_peft(model, tmp_path))


def test_uniform_export_gives_zeros_to_layers_of_a_name_that_were_not_adapted(tmp_path) -> None:
    model = igulora.adapt(llama(num_hidden_layers=3), options(target_modules=r".*layers\.[02]\.self_attn\.(q|v)_proj"))
    trained_look(model)
    folder = igulora.export_peft(model, tmp_path, uniform_rank=True)
    zero = load_file(folder / "adapter_model.safetensors")[
        "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    ]
    assert not zero.any()
    with torch.no_grad():
        ours = model(IDS).logits
        for load in (serve, load_in_peft):
            theirs = load(llama(num_hidden_layers=3), folder)(IDS).logits
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [(1, 2, 3, 4, 1), (3, 0, 1, 2, 2), (0, 3, 0, 2, 1)])
def test_uniform_export_of_names_that_contain_each_other(tmp_path, ranks) -> None:
    model = igulora.adapt(Names().eval(), options())
    for layer, live in zip(find_bank(model).layers, ranks, strict=True):
        nn.init.ones_(layer.lora_E)
        layer.mask[live:] = 0.0
    folder = igulora.export_peft(model, tmp_path, uniform_rank=True)
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(load_in_peft(Names().eval(), folder)(x), model(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(serve(Names().eval(), folder)(x), model(x), rtol=0, atol=1e-5)


class Numbered(nn.Module):
    """Layers whose names end in numbers, as the blocks around them do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("source", ["model", "folder"])
def test_uniform_export_of_numbered_layers_names_them_in_full(tmp_path, source) -> None:
    model = igulora.adapt(Numbered().eval(), options())
    for layer, live in zip(find_bank(model).layers, (1, 2, 0, 3, 1, 4), strict=True):
        nn.init.ones_(layer.lora_E)
        layer.mask[live:] = 0.0
    held = model if source == "model" else igulora.save_adapter(model, tmp_path / "saved")
    folder = igulora.export_peft(held, tmp_path / "out", uniform_rank=True)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["target_modules"] == ["blocks.0.0", "blocks.0.2", "blocks.1.2", "blocks.2.0", "blocks.2.2"]
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(load_in_peft(Numbered().eval(), folder)(x), model(x), rtol=0, atol=1e-5)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(x)


class Headed(Names):
    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def forward(self, x):
        return self.head(super().forward(x))


def test_uniform_export_beside_a_module_to_save_with_layers_of_the_same_names(tmp_path) -> None:
    model = igulora.adapt(Headed().eval(), options(modules_to_save=["head"]))
    for layer, live in zip(find_bank(model).layers, (1, 2, 3, 0, 1), strict=True):
        nn.init.ones_(layer.lora_E)
        layer.mask[live:] = 0.0
    nn.init.normal_(model.head.module.fc.weight)
    folder = igulora.export_peft(model, tmp_path, uniform_rank=True)
    other, x = load_in_peft(Headed().eval(), folder), torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-5)
    assert not any("head" in name and "lora" in name for name, _ in other.named_parameters())


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    options = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options, bos_token_id=1, eos_token_id=1)).eval()


@pytest.mark.parametrize("source", ["model", "folder"])
@pytest.mark.parametrize("uniform", [False, True])
def test_transposed_weights_of_gpt2(tmp_path, source, uniform) -> None:
    model = igulora.adapt(gpt2(), options())
    trained_look(model)
    held = model if source == "model" else igulora.save_adapter(model, tmp_path / "saved")
    folder = igulora.export_peft(held, tmp_path / "out", uniform_rank=uniform)
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    with torch.no_grad():
        base, ours = gpt2()(IDS).logits, model(IDS).logits
        assert float((ours - base).abs().max()) > 1e-2
        torch.testing.assert_close(load_in_peft(gpt2(), folder)(IDS).logits, ours, rtol=0, atol=1e-5)
        if uniform:
            torch.testing.assert_close(serve(gpt2(), folder)(IDS).logits, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["model", "folder"])
@pytest.mark.parametrize("uniform", [False, True])
def test_embeddings_and_convolutions(tmp_path, source, uniform) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(20, 12)
            self.body = nn.Conv2d(3, 5, (3, 2), padding=1)
            self.fc = nn.Linear(5, 4)

        def forward(self, ids):
            x = self.body(self.embed(ids).view(len(ids), 3, 4, -1))
            return self.fc(x.flatten(2).mean(2))

    model = igulora.adapt(Net().eval(), options(target_modules=["embed", "body", "fc"]))
    for layer, live in zip(find_bank(model).layers, (2, 3, 1), strict=True):
        nn.init.normal_(layer.lora_E)
        layer.mask[live:] = 0.0
    held = model if source == "model" else igulora.save_adapter(model, tmp_path / "saved")
    folder = igulora.export_peft(held, tmp_path / "out", uniform_rank=uniform)
    ids = torch.randint(20, (6, 4))
    with torch.no_grad():
        assert float((model(ids) - Net().eval()(ids)).abs().max()) > 1e-2
        torch.testing.assert_close(load_in_peft(Net().eval(), folder)(ids), model(ids), rtol=0, atol=1e-5)
