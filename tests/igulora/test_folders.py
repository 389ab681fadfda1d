"""Several files replaced as a whole: errors on the way, what killed saves leave, files of others, readers meanwhile."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import igulora
from igulora import files, folders
from igulora.checkpoint import load_checkpoint, save_checkpoint
from igulora.folders import COMPLETE, PARTIAL, finish, place, save_whole, settled


def put(directory: Path, contents: dict[str, str], obsolete: tuple[str, ...] = ()) -> None:
    with save_whole(directory, obsolete) as folder:
        for name, text in contents.items():
            (folder / name).write_text(text)


def half(directory: Path, error: BaseException) -> None:
    with save_whole(directory) as folder:
        (folder / "a").write_text("half")
        raise error


def held(directory: Path) -> dict[str, str]:
    """Names and contents of a folder, of hidden ones too."""
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_save_replaces_its_files_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("somebody's")
    (tmp_path / "sub").mkdir()
    put(tmp_path, {"a": "1", "b": "1", "old": "1"})
    put(tmp_path, {"a": "2", "b": "2"}, ("a", "old", "trainer_state.jso"))
    assert held(tmp_path) == {"a": "2", "b": "2", "trainer_state.json": "somebody's"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "sub", "trainer_state.json"]


def test_what_was_moved_in_part_is_read_as_a_whole_and_finished_by_the_next_save(tmp_path: Path) -> None:
    put(tmp_path, {"a": "1", "b": "1"})
    (tmp_path / COMPLETE).mkdir()
    (tmp_path / COMPLETE / "b").write_text("2")
    (tmp_path / "a").write_text("2")  # moved before the process died
    assert [place(tmp_path, name).read_text() for name in ("a", "b")] == ["2", "2"]
    assert place(tmp_path, "c") == tmp_path / "c"
    put(tmp_path, {"c": "3"})
    assert held(tmp_path) == {"a": "2", "b": "2", "c": "3"}
    finish(tmp_path)
    finish(tmp_path / "not there")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), PermissionError(13, "no"), KeyboardInterrupt()]
)
def test_an_error_leaves_no_trace(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "new" / "deep"
    with pytest.raises(type(error)):
        half(target, error)
    assert list(tmp_path.iterdir()) == []
    put(target, {"a": "1"})
    with pytest.raises(type(error)):
        half(target, error)
    assert held(tmp_path) == {"new/deep/a": "1"}


def test_a_folder_in_the_place_of_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="expected to write the file a in .*, found a folder"):
        put(tmp_path, {"a": "1", "b": "1"})
    assert held(tmp_path) == {}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder to save into, got the file"):
        put(tmp_path / "file", {"a": "1"})


def test_others_may_read_what_the_umask_lets_them(net, config, trainer, tmp_path: Path) -> None:
    model, controller, optimizer = trainer(net(), config())
    before = os.umask(0o027)
    try:
        folder = save_checkpoint(tmp_path / "c", model, optimizer, controller)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_folders_of_killed_saves_are_removed_and_those_of_running_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / f"{PARTIAL}dead").mkdir()
    (tmp_path / f"{PARTIAL}dead" / "a").write_text("half")
    with save_whole(tmp_path) as running:
        assert not (tmp_path / f"{PARTIAL}dead").exists()
        (running / "a").write_text("1")
        code = (
            "import sys; from pathlib import Path; from igulora.folders import save_whole\n"
            "with save_whole(Path(sys.argv[1])) as folder: (folder / 'b').write_text('2')"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path)
        assert running.exists()
    assert held(tmp_path) == {"a": "1", "b": "2"}


def test_without_locks_only_old_folders_are_taken_for_abandoned(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(folders, "fcntl", None)
    for name, age in (("old", 10**6), ("young", 0)):
        (tmp_path / f"{PARTIAL}{name}").mkdir()
        os.utime(tmp_path / f"{PARTIAL}{name}", (1.7e9, 1.7e9) if age else None)
    put(tmp_path, {"a": "1"})
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{PARTIAL}young", "a"]


def test_another_save_that_completed_meanwhile_is_finished_first(tmp_path: Path) -> None:
    with save_whole(tmp_path) as folder:
        (folder / "a").write_text("late")
        (tmp_path / COMPLETE).mkdir()
        (tmp_path / COMPLETE / "a").write_text("early")
        (tmp_path / COMPLETE / "b").write_text("early")
    assert held(tmp_path) == {"a": "late", "b": "early"}


def test_a_reader_tries_again_when_the_files_changed_under_its_hands(tmp_path: Path) -> None:
    put(tmp_path, {"a": "1"})
    tries = []

    def read() -> str:
        tries.append(1)
        if len(tries) < 3:
            put(tmp_path, {"a": str(len(tries) + 1)})
            raise ValueError("files of two saves")
        return (tmp_path / "a").read_text()

    assert settled(tmp_path, ("a",), read) == "3"
    with pytest.raises(ValueError, match="once"):
        settled(tmp_path, ("a",), lambda: (tries.append(1), (_ for _ in ()).throw(ValueError("once")))[1])
    assert len(tries) == 4


@pytest.mark.parametrize("name", ["put_tensors", "put_json", "file_digest"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_disk_keeps_the_old_checkpoint(
    net, config, trainer, run, batches, tmp_path, monkeypatch, name, at
) -> None:
    """Each file in turn is the one that does not fit; half of it is written."""
    model, controller, optimizer = trainer(net(), config(modules_to_save=["head"]))
    run(model, controller, optimizer, batches(3))
    target = tmp_path / "checkpoint"
    saves = [lambda: save_checkpoint(target, model, optimizer, controller, {"generation": controller.global_step})]
    calls, real = [], getattr(files, name)

    def failing(path: Path, *args: Any) -> Any:
        calls.append(path)
        if len(calls) == at:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args)

    count = {"put_tensors": 3, "put_json": 2, "file_digest": 3}[name]
    for first in (True, False):
        if not first:
            saves[0]()
            before = {p.name: p.read_bytes() for p in target.iterdir()}
            run(model, controller, optimizer, batches(2))
        calls.clear()
        with monkeypatch.context() as patch:
            for module in ("checkpoint", "saved_adapter"):
                patch.setattr(f"igulora.{module}.{name}", failing)
            if at > count:
                saves[0]()
                assert len(calls) == count
                continue
            with pytest.raises(OSError, match="No space left"):
                saves[0]()
        if first:
            assert list(tmp_path.iterdir()) == []
        else:
            assert {p.name: p.read_bytes() for p in target.iterdir()} == before
            assert load_checkpoint(target, model, optimizer, controller) == {"generation": 3}


@pytest.mark.parametrize("at", [1, 2])
def test_a_full_disk_keeps_the_old_export(net, config, tmp_path, monkeypatch, at) -> None:
    model = igulora.adapt(net(), config(init="gaussian", init_lambda=1.0))
    igulora.export_peft(model, tmp_path / "peft")
    before = {p.name: p.read_bytes() for p in (tmp_path / "peft").iterdir()}
    assert sorted(before) == ["adapter_config.json", "adapter_model.safetensors"]
    name = ("put_tensors", "put_json")[at - 1]

    def failing(path: Path, *_args: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with torch.no_grad():
        model.first.lora_E.mul_(2)
    monkeypatch.setattr(f"igulora.export.{name}", failing)
    with pytest.raises(OSError, match="No space left"):
        igulora.export_peft(model, tmp_path / "peft")
    assert {p.name: p.read_bytes() for p in (tmp_path / "peft").iterdir()} == before
