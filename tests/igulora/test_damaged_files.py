"""Adapter and checkpoint folders that are damaged, foreign or of another model: what is said, and that nothing changes."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import igulora
from igulora import find_bank
from igulora.checkpoint import load_checkpoint, save_checkpoint
from igulora.cli import main
from igulora.files import file_digest, read_header, sealed


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
        save_file(tensors, path, metadata=read_header(path).metadata)
        reseal(folder)

    return edit


def reseal(folder: Path) -> None:
    """Give edited files right checksums, so that what else is wrong must be found."""
    for name in ("igulora_config.json", "checkpoint.json"):
        value = json.loads((folder / name).read_text())
        value["files"] = {other: file_digest(folder / other) for other in value["files"]}
        (folder / name).write_text(json.dumps(sealed(value)))


def config_edit(change):
    def edit(folder: Path) -> None:
        path = folder / "igulora_config.json"
        meta = json.loads(path.read_text())
        change(meta)
        path.write_text(json.dumps(sealed(meta)))

    return edit


def truncate(name: str, seal: bool = False):
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        if seal:
            reseal(folder)

    return edit


def rewrite(name: str, data: bytes):
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(data)
        reseal(folder)

    return edit


def text_edit(old: str, new: str):
    def edit(folder: Path) -> None:
        path = folder / "igulora_config.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


def flip(name: str):
    """One bit in the last byte: of a tensor, where nothing but a checksum can tell."""

    def edit(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 4
        (folder / name).write_bytes(bytes(data))

    return edit


DAMAGE = {
    "no folder": (shutil.rmtree, FileNotFoundError, "igulora_config.json"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "adapter_model"),
    "truncated tensors": (truncate("adapter_model.safetensors"), ValueError, "expected 2.* bytes in .* truncated"),
    "truncated tensors, sealed": (truncate("adapter_model.safetensors", True), ValueError, "truncated or foreign"),
    "empty tensors": (rewrite("adapter_model.safetensors", b""), ValueError, "truncated or foreign"),
    "foreign tensors": (rewrite("adapter_model.safetensors", b"{}" * 50), ValueError, "truncated or"),
    "a huge header": (rewrite("adapter_model.safetensors", b"\xff" * 100), ValueError, "a header of 1844.* bytes"),
    "a bit of a tensor": (
        flip("adapter_model.safetensors"),
        ValueError,
        "checksum recorded for it, got other contents",
    ),
    "an edited json": (text_edit('"beta1": 0.85', '"beta1": 0.95'), ValueError, "checksum recorded in it.*was edited"),
    "a key twice": (text_edit('"format": 2', '"format": 2, "format": 2'), ValueError, "the key 'format' twice"),
    "NaN in json": (text_edit('"format": 2', '"format": NaN'), ValueError, "NaN, which JSON does not have"),
    "deep json": (text_edit('"format": 2', '"format": ' + "[" * 10**5), ValueError, "expected JSON in .*recursion"),
    "long json": (
        lambda f: os.truncate(f / "igulora_config.json", 2**27),
        ValueError,
        "at most 67108864 bytes of JSON",
    ),
    "a long number": (
        text_edit('"format": 2', '"format": ' + "9" * 5000),
        ValueError,
        "expected JSON in .*4300 digits",
    ),
    "no checksums": (config_edit(lambda m: m.pop("files")), ValueError, "expected the checksums of the files"),
    "a negative rank": (config_edit(lambda m: m["modules"].update(first=-1)), ValueError, "a rank and at most as many"),
    "a rank that is true": (config_edit(lambda m: m["modules"].update(first=True)), ValueError, "a rank and at most"),
    "a rank without end": (config_edit(lambda m: m["modules"].update(first=10**300)), ValueError, "a rank and at most"),
    "more live than stored": (config_edit(lambda m: m["ranks"].update(first=5)), ValueError, "at most as many live"),
    "other live ranks": (
        config_edit(lambda m: m["ranks"].update(first=0)),
        ValueError,
        "expected 0 live triplets of first",
    ),
    "a scale in words": (
        config_edit(lambda m: m["scale"].update(first="1")),
        ValueError,
        "a finite number as the scale",
    ),
    "an endless scale": (
        config_edit(lambda m: m["scale"].update(first=10**400)),
        ValueError,
        "a finite number as the scale",
    ),
    "a history of words": (
        config_edit(lambda m: m.update(history=["x"])),
        ValueError,
        "step, budget and ranks in the hist",
    ),
    "too many nodes": (
        config_edit(lambda m: m["config"].update(nodes=10**9)),
        ValueError,
        "expected nodes from 0 to 4096",
    ),
    "a long seed": (config_edit(lambda m: m["config"].update(seed=2**70)), ValueError, "expected a seed of 64 bits"),
    "a negative r": (config_edit(lambda m: m["config"].update(r=-2)), ValueError, "expected r from 0 to"),
    "an option of another type": (
        config_edit(lambda m: m["config"].update(rank_pattern=3)),
        ValueError,
        "the options of a run",
    ),
    "a mask of halves": (
        tensors_edit(lambda t: t["first.mask"].fill_(0.5)),
        ValueError,
        r"expected 0 and 1 in first\.mask",
    ),
    "weights that are NaN": (
        tensors_edit(lambda t: t["body.up.lora_Q"].fill_(torch.nan)),
        ValueError,
        r"finite values in body\.up\.lora_Q",
    ),
    "float8": (
        tensors_edit(lambda t: t.update({"first.lora_E": torch.ones(4).to(torch.float8_e4m3fn)})),
        ValueError,
        "dtype F8_E4M3",
    ),
    "truncated json": (truncate("igulora_config.json"), ValueError, "expected JSON"),
    "json list": (lambda f: (f / "igulora_config.json").write_text("[1]"), ValueError, "JSON object.*list"),
    "binary json": (lambda f: (f / "igulora_config.json").write_bytes(b"\xff\xfe\x00"), ValueError, "expected JSON"),
    "another library": (config_edit(lambda m: m.pop("library")), ValueError, "was it made by igulora"),
    "another format": (config_edit(lambda m: m.update(format=99)), ValueError, "format 2 .* got 99"),
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
    other, again, opt = trainer(net(), config(exclude_modules=["head"]))
    with pytest.raises(ValueError, match=r"modules to save of the model, \[\], .* got \['head'\]"):
        load_checkpoint(folder, other, opt, again)
    with pytest.raises(ValueError, match="the controller of this model"):
        load_checkpoint(folder, model, optimizer, again)
    assert same(dict(model.state_dict()), held)
    assert controller.global_step == 0
    other = igulora.Controller(igulora.adapt(net(), config(r=3)))
    state = controller.state_dict()
    with pytest.raises(ValueError, match="another adapter"):
        other.load_state_dict(state)


def trainer_edit(change):
    def edit(folder: Path) -> None:
        path = folder / "checkpoint.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(sealed(value)))

    return edit


def state_edit(name: str, change):
    """An edit of one of the other tensor files, with right checksums."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata=read_header(folder / name).metadata)
        reseal(folder)

    return edit


def controller_edit(*keys_and_value: Any):
    *keys, last, value = keys_and_value

    def change(meta: dict[str, Any]) -> None:
        inner = meta["controller"]
        for key in keys:
            inner = inner[key]
        if value is KeyError:
            del inner[last]
        else:
            inner[last] = value

    return config_edit(change)


def edited_extra(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(path.read_text().replace('"extra": {}', '"extra": {"a": 1}'))


OPTIMIZER, CONTROLLER = "optimizer.safetensors", "controller_state.safetensors"
RESUME_DAMAGE = {
    "no checkpoint.json": (lambda f: (f / "checkpoint.json").unlink(), r"checkpoint\.json"),
    "no optimizer": (lambda f: (f / OPTIMIZER).unlink(), "optimizer.safetensors"),
    "no controller": (lambda f: (f / CONTROLLER).unlink(), "controller_state.safetensors"),
    "truncated optimizer": (truncate(OPTIMIZER), "bytes in .*truncated"),
    "truncated optimizer, sealed": (truncate(OPTIMIZER, True), "truncated or foreign"),
    "truncated controller, sealed": (truncate(CONTROLLER, True), "truncated or foreign"),
    "a bit of the optimizer": (flip(OPTIMIZER), "checksum"),
    "a bit of the controller": (flip(CONTROLLER), "checksum"),
    "an adapter saved over it": (lambda f: config_edit(lambda m: m.update(stamp="x"))(f), "of one save"),
    "of two saves": (trainer_edit(lambda t: t.update(stamp="0")), "checkpoint.json and igulora_config.json of one save"),
    "an edited extra": (edited_extra, "checksum"),
    "no extra": (trainer_edit(lambda t: t.update(extra=3)), "expected extra values"),
    "groups in words": (trainer_edit(lambda t: t["optimizer"].update(groups="x")), "parameter groups"),
    "no optimizer state": (trainer_edit(lambda t: t.pop("optimizer")), "expected an optimizer's state"),
    "a state of a parameter too many": (
        trainer_edit(lambda t: t["optimizer"].update(state={"$dict": [[99, {"a": 1}]]})), "states of 11 parameters",
    ),
    "a tensor that is not there": (
        state_edit(OPTIMIZER, lambda t: t.pop("state.0.exp_avg")), "expected saved values in the optimizer's state",
    ),
    "a tensor too much": (state_edit(OPTIMIZER, lambda t: t.update(x=torch.ones(1))), "got 'x'; the file is foreign"),
    "parameters of other shapes": (
        trainer_edit(lambda t: t["optimizer"]["parameters"][0].__setitem__(1, [9, 9])), "in their order, got others",
    ),
    "no random numbers": (trainer_edit(lambda t: t.pop("random")), "states of random number generators"),
    "short random numbers": (state_edit(OPTIMIZER, lambda t: t.update({"rng.cpu": t["rng.cpu"][:99].clone()})), "PyTorch"),
    "random numbers of NumPy": (state_edit(OPTIMIZER, lambda t: t.update({"rng.numpy": torch.ones(3)})), "Python and NumPy"),
    "random numbers of Python": (
        state_edit(OPTIMIZER, lambda t: t.update({"rng.python": t["rng.python"][:7].clone()})), "Python and NumPy",
    ),
    "a gradient of nobody": (state_edit(OPTIMIZER, lambda t: t.update({"gradient.x": torch.ones(1)})), "gradients of the"),
    "a step in words": (controller_edit("global_step", "9"), "a number of 'global_step'"),
    "no updates": (controller_edit("updates", KeyError), "a number of 'updates'"),
    "a turn without end": (controller_edit("passes", "quadrature", "turn", 2**60), "a position among the nodes"),
    "a plan of words": (controller_edit("passes", "quadrature", "plan", [["a", 1]]), "planned nodes"),
    "no passes": (controller_edit("passes", KeyError), "a position in the window"),
    "a short series": (controller_edit("series", [[1, [[1.0]]]]), "a series of steps"),
    "a history of others": (controller_edit("history", [{"step": 1, "budget": 2, "ranks": {}}]), "a history of step"),
    "half a step": (controller_edit("pending", {"unstepped": 1}), "the step under way"),
    "scores of another shape": (
        state_edit(CONTROLLER, lambda t: t.update(mean=t["mean"][:-1].clone())), "'mean' of shape .* another adapter",
    ),
    "sums of the window missing": (state_edit(CONTROLLER, lambda t: t.pop("path")), "'path' of shape .* got nothing"),
    "a live mask of halves": (state_edit(CONTROLLER, lambda t: t["live"].fill_(0.5)), "a live mask of 0 and 1"),
    "nodes without random numbers": (state_edit(CONTROLLER, lambda t: t.pop("generator")), "random numbers of the nodes"),
    "a foreign tensor": (state_edit(CONTROLLER, lambda t: t.update(x=torch.ones(1))), "the controller's state, got 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(RESUME_DAMAGE))
def test_a_damaged_checkpoint_changes_nothing(net, config, trainer, run, batches, folder, name) -> None:
    damage, match = RESUME_DAMAGE[name]
    damage(folder)
    model, controller, optimizer = trainer(net(), config(modules_to_save=["head"]))
    run(model, controller, optimizer, batches(4))

    def state() -> str:
        own = [model.state_dict(), optimizer.state_dict(), controller.state_dict(), find_bank(model).live]
        return repr(own) + repr(random.getstate()) + repr(np.random.get_state()) + repr(torch.get_rng_state().tolist())

    before = state()
    with pytest.raises((ValueError, FileNotFoundError), match=match) as info:
        load_checkpoint(folder, model, optimizer, controller)
    assert str(folder) in str(info.value)
    assert state() == before


def test_format_1_is_read(net, config, trainer, run, batches, tmp_path) -> None:
    """A checkpoint of the release before checksums, after nine steps."""
    folder = Path(__file__).parent / "format1"
    raw = load_file(folder / "adapter_model.safetensors")
    model = igulora.load_adapter(net(), folder)
    assert torch.equal(model.first.lora_P, raw["first.lora_P"])
    options = config(r=2, target_rank=1, normalize="none", modules_to_save=["head"])
    model, controller, optimizer = trainer(net(), options, trace=["first"])
    assert load_checkpoint(folder, model, optimizer, controller) == {"note": "format 1"}
    assert controller.global_step == 9
    assert torch.equal(model.body["up"].lora_Q, raw["body.up.lora_Q"])
    assert float(next(iter(optimizer.state.values()))["step"]) == 9
    state = load_file(folder / "controller_state.safetensors")
    assert torch.equal(controller.importance.mean, state["mean"])
    assert torch.equal(controller.importance.deviation, state["deviation"])
    # The next step is the release's; later ones score sequences that are drawn otherwise by now.
    losses = run(model, controller, optimizer, batches(12)[9:])
    assert losses[0] == pytest.approx(0.9021645188331604, rel=1e-4)
    assert controller.global_step == 12
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / OPTIMIZER)
    save_file({**tensors, "0.exp_avg": torch.ones(5, 5)}, copy / OPTIMIZER)
    with pytest.raises(ValueError, match=r"'0.exp_avg' in .* to fit a parameter of shape \(2, 12\), got \(5, 5\)"):
        load_checkpoint(copy, model, optimizer, controller)


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_commands_say_what_is_damaged(folder, tmp_path, capsys, command) -> None:
    flip("adapter_model.safetensors")(folder)
    more = ["--output", str(tmp_path / "out")] if command == "export" else []
    assert main([command, str(folder), *more]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "to have the checksum recorded for it" in said
    assert not (tmp_path / "out").exists()
