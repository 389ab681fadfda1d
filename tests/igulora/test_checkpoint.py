"""Adapters and checkpoints on disk: exact resume, whole files or none, and what damaged or foreign folders are told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import igulora
from igulora import files, find_bank
from igulora.checkpoint import load_checkpoint, save_checkpoint


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


VARIANTS: dict[str, dict[str, Any]] = {
    "gauss": {"window": 4, "t_init": 13, "total_steps": 30},
    "stratified": {"window": 4, "t_init": 13, "total_steps": 30, "estimator": "stratified"},
    "trapezoid": {"window": 4, "t_init": 13, "total_steps": 30, "estimator": "trapezoid", "aggregate": "absolute"},
    "on-path": {"window": 4, "t_init": 13, "total_steps": 30, "estimator": "on-path"},
    "instantaneous": {"window": 4, "t_init": 13, "total_steps": 30, "estimator": "instantaneous"},
    "adalora": {"method": "adalora", "total_steps": 30, "t_init": 8, "window": 1, "orthogonality": 0.1},
    "random": {"method": "random", "total_steps": 30, "t_init": 8, "prune": "hard"},
}


# Inside the first window, inside a later one between allocations, right after an allocation, in the final phase.
@pytest.mark.parametrize("at", [2, 19, 20, 27])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_resume_is_bit_equal(net, config, trainer, run, batches, tmp_path, name, at) -> None:
    options = {**VARIANTS[name], "dropout": 0.2, "modules_to_save": ["head"]}
    data = batches(30)
    model, controller, optimizer = trainer(net(), config(**options), trace=["first"])
    torch.manual_seed(99)
    losses = run(model, controller, optimizer, data[:at])
    save_checkpoint(tmp_path / "c", model, optimizer, controller, {"note": [1, "x"]})
    losses = run(model, controller, optimizer, data[at:])

    torch.manual_seed(12345)
    other, again, opt = trainer(net(seed=7), config(**options), trace=["first"])
    for key, value in net().state_dict().items():  # the base model is the user's to bring
        name_ = key.replace("head.", "head.original.")
        name_ = ".".join((*name_.split(".")[:-1], "base_layer", name_.split(".")[-1])) if "head" not in key else name_
        other.get_parameter(name_).data.copy_(value)
    assert load_checkpoint(tmp_path / "c", other, opt, again) == {"note": [1, "x"]}
    assert again.global_step == at
    resumed = run(other, again, opt, data[at:])
    assert resumed == losses
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert again.history == controller.history
    assert again.series == controller.series
    assert torch.equal(again.importance.mean, controller.importance.mean)
    assert torch.equal(again.importance.terms, controller.importance.terms)


def test_resume_after_compaction(net, config, trainer, run, batches, tmp_path) -> None:
    data = batches(20)
    model, controller, optimizer = trainer(net(), config())
    run(model, controller, optimizer, data[:16])
    igulora.compact(model, optimizer, controller)
    save_checkpoint(tmp_path, model, optimizer, controller)
    losses = run(model, controller, optimizer, data[16:])
    fresh, again, opt = trainer(net(), config())
    with pytest.raises(ValueError, match="modules and ranks"):
        load_checkpoint(tmp_path, fresh, opt, again)
    other = igulora.load_adapter(net(), tmp_path)
    opt = torch.optim.AdamW(igulora.param_groups(other, lr=1e-2, lambda_lr_ratio=10.0))
    again = igulora.Controller(other)
    load_checkpoint(tmp_path, other, opt, again)
    assert again.budget == controller.budget
    assert run(other, again, opt, data[16:]) == losses


@pytest.mark.parametrize("steps", [0, 9, 16])
def test_adapter_round_trip(net, config, trainer, run, batches, tmp_path, steps) -> None:
    options = config(modules_to_save=["head"], rank_pattern={"up": 0}, dropout=0.3, lora_alpha=2)
    model, controller, optimizer = trainer(net(), options)
    run(model, controller, optimizer, batches(steps))
    folder = igulora.save_adapter(model, tmp_path / "a" / "b", controller if steps else None)
    other = igulora.load_adapter(net(), folder)
    model.eval()
    other.eval()
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert other.igulora_config == options
    assert find_bank(other).ranks() == find_bank(model).ranks()
    assert torch.equal(find_bank(other).live, find_bank(model).live)
    file = igulora.read_adapter(folder)
    assert file.config == options
    assert list(file.modules) == ["first", "body.up", "body.down"]
    assert file.meta["history"] == controller.history
    assert {n: t.shape for n, t in file.terms.items()} == (
        {} if not steps else {"first": (3, 4), "body.up": (3, 0), "body.down": (3, 4)}
    )
    assert {p.name for p in folder.iterdir()} == {"adapter_model.safetensors", "igulora_config.json"} | (
        {"controller_state.safetensors"} if steps else set()
    )


class Suffixes(nn.Module):
    """Names that end in each other's names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4)})})

    def forward(self, x):
        return self.block["block"]["fc"](self.block["fc"](self.fc(x)))


@pytest.mark.parametrize("target", ["fc", r"block\.fc", "all-linear"])
def test_names_that_end_in_each_other(config, tmp_path, target) -> None:
    ranks = {"block.block.fc": 1, "block.fc": 2} if target == "all-linear" else {}
    model = igulora.adapt(Suffixes(), config(target_modules=target, rank_pattern=ranks))
    other = igulora.load_adapter(Suffixes(), igulora.save_adapter(model, tmp_path))
    assert find_bank(other).names == find_bank(model).names
    assert [m.r for m in find_bank(other).layers] == [m.r for m in find_bank(model).layers]


def test_only_safetensors_and_json(net, config, trainer, run, batches, tmp_path, monkeypatch) -> None:
    model, controller, optimizer = trainer(net(), config(init="gaussian", init_lambda=1.0, modules_to_save=["head"]))
    run(model, controller, optimizer, batches(3))

    def refuse(*_a: Any, **_k: Any) -> None:
        raise AssertionError("pickle")

    for name in ("torch.save", "torch.load", "numpy.load", "numpy.save"):
        monkeypatch.setattr(name, refuse)
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    folder = save_checkpoint(tmp_path / "c", model, optimizer, controller)
    load_checkpoint(folder, model, optimizer, controller)
    igulora.load_adapter(net(), folder)
    igulora.read_adapter(folder)
    igulora.export_peft(folder, tmp_path / "peft")
    assert {p.suffix for f in (folder, tmp_path / "peft") for p in f.iterdir()} == {".safetensors", ".json"}


def test_the_library_has_no_word_for_pickle() -> None:
    """Of all that reads pickles: none is called, in any file of the packages."""
    words = re.compile(r"\b(import c?[pP]ickle|from pickle|torch\.load\(|allow_pickle|joblib|shelve|marshal)")
    root = Path(__file__).parents[2]
    sources = [path for package in ("igulora", "kernels") for path in (root / package).rglob("*.py")]
    assert len(sources) > 50
    assert [str(path) for path in sources if words.search(path.read_text(encoding="utf-8"))] == []


# -- writing is all or nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch, error) -> None:
    path = tmp_path / "t.json"
    files.write_json(path, {"a": 3})

    def half(to: Path, value: Any) -> None:
        to.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, "put_json", half)
        with pytest.raises(type(error)):
            files.write_json(path, {"a": 0})
    assert files.read_json(path) == {"a": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
    files.write_json(tmp_path / "j.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "j.json", {"a": object()})
    assert files.read_json(tmp_path / "j.json") == {"a": 1}


def test_a_merged_model_is_not_saved(net, config, tmp_path) -> None:
    model = igulora.merge(igulora.adapt(net(), config()))
    with pytest.raises(ValueError, match="unmerge"):
        igulora.save_adapter(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["first.lora_P", "head"])
def test_ruined_weights_are_not_saved(net, config, tmp_path, where) -> None:
    model = igulora.adapt(net(), config(modules_to_save=["head"]))
    folder = igulora.save_adapter(model, tmp_path)
    before = (folder / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        (model.first.lora_P if where != "head" else model.head.module.weight)[0, 0] = torch.inf
    with pytest.raises(ValueError, match=f"NaN or infinity in {where}"):
        igulora.save_adapter(model, tmp_path)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
