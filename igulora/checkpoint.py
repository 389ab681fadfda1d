"""Adapters and checkpoints of a model: save, load, and resume exactly.

An adapter folder (:mod:`igulora.adapter_file`) holds the adapter and, with a controller, its state. A checkpoint adds
``optimizer.safetensors`` and ``checkpoint.json``: the optimizer, the random number generators, and inside an accumulation the gradients
so far. All files of a save take effect at once (:mod:`igulora.folders`), and loading checks everything before the first change.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import check_plain, inject, saved_modules
from .adapter_file import (
    ADAPTER_FILE,
    CONFIG_FILE,
    CONTROLLER_FILE,
    FORMAT,
    PARTS,
    AdapterFile,
    Description,
    describe_folder,
    read_adapter,
    read_controller,
    read_modules,
)
from .bank import Bank, base_model, find_bank, find_config
from .bases import describe
from .controller import Controller
from .controller_state import check_controller_state
from .distributed import Processes, average_gradients
from .experts import bases_of
from .files import check_digest, check_seal, file_digest, put_json, put_tensors, read_json, read_tensors, sealed
from .folders import place, save_whole, settled
from .layers import AdaptedLayer, FusedSVDConv2d
from .packing import pack, unpack
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

OPTIMIZER_FILE, TRAINER_FILE = "optimizer.safetensors", "checkpoint.json"
_FILES = (ADAPTER_FILE, CONTROLLER_FILE, CONFIG_FILE, OPTIMIZER_FILE, TRAINER_FILE)
# Options that a resumed run may change: what they decided is in the tensors, or they change no bit.
_FREE_OPTIONS = {
    "recompute_inputs", "target_modules", "target_parameters", "exclude_modules", "modules_to_save", "rank_pattern", "init", "init_lambda",
    "seed",
}  # fmt: skip

__all__ = [
    "CONFIG_FILE",
    "TRAINER_FILE",
    "AdapterFile",
    "load_adapter",
    "load_checkpoint",
    "read_adapter",
    "restore_adapter",
    "save_adapter",
    "save_checkpoint",
]


# -- saving -----------------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    controller: Controller | None = None,
    *,
    resumable: bool = True,
    write: bool | None = None,
) -> Path:
    """Write the adapter of ``model`` (and the controller's state) into ``directory``; returns the folder.

    The folder holds the former save or the new one, whole, whenever the process dies; other files in it are left alone.

    Args:
        model: adapted by :func:`igulora.adapt`.
        directory: made when missing.
        controller: its history of ranks is written, and its state.
        resumable: False leaves the state out: scores and the sums of an unfinished window, three times the size of the adapter.
        write: whether this process writes; by default the first one does, and the others return at once. The state is then that of the
            first process: inside a window its own samples, unless ``controller.passes.reduce_window()`` was called in every process before
            (:func:`save_checkpoint` does).

    Raises:
        ValueError: the model is not adapted, or merged, or its trained weights are not finite. OSError: the disk is full or read-only. What
            was saved before stays then.
    """
    directory, model = Path(directory), unwrap(model)
    processes = Processes() if controller is None else controller.processes
    if processes.rank == 0 if write is None else write:
        tensors, meta = _adapter(model, controller)
        with save_whole(directory, _obsolete(directory)) as folder:
            _write_adapter(folder, tensors, meta, controller if resumable else None)
    return directory


def _obsolete(directory: Path) -> list[str]:
    """Files of the save in ``directory``, if it is ours."""
    return list(_FILES) if place(directory, CONFIG_FILE).is_file() else []


@torch.no_grad()
def _adapter(model: nn.Module, controller: Controller | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    bank = find_bank(model)
    if any(layer.merged for layer in bank.layers):
        raise ValueError(
            "expected an unmerged model, got a merged one; call igulora.unmerge(model) before saving its adapter"
        )
    config = find_config(model)
    modules = {}
    for i, (name, layer) in enumerate(zip(bank.names, bank.layers, strict=True)):
        live = bank.live[bank.starts[i] : bank.starts[i + 1]]
        values = (layer.lora_P, layer.lora_E, layer.lora_Q, layer.mask, live)
        modules[name] = dict(zip(PARTS, values, strict=True))
    saved = saved_modules(model)
    _check_finite(bank, {f"{n}.{key}": p for n, m in saved.items() for key, p in m.trained.named_parameters()})
    meta = {
        "ranks": bank.ranks(),
        "scale": {name: layer.scale for name, layer in zip(bank.names, bank.layers, strict=True)},
        "kinds": kinds_of(model),
        "filters": filters_of(model),
        "history": controller.history if controller is not None else [],
    }
    states = {name: module.trained.state_dict() for name, module in saved.items()}
    return _described(AdapterFile(config, modules, states, meta, {}))


def _described(file: AdapterFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a folder that holds ``file``."""
    tensors = {f"{name}.{part}": value for name, parts in file.modules.items() for part, value in parts.items()}
    for name, state in file.saved.items():
        tensors |= {f"{name}.saved.{key}": value for key, value in state.items()}
    meta = {
        "format": FORMAT,
        "stamp": secrets.token_hex(8),
        "library": "igulora",
        "config": file.config.to_dict(),
        "modules": {name: parts["lora_E"].shape[0] for name, parts in file.modules.items()},
        **file.meta,
        "saved": sorted(file.saved),
        "controller": None,
    }
    return tensors, meta


def write_adapter(file: AdapterFile, directory: Path) -> Path:
    """Write an adapter folder without a model; returns the folder."""
    with save_whole(directory, _obsolete(directory)) as folder:
        _write_adapter(folder, *_described(file), None)
    return directory


def kinds_of(model: nn.Module) -> dict[str, str]:
    """The kind of base (:attr:`Base.kind`) under each adapted layer."""
    bank, inner = find_bank(model), base_model(unwrap(model))
    kinds = {}
    for name, layer in zip(bank.names, bank.layers, strict=True):
        base = layer.base if isinstance(layer, AdaptedLayer) else describe(inner.get_submodule(name).base_layer)  # type: ignore[arg-type]
        if base is not None:
            kinds[name] = base.kind
    return kinds


def filters_of(model: nn.Module) -> dict[str, list[int]]:
    """In channels, height and width of each adapted convolution's filters."""
    bank = find_bank(model)
    pairs = zip(bank.names, bank.layers, strict=True)
    return {name: list(layer.weight.shape[1:]) for name, layer in pairs if isinstance(layer, FusedSVDConv2d)}


def _check_finite(bank: Bank, others: dict[str, Tensor]) -> None:
    """A folder with NaN in it would be refused by whoever loads it: better to keep the last good one."""
    values = {**{".".join(key): view for key, view in bank.matrix_views(bank.weight).items()}, **others}
    if not values:
        return
    finite = torch.stack([torch.isfinite(value.detach()).all() for value in values.values()]).tolist()
    bad = [name for name, fine in zip(values, finite, strict=True) if not fine]
    if bad:
        raise ValueError(
            f"expected finite weights to save, got NaN or infinity in {', '.join(bad[:4])}{', ...' if len(bad) > 4 else ''}; the run has "
            "diverged: go back to an earlier checkpoint"
        )


def _write_adapter(
    folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], controller: Controller | None
) -> None:
    stamp = {"stamp": meta["stamp"]}
    put_tensors(folder / ADAPTER_FILE, tensors, stamp)
    files = {ADAPTER_FILE: file_digest(folder / ADAPTER_FILE)}
    if controller is not None:
        state = controller.state_dict()
        put_tensors(folder / CONTROLLER_FILE, state["tensors"], stamp)
        files[CONTROLLER_FILE] = file_digest(folder / CONTROLLER_FILE)
        meta = {**meta, "controller": pack(state["meta"], "the controller's state")}
    put_json(folder / CONFIG_FILE, sealed({**meta, "files": files}))


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
    if processes.count > 1 and find_bank(model).context.unstepped:
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
    tensors, meta = _adapter(model, controller)
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
    with save_whole(directory, _obsolete(directory)) as folder:
        put_tensors(folder / OPTIMIZER_FILE, ours, {"stamp": meta["stamp"]})
        files = {OPTIMIZER_FILE: file_digest(folder / OPTIMIZER_FILE)}
        put_json(folder / TRAINER_FILE, sealed({**trainer, "files": files}))
        _write_adapter(folder, tensors, meta, controller)


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


# -- loading ----------------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Adapt a base model with the adapter saved in ``directory``; returns the model. Everything is checked before the first change.

    Raises:
        FileNotFoundError, ValueError: the folder is incomplete or damaged, or the adapter is another model's (names and shapes listed).
    """
    directory = Path(directory)
    check_plain(model)

    def read() -> AdapterFile:
        description = describe_folder(directory)
        _check_model(description, model)
        modules, saved = read_modules(description)
        return AdapterFile(description.config, modules, saved, description.meta, {})

    return install(model, settled(directory, (CONFIG_FILE, ADAPTER_FILE), read))


def _check_model(description: Description, model: nn.Module) -> None:
    shapes = {name: (base.out_features, base.in_features) for name, base in bases_of(model).items()}
    _check_fits(description, shapes)
    _check_saved(description, dict(model.named_modules()))


def check_fits(model: nn.Module, file: AdapterFile, directory: Path) -> None:
    """Raise ValueError unless what was read from ``directory`` fits a base model: layers and modules to save, names and shapes."""
    shapes = {name: (parts["lora_P"].shape[1], parts["lora_Q"].shape[1]) for name, parts in file.modules.items()}
    saved = {name: {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} for name, state in file.saved.items()}
    _check_model(Description(directory, file.meta, file.config, shapes, saved, None), model)


def install(model: nn.Module, file: AdapterFile) -> nn.Module:
    """Adapt a base model with an adapter that fits it; returns the model."""
    ranks = [parts["lora_E"].shape[0] for parts in file.modules.values()]
    inject(model, file.config, list(file.modules), list(file.saved), ranks)
    _fill(model, file)
    return model


def _check_fits(file: Description, shapes: dict[str, tuple[int, int]]) -> None:
    wrong = []
    for name, wanted in file.shapes.items():
        if name not in shapes:
            wrong.append(f"{name}: (out, in) = {wanted}, not in the model")
        elif shapes[name] != wanted:
            wrong.append(f"{name}: (out, in) = {wanted}, the model's is {shapes[name]}")
    if wrong:
        more = f"\n  ... and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            f"expected the model that the adapter in {file.directory} was trained on, got another:\n  "
            + "\n  ".join(wrong[:10])
            + more
        )


def _check_saved(file: Description, modules: dict[str, nn.Module]) -> None:
    for name, state in file.saved.items():
        if name not in modules:
            raise ValueError(f"expected a model with the module {name!r} saved in {file.directory}, got one without it")
        theirs = {key: shape for key, (_, shape) in state.items()}
        mine = {key: tuple(value.shape) for key, value in modules[name].state_dict().items()}
        if theirs != mine:
            raise ValueError(
                f"expected the module {name!r} to have the tensors saved in {file.directory}: {theirs}, got a model with {mine}"
            )
        for key, value in modules[name].state_dict().items():
            if state[key][0].is_floating_point != value.dtype.is_floating_point:
                raise ValueError(
                    f"expected {name}.{key} in {file.directory} to be {value.dtype} as in the model, got {state[key][0]}"
                )


@torch.no_grad()
def _fill(model: nn.Module, file: AdapterFile) -> None:
    bank = find_bank(model)
    for name, layer in zip(bank.names, bank.layers, strict=True):
        parts = file.modules[name]
        layer.lora_P.copy_(parts["lora_P"])
        layer.lora_E.copy_(parts["lora_E"])
        layer.lora_Q.copy_(parts["lora_Q"])
        layer.mask.copy_(parts["mask"])
        layer.scale = float(file.meta["scale"][name])
    live = [file.modules[name]["live"] for name in bank.names]
    bank.live = torch.cat(live).to(bank.device, bank.dtype) if live else bank.mask.clone()
    for name, module in saved_modules(model).items():
        module.trained.load_state_dict(file.saved[name])


def restore_adapter(model: nn.Module, directory: str | Path, controller: Controller | None = None) -> AdapterFile:
    """Put the adapter saved in ``directory`` into a model that has the same adapters already, and the state into ``controller``.

    Everything is checked before the first change. Returns what was read.

    Raises:
        FileNotFoundError, ValueError: the folder is incomplete or damaged, the adapter is another one, or ``controller`` is given and the
            folder holds no state of one.
    """
    directory = Path(directory)

    def read() -> tuple[AdapterFile, dict[str, Any] | None]:
        description = describe_folder(directory)
        _check_same(description, model)
        modules, saved = read_modules(description)
        state = None if controller is None else _controller_state(description, controller)
        return AdapterFile(description.config, modules, saved, description.meta, {}), state

    file, state = settled(directory, _FILES, read)
    if controller is not None and state is not None:
        # A step that was under way lacks its gradients here: it starts anew.
        meta = {key: value for key, value in state["meta"].items() if key != "pending"}
        controller.load_state_dict({**state, "meta": meta})
    _fill(model, file)
    return file


def _controller_state(description: Description, controller: Controller) -> dict[str, Any]:
    """The state of a controller, checked.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged or of another adapter.
    """
    state = {"tensors": read_controller(description), "meta": description.meta["controller"]}
    try:
        check_controller_state(controller, state)
    except ValueError as error:
        raise ValueError(f"{error} (in {description.directory})") from error
    return state


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
    changes, extra = settled(directory, _FILES, lambda: _check_checkpoint(directory, model, optimizer, controller))
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
    _check_same(description, model)
    _check_options(description, model, controller)
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
    state = _controller_state(description, controller)
    # The optimizer first: of all it alone runs code that is not ours.
    changes = [
        load_optimizer,
        lambda: controller.load_state_dict(state),
        lambda: _fill(model, file),
        set_gradients,
        set_random,
    ]
    return changes, extra


def _check_same(file: Description, model: nn.Module) -> None:
    bank = find_bank(model)
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in zip(bank.names, bank.layers, strict=True)}
    _check_fits(file, shapes)
    mine = {name: layer.r for name, layer in zip(bank.names, bank.layers, strict=True)}
    if list(file.modules.items()) != list(mine.items()):
        raise ValueError(
            f"expected the modules and ranks of the model in {file.directory}, got others; resume with the same options"
        )
    if any(layer.merged for layer in bank.layers):
        raise ValueError("expected an unmerged model to resume, got a merged one; call igulora.unmerge(model) first")
    modules: dict[str, nn.Module] = {name: module.trained for name, module in saved_modules(model).items()}
    if sorted(modules) != sorted(file.saved):
        raise ValueError(
            f"expected the modules to save of the model, {sorted(modules)}, in {file.directory}, got {sorted(file.saved)}; resume with the "
            "same options"
        )
    _check_saved(file, modules)


def _check_options(file: Description, model: nn.Module, controller: Controller) -> None:
    if controller.bank is not find_bank(model):
        raise ValueError("expected the controller of this model, got one of another model")
    now, then = dataclasses.asdict(controller.config), dataclasses.asdict(file.config)
    changed = [f"{key}: {then[key]!r} then, {now[key]!r} now" for key in now if now[key] != then[key]]
    changed = [text for text in changed if text.split(":")[0] not in _FREE_OPTIONS]
    if changed:
        raise ValueError(
            f"expected the options of the run saved in {file.directory}, got others ({'; '.join(changed)}); resume with the same options"
        )
