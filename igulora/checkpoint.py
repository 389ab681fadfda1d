"""Checkpoints of a run: save, and resume exactly.

To what an adapter's folder holds (:mod:`igulora.saved_adapter`) a checkpoint adds ``optimizer.safetensors`` and ``checkpoint.json``: the
optimizer, the random number generators, and inside an accumulation the gradients so far.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_file import CONFIG_FILE, FORMAT, OPTIMIZER_FILE, TRAINER_FILE, AdapterFile, describe_folder, read_modules
from .bank import find_bank
from .controller import Controller
from .distributed import average_gradients
from .files import check_digest, check_seal, file_digest, put_json, put_tensors, read_json, read_tensors, sealed
from .fit import check_options, check_same
from .folders import place, save_whole, settled
from .packing import pack, unpack
from .saved_adapter import FILES, adapter_of, controller_state, fill, obsolete, put_adapter
from .training_state import (
    check_gradients,
    check_optimizer,
    check_random,
    from_format_1,
    gradients,
    optimizer_state,
    random_state,
)
from .unwrap import unwrap


def save_checkpoint(
    directory: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    controller: Controller,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write all that an exact resume needs: adapter, optimizer, controller, random number generators, ``extra``.

    Between any two calls of the loop: inside an accumulation the gradients so far are saved too. The generators are those of PyTorch
    (CPU and CUDA), NumPy and Python; one of your own (a data loader's) and a learning rate scheduler belong into ``extra``. The folder
    holds the former checkpoint or the new one, whole, whenever the process dies.

    With several processes all of them call this: sums of an unfinished window, gradients of a step under way and generators are gathered,
    and the first one writes while the others wait. A run goes on with any number of processes: as the uninterrupted one where there are as
    many, and equal to it up to rounding where fewer share the same joint batches.

    Args:
        extra: None, numbers, strings, tensors, and lists, tuples and dicts of them; they come back as they were, tensors on the CPU.

    Raises:
        TypeError: ``extra`` or the optimizer holds something that cannot be saved exactly.
        ValueError, OSError: as :func:`save_adapter`; in the other processes a ValueError that quotes it.
    """
    directory, model, processes = Path(directory), unwrap(model), controller.processes
    controller.passes.reduce_window()
    context = find_bank(model).context
    # Each process counts the passes that reached its first layer, and all have to take part in the reduction if one does.
    context.unstepped = max(processes.gather(max(context.unstepped, int(controller.inside_step))))
    if processes.count > 1 and context.unstepped:
        average_gradients(model, processes)
    drawn: dict[str, Tensor] = {}
    random = processes.gather((random_state(drawn), drawn))
    processes.first_only(lambda: _write_checkpoint(directory, model, optimizer, controller, extra or {}, random))
    return directory


def _write_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    controller: Controller,
    extra: dict[str, Any],
    random: list[tuple[dict[str, Any], dict[str, Tensor]]],
) -> None:
    tensors, meta = adapter_of(model, controller)
    ours: dict[str, Tensor] = {}
    for k, (_, drawn) in enumerate(random):
        ours |= {f"{_of_process(k)}{name}": value for name, value in drawn.items()}
    trainer = {
        "format": FORMAT,
        "stamp": meta["stamp"],
        "optimizer": optimizer_state(model, optimizer, ours),
        "random": random[0][0],
        "random_of_others": [state for state, _ in random[1:]],
        "extra": pack(extra, "extra", ours),
    }
    if find_bank(model).context.unstepped:
        gradients(model, ours)
    with save_whole(directory, obsolete(directory)) as folder:
        put_tensors(folder / OPTIMIZER_FILE, ours, {"stamp": meta["stamp"]})
        files = {OPTIMIZER_FILE: file_digest(folder / OPTIMIZER_FILE)}
        put_json(folder / TRAINER_FILE, sealed({**trainer, "files": files}))
        put_adapter(folder, tensors, meta, controller)


def _of_process(k: int) -> str:
    """What the names of the random states of process ``k`` begin with; the first one's have names of their own."""
    return f"process.{k}." if k else ""


def _own_random(trainer: dict[str, Any], tensors: dict[str, Tensor], rank: int, where: str) -> Callable[[], None]:
    """Check the random states of all processes; returns what sets this one's, the first one's where there was none."""
    others = trainer.get("random_of_others", [])
    if not isinstance(others, list):
        raise ValueError(f"expected the random states of the other processes in {where}, got {others!r:.200}")
    restore = check_random(trainer.get("random"), tensors, where)
    for k, state in enumerate(others, start=1):
        start = _of_process(k)
        drawn = {name.removeprefix(start): tensors.pop(name) for name in list(tensors) if name.startswith(start)}
        set_random = check_random(state, drawn, where)
        if drawn:
            raise ValueError(
                f"expected random states of process {k} in {where}, got {min(drawn)!r:.200}; the file is foreign"
            )
        if k == rank:
            restore = set_random
    return restore


def load_checkpoint(
    directory: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, controller: Controller
) -> dict[str, Any]:
    """Continue from :func:`save_checkpoint`, on a model adapted with the same options; returns ``extra``.

    A compacted model has fewer stored triplets than its options say: adapt the base model with :func:`load_adapter` first.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is incomplete, damaged, or of another adapter, optimizer or run; nothing is changed
            then, neither the model nor the optimizer, the controller or a random number generator.
    """
    directory, model = Path(directory), unwrap(model)
    changes, extra = settled(directory, FILES, lambda: _check_checkpoint(directory, model, optimizer, controller))
    for change in changes:
        change()
    return extra


def _check_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, controller: Controller
) -> tuple[list[Any], dict[str, Any]]:
    """What :func:`load_checkpoint` has to do, once all of it is known to work."""
    where = str(directory / TRAINER_FILE)
    trainer = read_json(place(directory, TRAINER_FILE))
    description = describe_folder(directory)
    check_same(description, model)
    check_options(description, model, controller)
    optimizer_file = place(directory, OPTIMIZER_FILE)
    if "digest" in trainer or description.meta["format"] > 1:
        check_seal(directory / TRAINER_FILE, trainer)
        if trainer.get("stamp") != description.meta["stamp"]:
            raise ValueError(
                f"expected {TRAINER_FILE} and {CONFIG_FILE} of one save in {directory}, got files of two; an adapter was saved over a "
                "checkpoint, or files were mixed: take an earlier copy"
            )
        files = trainer.get("files")
        if not isinstance(files, dict):
            raise ValueError(f"expected the checksums of the files in {where}, got none; the file is damaged")
        if optimizer_file.is_file():
            check_digest(optimizer_file, files.get(OPTIMIZER_FILE))
    tensors = read_tensors(optimizer_file)
    if description.meta["format"] == 1:
        from_format_1(trainer, tensors, optimizer, str(directory))
    load_optimizer = check_optimizer(model, optimizer, trainer.get("optimizer"), tensors, where)
    set_random = _own_random(trainer, tensors, controller.processes.rank, where)
    set_gradients = check_gradients(model, tensors, where)
    extra = unpack(trainer.get("extra"), where, tensors)
    if tensors:
        raise ValueError(
            f"expected states of the optimizer and of random numbers in {optimizer_file}, got {min(tensors)!r:.200}; the file is foreign"
        )
    if not isinstance(extra, dict):
        raise ValueError(f"expected extra values in {where}, got {extra!r:.200}; the file is damaged")
    modules, saved = read_modules(description)
    file = AdapterFile(description.config, modules, saved, description.meta, {})
    state = controller_state(description, controller)
    # The optimizer first: of all it alone runs code that is not ours.
    changes = [
        load_optimizer,
        lambda: controller.load_state_dict(state),
        lambda: fill(model, file),
        set_gradients,
        set_random,
    ]
    return changes, extra
