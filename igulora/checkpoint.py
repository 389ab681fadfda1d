"""Adapters and checkpoints on disk.

An adapter folder holds ``adapter_model.safetensors`` (per module P, E, Q, mask, live mask; modules to save), ``igulora_config.json``
(options, ranks, budget history) and, with a controller, ``controller_state.safetensors``. A checkpoint adds the optimizer and the random
number generators. Each file is written beside its place and renamed.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import check_plain, inject, saved_modules
from .bank import find_bank
from .config import IGUConfig
from .controller import Controller
from .experts import bases_of
from .files import read_json, read_metadata, read_tensors, write_json, write_tensors
from .layers import AdaptedLayer

ADAPTER_FILE, CONFIG_FILE, CONTROLLER_FILE = (
    "adapter_model.safetensors",
    "igulora_config.json",
    "controller_state.safetensors",
)
OPTIMIZER_FILE, TRAINER_FILE = "optimizer.safetensors", "checkpoint.json"
FORMAT = 1
_PARTS = ("lora_P", "lora_E", "lora_Q", "mask", "live")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder read without a model.

    Attributes:
        config: its options. modules: name -> {"lora_P", "lora_E", "lora_Q", "mask", "live"}. saved: name -> state dict of a module to save.
        meta: what else was written: "history", "ranks", "scale", "controller" (or None).
        terms: name -> (3, r) score terms of lambda, p, q; empty without a controller state.
    """

    config: IGUConfig
    modules: dict[str, dict[str, Tensor]]
    saved: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]
    terms: dict[str, Tensor]


def save_adapter(
    model: nn.Module, directory: str | Path, controller: Controller | None = None, *, resumable: bool = True
) -> Path:
    """Write the adapter of ``model`` (and the controller's state) into ``directory``; returns the folder.

    Args:
        model: adapted by :func:`igulora.adapt`.
        directory: made when missing.
        controller: its history of ranks is written, and its state.
        resumable: False leaves the state out: scores and the sums of an unfinished window, three times the size of the adapter.

    Raises:
        ValueError: the model is not adapted, or merged.
    """
    directory, bank = Path(directory), find_bank(model)
    if any(layer.merged for layer in bank.layers):
        raise ValueError(
            "expected an unmerged model, got a merged one; call igulora.unmerge(model) before saving its adapter"
        )
    modules = {}
    for i, (name, layer) in enumerate(zip(bank.names, bank.layers, strict=True)):
        live = bank.live[bank.starts[i] : bank.starts[i + 1]]
        values = (layer.lora_P, layer.lora_E, layer.lora_Q, layer.mask, live)
        modules[name] = dict(zip(_PARTS, values, strict=True))
    meta = {
        "ranks": bank.ranks(),
        "scale": {name: layer.scale for name, layer in zip(bank.names, bank.layers, strict=True)},
        "kinds": kinds_of(model),
        "history": controller.history if controller is not None else [],
    }
    saved = {name: module.module.state_dict() for name, module in saved_modules(model).items()}
    config: IGUConfig = model.igulora_config  # type: ignore[assignment]
    state = controller.state_dict() if controller is not None and resumable else None
    return write_adapter(AdapterFile(config, modules, saved, meta, {}), directory, state)


def write_adapter(file: AdapterFile, directory: Path, state: dict[str, Any] | None = None) -> Path:
    """Write what an adapter folder holds, and a controller's ``state_dict``; returns the folder."""
    tensors = {f"{name}.{part}": value for name, parts in file.modules.items() for part, value in parts.items()}
    for name, values in file.saved.items():
        tensors |= {f"{name}.saved.{key}": value for key, value in values.items()}
    stamp = secrets.token_hex(8)
    meta = {
        "format": FORMAT,
        "stamp": stamp,
        "library": "igulora",
        "config": file.config.to_dict(),
        "modules": {name: parts["lora_E"].shape[0] for name, parts in file.modules.items()},
        **file.meta,
        "saved": sorted(file.saved),
        "controller": state["meta"] if state is not None else None,
    }
    write_tensors(directory / ADAPTER_FILE, tensors, {"stamp": stamp})
    if state is not None:
        write_tensors(directory / CONTROLLER_FILE, state["tensors"], {"stamp": stamp})
    else:
        (directory / CONTROLLER_FILE).unlink(missing_ok=True)
    write_json(directory / CONFIG_FILE, meta)
    return directory


def kinds_of(model: nn.Module) -> dict[str, str]:
    """The kind of base (:attr:`Base.kind`) under each adapted layer."""
    bank = find_bank(model)
    pairs = zip(bank.names, bank.layers, strict=True)
    return {name: layer.base.kind for name, layer in pairs if isinstance(layer, AdaptedLayer)}


def read_adapter(directory: str | Path) -> AdapterFile:
    """Read and check an adapter folder without a model.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is truncated, foreign, or its tensors do not fit its own description.
    """
    directory = Path(directory)
    meta = read_json(directory / CONFIG_FILE)
    if meta.get("library") != "igulora" or not isinstance(meta.get("modules"), dict):
        raise ValueError(
            f"expected an igulora adapter in {directory}, got a {CONFIG_FILE} without its marks; was it made by igulora?"
        )
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"expected adapter format {FORMAT} in {directory}, got {meta.get('format')!r}; use a matching igulora version"
        )
    kinds = {"config": dict, "scale": dict, "ranks": dict, "saved": list, "history": list}
    for key, kind in kinds.items():
        by_module = key in ("scale", "ranks")
        if not isinstance(meta.get(key), kind) or (by_module and meta[key].keys() != meta["modules"].keys()):
            raise ValueError(
                f"expected {key!r} in {directory / CONFIG_FILE} to be complete, got {meta.get(key)!r}; save it again"
            )
    tensors = read_tensors(directory / ADAPTER_FILE)
    config = IGUConfig.from_dict(meta["config"])
    modules: dict[str, dict[str, Tensor]] = {}
    for name, rank in meta["modules"].items():
        modules[name] = {}
        for part in _PARTS:
            tensor = tensors.pop(f"{name}.{part}", None)
            dims = 2 if part in ("lora_P", "lora_Q") else 1
            if tensor is None or tensor.ndim != dims or tensor.shape[0] != rank or not tensor.is_floating_point():
                got = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(
                    f"expected {name}.{part} with {rank} rows in {directory / ADAPTER_FILE}, got {got}; the folder is damaged"
                )
            modules[name][part] = tensor
    saved: dict[str, dict[str, Tensor]] = {name: {} for name in meta["saved"]}
    for key in list(tensors):
        owner = next((n for n in saved if key.startswith(f"{n}.saved.")), None)
        if owner is None:
            raise ValueError(
                f"expected only tensors of the adapter in {directory / ADAPTER_FILE}, got {key!r}; the file is foreign"
            )
        saved[owner][key[len(owner) + len(".saved.") :]] = tensors.pop(key)
    _check_stamp(directory / ADAPTER_FILE, meta)
    if meta.get("controller") is not None and (directory / CONTROLLER_FILE).is_file():
        _check_stamp(directory / CONTROLLER_FILE, meta)
    return AdapterFile(config, modules, saved, meta, _score_terms(directory, meta))


def _check_stamp(path: Path, meta: dict[str, Any]) -> None:
    """Raise unless ``path`` was written by the same call of :func:`save_adapter` as the description ``meta``."""
    if read_metadata(path).get("stamp") != meta.get("stamp"):
        raise ValueError(
            f"expected {path.name} and {CONFIG_FILE} of one save in {path.parent}, got files of two; a save was interrupted or files were "
            "mixed: take an earlier copy"
        )


def _score_terms(directory: Path, meta: dict[str, Any]) -> dict[str, Tensor]:
    if meta.get("controller") is None or not (directory / CONTROLLER_FILE).is_file():
        return {}
    terms = read_tensors(directory / CONTROLLER_FILE)["terms"]
    out, start = {}, 0
    for name, rank in meta["modules"].items():
        out[name] = terms[:, start : start + rank]
        start += rank
    return out


def _check_fits(file: AdapterFile, shapes: dict[str, tuple[int, int]], directory: Path) -> None:
    wrong = []
    for name, parts in file.modules.items():
        wanted = (parts["lora_P"].shape[1], parts["lora_Q"].shape[1])
        if name not in shapes:
            wrong.append(f"{name}: (out, in) = {wanted}, not in the model")
        elif shapes[name] != wanted:
            wrong.append(f"{name}: (out, in) = {wanted}, the model's is {shapes[name]}")
    if wrong:
        more = f"\n  ... and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            f"expected the model that the adapter in {directory} was trained on, got another:\n  "
            + "\n  ".join(wrong[:10])
            + more
        )


def _check_saved(file: AdapterFile, modules: dict[str, nn.Module], directory: Path) -> None:
    for name, state in file.saved.items():
        if name not in modules:
            raise ValueError(f"expected a model with the module {name!r} saved in {directory}, got one without it")
        theirs = {key: tuple(value.shape) for key, value in state.items()}
        mine = {key: tuple(value.shape) for key, value in modules[name].state_dict().items()}
        if theirs != mine:
            raise ValueError(
                f"expected the module {name!r} to have the tensors saved in {directory}: {theirs}, got a model with {mine}"
            )


def check_fits(model: nn.Module, file: AdapterFile, directory: Path) -> None:
    """Raise ValueError unless what was read from ``directory`` fits a base model: layers and modules to save, names and shapes."""
    shapes = {name: (base.out_features, base.in_features) for name, base in bases_of(model).items()}
    _check_fits(file, shapes, directory)
    _check_saved(file, dict(model.named_modules()), directory)


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Adapt a base model with the adapter saved in ``directory``; returns the model. Everything is checked before the first change.

    Raises:
        FileNotFoundError, ValueError: the folder is incomplete or damaged, or the adapter is another model's (names and shapes listed).
    """
    directory = Path(directory)
    check_plain(model)
    return install(model, read_adapter(directory), directory)


def install(model: nn.Module, file: AdapterFile, directory: Path) -> nn.Module:
    """Adapt a base model with what was read from ``directory``; returns the model. Everything is checked before the first change.

    Raises:
        ValueError: the adapter is another model's (names and shapes listed).
    """
    check_fits(model, file, directory)
    ranks = [parts["lora_E"].shape[0] for parts in file.modules.values()]
    inject(model, file.config, list(file.modules), list(file.saved), ranks)
    _fill(model, file)
    return model


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
        module.module.load_state_dict(file.saved[name])


def _check_same(file: AdapterFile, model: nn.Module, directory: Path) -> None:
    bank = find_bank(model)
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in zip(bank.names, bank.layers, strict=True)}
    _check_fits(file, shapes, directory)
    if list(file.modules) != bank.names or any(
        parts["lora_E"].shape[0] != layer.r for parts, layer in zip(file.modules.values(), bank.layers, strict=True)
    ):
        raise ValueError(
            f"expected the modules and ranks of the model in {directory}, got others; resume with the same options"
        )
    _check_saved(file, {name: saved.module for name, saved in saved_modules(model).items()}, directory)


def restore_adapter(model: nn.Module, directory: str | Path, controller: Controller | None = None) -> AdapterFile:
    """Put the adapter saved in ``directory`` into a model that has the same adapters already, and the state into ``controller``.

    Everything is checked before the first change. Returns what was read.

    Raises:
        FileNotFoundError, ValueError: the folder is incomplete or damaged, the adapter is another one, or ``controller`` is given and the
            folder holds no state of one.
    """
    directory = Path(directory)
    file = read_adapter(directory)
    _check_same(file, model, directory)
    if controller is not None:
        meta = file.meta.get("controller")
        if meta is None:
            raise ValueError(
                f"expected the state of a controller in {directory}, got an adapter alone: scores and schedule cannot go on from it; "
                "take a folder that was saved whole (transformers: not with save_only_model=True)"
            )
        controller.load_state_dict({"tensors": read_tensors(directory / CONTROLLER_FILE), "meta": meta})
    _fill(model, file)
    return file


def save_checkpoint(
    directory: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    controller: Controller,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write all that an exact resume needs: adapter, optimizer, controller, random number generators, ``extra`` (JSON-able).

    ``checkpoint.json`` is written last and names what belongs together: a folder without it is not complete.
    """
    directory = Path(directory)
    (directory / TRAINER_FILE).unlink(missing_ok=True)
    save_adapter(model, directory, controller)
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    write_tensors(directory / OPTIMIZER_FILE, tensors)
    groups = [
        {k: v for k, v in g.items() if isinstance(v, (int, float, bool, str, list, tuple, type(None)))}
        for g in state["param_groups"]
    ]
    write_json(directory / TRAINER_FILE, {"groups": groups, "scalars": scalars, "extra": extra or {}})
    return directory


def load_checkpoint(
    directory: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, controller: Controller
) -> dict[str, Any]:
    """Continue from :func:`save_checkpoint`, on a model adapted with the same options; returns ``extra``.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is incomplete, damaged, or of another adapter or optimizer.
    """
    directory = Path(directory)
    trainer = read_json(directory / TRAINER_FILE)
    file = read_adapter(directory)
    _check_same(file, model, directory)
    tensors = read_tensors(directory / OPTIMIZER_FILE)
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("rng."):
            continue
        index, _, name = key.partition(".")
        if not index.isdigit() or not name:
            raise ValueError(
                f"expected optimizer states in {directory / OPTIMIZER_FILE}, got the tensor {key!r}; the file is foreign: take a copy"
            )
        state.setdefault(int(index), {})[name] = value
    for index, entries in trainer["scalars"].items():
        state.setdefault(int(index), {}).update(entries)
    groups = trainer["groups"]
    mine = optimizer.state_dict()["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in mine]:
        raise ValueError(
            f"expected an optimizer with the parameter groups saved in {directory}, got other groups; build it the same way"
        )
    merged = [{**own, **saved} for own, saved in zip(mine, groups, strict=True)]
    controller.load_state_dict({"tensors": read_tensors(directory / CONTROLLER_FILE), "meta": file.meta["controller"]})
    _fill(model, file)
    optimizer.load_state_dict({"state": state, "param_groups": merged})
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"rng.cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"], i)
    return trainer["extra"]
