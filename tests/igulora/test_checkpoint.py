"""Adapters and checkpoints on disk: exact resume, whole files or none, and what damaged or foreign folders are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import igulora
from igulora import files, find_bank
from igulora.checkpoint import load_checkpoint, save_checkpoint
from igulora.files import read_metadata


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
    model, controller, optimizer = trainer(net(), config())
    run(model, controller, optimizer, batches(3))

    def refuse(*_a: Any, **_k: Any) -> None:
        raise AssertionError("pickle")

    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr("pickle.dumps", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    save_checkpoint(tmp_path, model, optimizer, controller)
    load_checkpoint(tmp_path, model, optimizer, controller)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}


# -- writing is all or nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch, error) -> None:
    path = tmp_path / "t.safetensors"
    files.write_tensors(path, {"a": torch.ones(3)})

    def half(tensors: Any, to: Path, metadata: Any) -> None:
        Path(to).write_bytes(b"half")
        raise error

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(type(error)):
        files.write_tensors(path, {"a": torch.zeros(3)})
    assert torch.equal(files.read_tensors(path)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    files.write_json(tmp_path / "j.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "j.json", {"a": object()})
    assert files.read_json(tmp_path / "j.json") == {"a": 1}


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_an_interrupted_checkpoint_is_not_taken_for_a_whole_one(
    net, config, trainer, run, batches, tmp_path, monkeypatch, fail_at
) -> None:
    model, controller, optimizer = trainer(net(), config())
    save_checkpoint(tmp_path, model, optimizer, controller)
    run(model, controller, optimizer, batches(3))
    calls, real = [], files.save_file

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == fail_at:
            raise OSError("disk full")
        real(*args, **kwargs)

    monkeypatch.setattr(files, "save_file", failing)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, model, optimizer, controller)
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.json"):
        load_checkpoint(tmp_path, model, optimizer, controller)


# -- damaged, foreign, of another model -------------------------------------------------------------------------------


@pytest.fixture
def folder(net, config, trainer, run, batches, tmp_path) -> Path:
    model, controller, optimizer = trainer(net(), config(modules_to_save=["head"]))
    run(model, controller, optimizer, batches(9))
    return save_checkpoint(tmp_path / "saved", model, optimizer, controller)


def tensors_edit(change):
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata=read_metadata(path))

    return edit


def config_edit(change):
    def edit(folder: Path) -> None:
        path = folder / "igulora_config.json"
        meta = json.loads(path.read_text())
        change(meta)
        path.write_text(json.dumps(meta))

    return edit


def truncate(name: str):
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return edit


DAMAGE = {
    "no folder": (shutil.rmtree, FileNotFoundError, "igulora_config.json"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "adapter_model"),
    "truncated tensors": (truncate("adapter_model.safetensors"), ValueError, "truncated or foreign"),
    "empty tensors": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), ValueError, "truncated or foreign"),
    "foreign tensors": (lambda f: (f / "adapter_model.safetensors").write_text("{}" * 50), ValueError, "truncated or"),
    "truncated json": (truncate("igulora_config.json"), ValueError, "expected JSON"),
    "json list": (lambda f: (f / "igulora_config.json").write_text("[1]"), ValueError, "JSON object.*list"),
    "binary json": (lambda f: (f / "igulora_config.json").write_bytes(b"\xff\xfe\x00"), ValueError, "expected JSON"),
    "another library": (config_edit(lambda m: m.pop("library")), ValueError, "was it made by igulora"),
    "another format": (config_edit(lambda m: m.update(format=99)), ValueError, "format 1 .* got 99"),
    "no options": (config_edit(lambda m: m.pop("config")), ValueError, "config"),
    "no scale": (config_edit(lambda m: m.pop("scale")), ValueError, "scale"),
    "an unknown option": (config_edit(lambda m: m["config"].update(rr=1)), ValueError, "got 'rr'"),
    "a tensor missing": (tensors_edit(lambda t: t.pop("first.lora_P")), ValueError, "first.lora_P with 4 rows"),
    "a tensor too much": (tensors_edit(lambda t: t.update(x=torch.ones(1))), ValueError, "got 'x'"),
    "rows missing": (
        tensors_edit(lambda t: t.update({"first.lora_E": torch.ones(3)})),
        ValueError,
        r"first.lora_E .*\(3,\)",
    ),
    "no dimensions": (
        tensors_edit(lambda t: t.update({"first.mask": torch.ones(())})),
        ValueError,
        r"first.mask .*\(\)",
    ),
    "flat matrix": (
        tensors_edit(lambda t: t.update({"first.lora_Q": torch.ones(4)})),
        ValueError,
        r"first.lora_Q .*\(4,\)",
    ),
    "integers": (
        tensors_edit(lambda t: t.update({"first.lora_E": torch.ones(4, dtype=torch.int32)})),
        ValueError,
        "int32",
    ),
    "other width": (
        tensors_edit(lambda t: t.update({"first.lora_P": torch.ones(4, 99)})),
        ValueError,
        r"first: \(out, in\) = \(99, 8\), the model's is \(12, 8\)",
    ),
    "files of two saves": (config_edit(lambda m: m.update(stamp="0" * 16)), ValueError, "of one save .* files of two"),
    "head of another size": (
        tensors_edit(lambda t: t.update({"head.saved.weight": torch.ones(5, 12)})),
        ValueError,
        r"'head'.*\(5, 12\)",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damaged_folders(net, folder, name) -> None:
    damage, error, match = DAMAGE[name]
    damage(folder)
    model = net()
    before = [(n, id(m)) for n, m in model.named_modules()]
    with pytest.raises(error, match=match):
        igulora.load_adapter(model, folder)
    assert [(n, id(m)) for n, m in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_another_model_is_told_names_and_shapes(net, config, folder) -> None:
    with pytest.raises(ValueError, match=r"first: \(out, in\) = \(12, 8\), not in the model\n  body.up") as info:
        igulora.load_adapter(nn.Sequential(nn.Linear(8, 12)), folder)
    assert "body.down: (out, in) = (12, 10)" in str(info.value)
    with pytest.raises(ValueError, match="got one adapted already"):
        igulora.load_adapter(igulora.adapt(net(), config()), folder)


def test_checkpoint_of_another_run_changes_nothing(net, config, trainer, folder) -> None:
    model, controller, optimizer = trainer(net(), config(modules_to_save=["head"]))
    held = {k: v.clone() for k, v in model.state_dict().items()}
    one_group = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="parameter groups"):
        load_checkpoint(folder, model, one_group, controller)
    for damage in ("optimizer.safetensors", "controller_state.safetensors"):
        data = (folder / damage).read_bytes()
        (folder / damage).write_bytes(data[:100])
        with pytest.raises(ValueError, match="truncated or foreign"):
            load_checkpoint(folder, model, optimizer, controller)
        (folder / damage).write_bytes(data)
    assert same(dict(model.state_dict()), held)
    assert controller.global_step == 0
    other = igulora.Controller(igulora.adapt(net(), config(r=3)))
    state = controller.state_dict()
    with pytest.raises(ValueError, match="another adapter"):
        other.load_state_dict(state)


def test_a_merged_model_is_not_saved(net, config, tmp_path) -> None:
    model = igulora.merge(igulora.adapt(net(), config()))
    with pytest.raises(ValueError, match="unmerge"):
        igulora.save_adapter(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
