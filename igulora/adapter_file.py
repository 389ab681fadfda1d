"""The adapter folder: what is in it, and how it is read without a model.

``igulora_config.json`` describes a save: options, modules and their ranks, budget history, the controller's numbers, size and SHA-256 of
each other file, and a checksum of itself. ``adapter_model.safetensors`` holds per module P, E, Q, mask and live mask, and the modules to
save; ``controller_state.safetensors`` the controller's tensors. All files of one save carry its stamp.

Reading goes from cheap to dear: the description, the headers of the tensor files against it, their sizes, then checksums, and only then
tensors. Names from a file are compared with names; none becomes a path. Format 1 had no checksums; all else is checked there too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import IGUConfig
from .files import (
    Header,
    check_digest,
    check_seal,
    check_size,
    read_header,
    read_json,
    read_tensor,
    read_tensors,
    shown,
)
from .folders import place, settled
from .packing import unpack

ADAPTER_FILE, CONFIG_FILE, CONTROLLER_FILE = (
    "adapter_model.safetensors",
    "igulora_config.json",
    "controller_state.safetensors",
)
# What a checkpoint adds.
OPTIMIZER_FILE, TRAINER_FILE = "optimizer.safetensors", "checkpoint.json"
FORMAT = 2
PARTS = ("lora_P", "lora_E", "lora_Q", "mask", "live")
_MATRICES = ("lora_P", "lora_Q")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Options that sizes are computed from later: from a file they may not ask for more than any run does.
_LIMITS = {"nodes": 4096, "window": 2**24, "ig_every": 2**24}
_LIMITS |= dict.fromkeys(("r", "target_rank", "min_rank", "max_rank", "moves", "blocks"), 2**47)
_LIMITS |= dict.fromkeys(("total_steps", "t_init", "t_final", "delta_t"), 2**47)


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


@dataclass(frozen=True)
class Description:
    """What an adapter folder says it holds, its parts checked against each other; no tensor has been read.

    Attributes:
        shapes: name -> (out, in). saved: name -> key -> (dtype, shape) of a module to save. controller: header, or None without a state.
    """

    directory: Path
    meta: dict[str, Any]
    config: IGUConfig
    shapes: dict[str, tuple[int, int]]
    saved: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]
    controller: Header | None = field(repr=False)

    @property
    def modules(self) -> dict[str, int]:
        """Stored triplets of each module."""
        return self.meta["modules"]

    def digest(self, name: str) -> None:
        """Compare the file ``name`` with its recorded checksum; format 1 recorded none."""
        if "files" in self.meta:
            check_digest(place(self.directory, name), self.meta["files"].get(name))


def read_adapter(directory: str | Path) -> AdapterFile:
    """Read and check an adapter folder without a model.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged, foreign, or its tensors do not fit its own description.
    """

    def read() -> AdapterFile:
        description = describe_folder(directory)
        modules, saved = read_modules(description)
        return AdapterFile(description.config, modules, saved, description.meta, _score_terms(description))

    return settled(Path(directory), (CONFIG_FILE, ADAPTER_FILE, CONTROLLER_FILE), read)


def describe_folder(directory: str | Path) -> Description:
    """The checked description of an adapter folder; raises as :func:`read_adapter` does."""
    directory = Path(directory)
    path = directory / CONFIG_FILE
    if not place(directory, CONFIG_FILE).is_file() and (directory / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"expected {CONFIG_FILE} in {directory}, got an adapter that PEFT saved: of its igulora method load it with "
            "peft.PeftModel.from_pretrained (after import igulora.peft), of LoRA or AdaLoRA with igulora.import_peft"
        )
    meta = read_json(place(directory, CONFIG_FILE))
    if meta.get("library") != "igulora" or not isinstance(meta.get("modules"), dict):
        raise ValueError(
            f"expected an igulora adapter in {directory}, got a {CONFIG_FILE} without its marks; was it made by igulora?"
        )
    if meta.get("format") not in (1, FORMAT) or isinstance(meta["format"], bool):
        raise ValueError(
            f"expected adapter format {FORMAT} (or 1) in {directory}, got {meta.get('format')!r:.100}; use a matching igulora version"
        )
    _check_fields(meta, path)
    config = _config(meta["config"], path)
    if meta["format"] > 1 or "digest" in meta:
        if not isinstance(meta.get("files"), dict):
            raise ValueError(f"expected the checksums of the files in {path}, got none; the file is damaged")
        check_size(place(directory, ADAPTER_FILE), meta["files"].get(ADAPTER_FILE))
    header = read_header(place(directory, ADAPTER_FILE))
    shapes, saved = _check_header(header, meta, directory)
    controller = _controller_header(directory, meta)
    for found in (header, controller):
        if found is not None and found.metadata.get("stamp") != meta.get("stamp"):
            raise ValueError(
                f"expected {found.path.name} and {CONFIG_FILE} of one save in {directory}, got files of two; files were mixed: take an "
                "earlier copy"
            )
    if "files" in meta:
        check_seal(path, meta)
    meta["controller"] = unpack(meta.get("controller"), f"the controller's part of {path}", {})
    return Description(directory, meta, config, shapes, saved, controller)


def read_modules(description: Description) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """The tensors of an adapter: ``modules`` and ``saved`` of :class:`AdapterFile`.

    Raises:
        ValueError: they are damaged: not what was written, not finite, or a mask of other values than 0 and 1.
    """
    path = place(description.directory, ADAPTER_FILE)
    description.digest(ADAPTER_FILE)
    tensors = read_tensors(path)
    modules = {name: {part: tensors.pop(f"{name}.{part}") for part in PARTS} for name in description.modules}
    for name, parts in modules.items():
        for part, tensor in parts.items():
            if part in ("mask", "live"):
                if not bool(((tensor == 0) | (tensor == 1)).all()):
                    raise ValueError(
                        f"expected 0 and 1 in {name}.{part} in {path}, got other values; the file is damaged"
                    )
            elif not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"expected finite values in {name}.{part} in {path}, got NaN or infinity; the file is damaged, or the run had diverged"
                )
        live = int(parts["live"].sum())
        if live != description.meta["ranks"][name]:
            raise ValueError(
                f"expected {description.meta['ranks'][name]} live triplets of {name} in {path}, got {live}; the folder is damaged"
            )
    saved = {name: {key: tensors[f"{name}.saved.{key}"] for key in keys} for name, keys in description.saved.items()}
    return modules, saved


def read_controller(description: Description) -> dict[str, Tensor]:
    """The tensors of the controller's state.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    path = place(description.directory, CONTROLLER_FILE)
    if description.meta["controller"] is None:
        raise ValueError(
            f"expected the state of a controller in {description.directory}, got an adapter alone: scores and schedule cannot go on from "
            "it; take a folder that was saved whole (transformers: not with save_only_model=True)"
        )
    if description.controller is None:
        read_header(path)  # says that it is not there
    description.digest(CONTROLLER_FILE)
    return read_tensors(path)


def _score_terms(description: Description) -> dict[str, Tensor]:
    header, ranks = description.controller, description.modules
    if header is None:
        return {}
    found, shape = header.tensors.get("terms"), (3, sum(ranks.values()))
    if found is None or found[0] not in _FLOATS or found[1] != shape:
        raise ValueError(f"expected score terms of shape {shape} in {header.path}, got {found}; the folder is damaged")
    description.digest(CONTROLLER_FILE)
    parts = read_tensor(header.path, "terms").split(list(ranks.values()), dim=1)
    return dict(zip(ranks, parts, strict=True))


# -- the description --------------------------------------------------------------------------------------------------


def is_count(value: object) -> bool:
    """Whether ``value`` is an int of a size that something in memory may have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _check_fields(meta: dict[str, Any], path: Path) -> None:
    names = meta["modules"].keys()
    for key, kind in {"config": dict, "scale": dict, "ranks": dict, "saved": list, "history": list}.items():
        value = meta.get(key)
        if not isinstance(value, kind) or (key in ("scale", "ranks") and value.keys() != names):
            raise ValueError(f"expected {key!r} in {path} to be complete, got {value!r:.200}; save it again")
    for name, rank in meta["modules"].items():
        live, scale = meta["ranks"][name], meta["scale"][name]
        if not is_count(rank) or not is_count(live) or live > rank:
            raise ValueError(
                f"expected a rank and at most as many live triplets for {name!r} in {path}, got {rank!r:.100} and {live!r:.100}; the file "
                "is damaged"
            )
        if not _is_number(scale):
            raise ValueError(
                f"expected a finite number as the scale of {name!r} in {path}, got {scale!r:.100}; the file is damaged"
            )
    if not all(isinstance(name, str) for name in meta["saved"]) or len(set(meta["saved"])) != len(meta["saved"]):
        raise ValueError(
            f"expected names of modules under 'saved' in {path}, got {meta['saved']!r:.200}; the file is damaged"
        )
    for key in ("kinds", "filters"):
        if not isinstance(meta.get(key, {}), dict):
            raise ValueError(f"expected {key!r} by name in {path}, got {meta[key]!r:.200}; the file is damaged")
    if not isinstance(meta.get("controller"), (dict, type(None))):
        raise ValueError(
            f"expected the controller's numbers in {path}, got {meta['controller']!r:.100}; the file is damaged"
        )
    for event in meta["history"]:
        if not is_event(event, names):
            raise ValueError(
                f"expected step, budget and ranks in the history in {path}, got {event!r:.200}; the file is damaged"
            )


def is_event(event: Any, names: Any) -> bool:
    """Whether ``event`` is an entry of :attr:`igulora.Controller.history` for the modules ``names``."""
    importance = event.get("importance") if isinstance(event, dict) else None
    if importance is not None:
        named = isinstance(importance, dict) and importance.keys() == names
        if not named or not all(type(value) in (int, float) and math.isfinite(value) for value in importance.values()):
            return False
    return (
        isinstance(event, dict)
        and is_count(event.get("step"))
        and is_count(event.get("budget"))
        and isinstance(event.get("ranks"), dict)
        and event["ranks"].keys() == names
        and all(is_count(rank) for rank in event["ranks"].values())
    )


def _config(values: dict[str, Any], path: Path) -> IGUConfig:
    for name, most in _LIMITS.items():
        value = values.get(name)
        if value is not None and (not is_count(value) or value > most):
            raise ValueError(f"expected {name} from 0 to {most} in {path}, got {value!r:.100}; the file is damaged")
    seed = values.get("seed", 0)
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"expected a seed of 64 bits in {path}, got {seed!r:.100}; the file is damaged")
    try:
        return IGUConfig.from_dict(values)
    except (TypeError, AttributeError, OverflowError, ValueError) as error:
        raise ValueError(
            f"expected the options of a run in {path}: {shown(error)}; the file is damaged or foreign"
        ) from error


def _check_header(header: Header, meta: dict[str, Any], directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of the modules and tensors of the modules to save; every tensor of the file must be one of these."""
    left = dict(header.tensors)
    shapes = {}
    for name, rank in meta["modules"].items():
        for part in PARTS:
            found = left.pop(f"{name}.{part}", None)
            fits = (
                found is not None
                and found[0] in _FLOATS
                and len(found[1]) == (2 if part in _MATRICES else 1)
                and found[1][0] == rank
            )
            if not fits:
                got = "nothing" if found is None else f"{found[1]} {found[0]}"
                raise ValueError(
                    f"expected {name}.{part} with {rank} rows in {directory / ADAPTER_FILE}, got {got}; the folder is damaged"
                )
        shapes[name] = tuple(header.tensors[f"{name}.{part}"][1][1] for part in _MATRICES)
    saved: dict[str, dict[str, Any]] = {name: {} for name in meta["saved"]}
    for key, value in left.items():
        owner = next((n for n in saved if key.startswith(f"{n}.saved.")), None)
        if owner is None:
            raise ValueError(
                f"expected only tensors of the adapter in {directory / ADAPTER_FILE}, got {key!r:.200}; the file is foreign"
            )
        saved[owner][key[len(owner) + len(".saved.") :]] = value
    return shapes, saved


def _controller_header(directory: Path, meta: dict[str, Any]) -> Header | None:
    path = place(directory, CONTROLLER_FILE)
    if meta.get("controller") is None or not path.is_file():
        return None
    if "files" in meta:
        check_size(path, meta["files"].get(CONTROLLER_FILE))
    return read_header(path)
