"""Adapters on disk: save one, adapt a model with it, put it into a model that has it already.

A folder (:mod:`igulora.adapter_file`) holds the adapter and, with a controller, its state. All files of a save take effect at once
(:mod:`igulora.folders`), and loading checks everything before the first change.
"""

from __future__ import annotations

import secrets
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
    OPTIMIZER_FILE,
    PARTS,
    TRAINER_FILE,
    AdapterFile,
    Description,
    describe_folder,
    read_controller,
    read_modules,
)
from .bank import Bank, base_model, find_bank, find_config
from .bases import describe
from .controller import Controller
from .controller_state import check_controller_state
from .distributed import Processes
from .files import file_digest, put_json, put_tensors, sealed
from .fit import check_model, check_options, check_same
from .folders import place, save_whole, settled
from .kinds import Conv2dAdapter
from .layers import AdaptedLayer
from .packing import pack
from .unwrap import unwrap

# Of an adapter or a checkpoint: what the next save replaces.
FILES = (ADAPTER_FILE, CONTROLLER_FILE, CONFIG_FILE, OPTIMIZER_FILE, TRAINER_FILE)


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
        tensors, meta = adapter_of(model, controller)
        with save_whole(directory, obsolete(directory)) as folder:
            put_adapter(folder, tensors, meta, controller if resumable else None)
    return directory


def obsolete(directory: Path) -> list[str]:
    """Files of the save in ``directory``, if it is ours."""
    return list(FILES) if place(directory, CONFIG_FILE).is_file() else []


@torch.no_grad()
def adapter_of(model: nn.Module, controller: Controller | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an adapter and what ``igulora_config.json`` says of them.

    Raises:
        ValueError: the model is merged, or a weight is not finite.
    """
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
    with save_whole(directory, obsolete(directory)) as folder:
        put_adapter(folder, *_described(file), None)
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
    return {name: [layer.in_channels, *layer.kernel_size] for name, layer in pairs if isinstance(layer, Conv2dAdapter)}


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


def put_adapter(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], controller: Controller | None) -> None:
    """Write what :func:`adapter_of` gave, and the controller's state, into a folder under way."""
    stamp = {"stamp": meta["stamp"]}
    put_tensors(folder / ADAPTER_FILE, tensors, stamp)
    files = {ADAPTER_FILE: file_digest(folder / ADAPTER_FILE)}
    if controller is not None:
        state = controller.state_dict()
        put_tensors(folder / CONTROLLER_FILE, state["tensors"], stamp)
        files[CONTROLLER_FILE] = file_digest(folder / CONTROLLER_FILE)
        meta = {**meta, "controller": pack(state["meta"], "the controller's state")}
    put_json(folder / CONFIG_FILE, sealed({**meta, "files": files}))


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Adapt a base model with the adapter saved in ``directory``; returns the model. Everything is checked before the first change.

    Raises:
        FileNotFoundError, ValueError: the folder is incomplete or damaged, or the adapter is another model's (names and shapes listed).
    """
    directory = Path(directory)
    check_plain(model)

    def read() -> AdapterFile:
        description = describe_folder(directory)
        check_model(description, model)
        modules, saved = read_modules(description)
        return AdapterFile(description.config, modules, saved, description.meta, {})

    return install(model, settled(directory, (CONFIG_FILE, ADAPTER_FILE), read))


def install(model: nn.Module, file: AdapterFile) -> nn.Module:
    """Adapt a base model with an adapter that fits it; returns the model."""
    ranks = [parts["lora_E"].shape[0] for parts in file.modules.values()]
    inject(model, file.config, list(file.modules), list(file.saved), ranks)
    fill(model, file)
    return model


@torch.no_grad()
def fill(model: nn.Module, file: AdapterFile) -> None:
    """Put the values of an adapter into a model that has its layers and ranks."""
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
            folder holds no state of one, or that of a run with other options.
    """
    directory = Path(directory)

    def read() -> tuple[AdapterFile, dict[str, Any] | None]:
        description = describe_folder(directory)
        check_same(description, model)
        if controller is not None:
            check_options(description, model, controller)
        modules, saved = read_modules(description)
        state = None if controller is None else controller_state(description, controller)
        return AdapterFile(description.config, modules, saved, description.meta, {}), state

    file, state = settled(directory, FILES, read)
    if controller is not None and state is not None:
        # A step that was under way lacks its gradients here: it starts anew.
        meta = {key: value for key, value in state["meta"].items() if key != "pending"}
        controller.load_state_dict({**state, "meta": meta})
    fill(model, file)
    return file


def controller_state(description: Description, controller: Controller) -> dict[str, Any]:
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
