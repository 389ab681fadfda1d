"""The output folder of a run: what may be in it, and what may not be lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..files import read_json
from ..folders import finish
from .loop import CHECKPOINTS, latest_checkpoint

RUN_FILE = "run.json"
# Everything a run writes; --overwrite removes these and nothing else.
_FILES = (
    RUN_FILE, "metrics.jsonl", "report.json", "ranks.png", "budget.png", "series.png", "moves.png", "alignment.json", "dimensionality.png",
    "adapter_model.safetensors",
    "igulora_config.json", "controller_state.safetensors",
)  # fmt: skip
_FOLDERS = (CHECKPOINTS, "best")


def check_output(folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that a run could damage, before anything is loaded; changes nothing.

    Raises:
        ValueError: both options were given, the folder holds something, or there is nothing to resume; says what to do.
    """
    if resume and overwrite:
        raise ValueError("expected --resume or --overwrite, got both; resuming needs what overwriting removes")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder for --output, got the file {folder}")
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(
            f"expected an --output that can be written, got {folder}: {above} is no folder or is read-only"
        )
    ours = (folder / RUN_FILE).is_file()
    if resume:
        if not ours or latest_checkpoint(folder) is None:
            finished = ours and (folder / "report.json").is_file()
            state = "a finished run" if finished else "a run without a checkpoint" if ours else "no run"
            raise ValueError(
                f"expected a run with a checkpoint to resume in {folder}, found {state}; start one without --resume"
            )
        return
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        hint = "add --overwrite to replace the run in it, or choose another folder" if ours else "choose another folder"
        if ours and latest_checkpoint(folder) is not None:
            hint = "add --resume to go on with the run in it, or --overwrite to replace it"
        raise ValueError(f"expected an empty or new folder for --output, found files in {folder}; {hint}")
    if not ours:
        raise ValueError(
            f"expected --overwrite to replace an earlier run, found none in {folder}; choose another folder"
        )


def clear_output(folder: Path) -> None:
    """Make the folder, and remove what an earlier run wrote into it."""
    folder.mkdir(parents=True, exist_ok=True)
    finish(folder)  # of a save that was killed: its files are the run's too
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def check_same_run(
    folder: Path, wanted: dict[str, Any], may_differ: frozenset[str], usual: dict[str, dict[str, Any]] | None = None
) -> None:
    """Compare the options of the run in ``folder`` with those it is to be resumed with.

    Args:
        usual: defaults by part, which stand for options that the run's file does not have: those that came into being after it.

    Raises:
        ValueError: options differ (lists them), or the file is damaged.
    """
    try:
        former = read_json(folder / RUN_FILE)
    except ValueError as error:
        raise ValueError(f"{error}; start anew with --overwrite") from error
    wanted, usual = json.loads(json.dumps(wanted)), json.loads(json.dumps(usual or {}))
    different = []
    for part in sorted(set(former) | set(wanted)):
        old, new = former.get(part), wanted.get(part)
        if isinstance(old, dict) and isinstance(new, dict):
            names = sorted(set(old) | set(new))
            before = {**usual.get(part, {}), **old}
            changed = [name for name in names if before.get(name) != new.get(name) and name not in may_differ]
            different += [f"{name}: {before.get(name)!r} then, {new.get(name)!r} now" for name in changed]
        elif old != new:
            different.append(f"{part}: {old!r} then, {new!r} now")
    if different:
        raise ValueError(
            f"expected the options of the run in {folder} to resume it exactly, got others ({'; '.join(different)}); "
            "repeat the first command with --resume added, or start anew with --overwrite"
        )
