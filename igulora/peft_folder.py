"""Folders that PEFT wrote, read without PEFT and checked: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import read_json, read_tensors

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of every tensor's name

# What changes an adapter's mathematics beyond A, B and a scale: option -> what it is.
_REFUSED = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases of B",
    "use_qalora": "QALoRA's pooled inputs",
    "use_bdlora": "block-diagonal factors",
    "alora_invocation_tokens": "an update for a part of the tokens (aLoRA)",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "updates of parameters that are no layers' weights",
    "arrow_config": "routed adapters",
    "kasa_config": "KaSA's weights",
    "monteclora_config": "sampled weights",
}
# These starts change the base weights too, and PEFT makes the same change again when it loads the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_SUFFIXES = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_A": "A", ".lora_B": "B", ".lora_E": "E", ".ranknum": "ranknum",
}  # fmt: skip
Factors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class PeftConfig:
    """``adapter_config.json``, checked."""

    path: Path
    kind: str
    values: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> PeftConfig:
        path = directory / PEFT_CONFIG
        if not path.is_file():
            raise FileNotFoundError(
                f"expected {PEFT_CONFIG} in {directory}, found none; is this a folder that PEFT wrote?"
            )
        values = read_json(path)
        kind = values.get("peft_type")
        if kind not in ("LORA", "ADALORA"):
            hint = (
                "; load it with peft.PeftModel.from_pretrained, after import igulora.peft" if kind == "IGULORA" else ""
            )
            raise ValueError(f"expected an adapter of peft_type LORA or ADALORA in {directory}, got {kind!r}{hint}")
        for name, what in _REFUSED.items():
            if values.get(name):
                raise ValueError(
                    f"expected plain {kind} in {path}, got {name}={values[name]!r}: {what} cannot be imported"
                )
        if values.get("bias", "none") != "none":
            raise ValueError(
                f"expected bias='none' in {path}, got {values['bias']!r}: trained biases of the base model cannot be imported"
            )
        start = values.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise ValueError(
                f"expected an adapter over unchanged base weights in {path}, got init_lora_weights={start!r}, which changes them; "
                "convert it with the path_initial_model_for_weight_conversion of PEFT's save_pretrained"
            )
        return cls(path, kind, values)

    def number(self, name: str, default: float | None = None, least: float = -math.inf) -> float:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise ValueError(f"expected {name} to be a number in {self.path}, got {value!r}; the file is damaged")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default, 0)
        if value != int(value):
            raise ValueError(f"expected {name} to be a whole number in {self.path}, got {value!r}; the file is damaged")
        return int(value)

    def table(self, name: str) -> dict[str, Any]:
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise ValueError(f"expected {name} to be a table in {self.path}, got {value!r}; the file is damaged")
        return value

    def of_module(self, pattern: str, name: str, default: float) -> float:
        """A module's entry of ``rank_pattern`` or ``alpha_pattern``: the first key that, as an expression, ends its name."""
        for key, value in self.table(pattern).items():
            try:
                found = re.match(rf"(.*\.)?({key})$", name)
            except re.error as error:
                raise ValueError(
                    f"expected expressions as keys of {pattern} in {self.path}, got {key!r}: {error}"
                ) from error
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"expected numbers in {pattern} of {self.path}, got {value!r}; the file is damaged")
            if found:
                return value
        return default


def read_parts(directory: Path, meta: PeftConfig) -> tuple[Factors, Factors]:
    """(factors, saved): name -> {"A" (r, in), "B" (out, r), "E" (r, 1)}, and the states of the modules to save."""
    path = directory / PEFT_WEIGHTS
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise ValueError(
            f"expected {PEFT_WEIGHTS} in {directory}, got adapter_model.bin, a pickle, which can run any program when it is read; where "
            "you trust it, load it in PEFT and save it again: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"expected {PEFT_WEIGHTS} in {directory}, found none; is the folder complete?")
    wanted = meta.values.get("modules_to_save") or []
    if not isinstance(wanted, list) or not all(isinstance(w, str) for w in wanted):
        raise ValueError(f"expected modules_to_save to be a list of names in {meta.path}, got {wanted!r}")
    factors: Factors = {}
    saved: Factors = {}
    for key, value in read_tensors(path).items():
        if not key.startswith(PREFIX):
            raise ValueError(f"expected names that begin with {PREFIX!r} in {path}, got {key!r}; the file is foreign")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"expected finite numbers in {path}, got others in {key!r}; the file is damaged")
        name = key.removeprefix(PREFIX)
        owner = _owner(name, wanted)
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if owner is not None:
            saved.setdefault(owner, {})[name.removeprefix(owner + ".")] = value
        elif suffix is not None:
            factors.setdefault(name.removesuffix(suffix), {})[_SUFFIXES[suffix]] = value
        else:
            raise ValueError(f"expected lora_A and lora_B of linear layers in {path}, got {key!r}: {_unknown(name)}")
    _check_factors(factors, meta, path)
    return factors, saved


def _owner(name: str, wanted: list[str]) -> str | None:
    """The module to save that a tensor belongs to: the outermost whose name ends in one of ``wanted``."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        head = ".".join(parts[:length])
        if any(head == w or head.endswith("." + w) for w in wanted):
            return head
    return None


def _unknown(name: str) -> str:
    if "lora_embedding_" in name:
        return "adapters of embeddings cannot be imported yet"
    if "lora_magnitude" in name:
        return "DoRA cannot be imported"
    if name.endswith("lora_B.bias"):
        return "biases of B cannot be imported"
    return (
        "a base weight, which the base model has already; save the adapter again with save_embedding_layers=False, or, if it was trained, "
        "name its module in modules_to_save"
    )


def _check_factors(factors: Factors, meta: PeftConfig, path: Path) -> None:
    needed = {"A", "B"} | ({"E"} if meta.kind == "ADALORA" else set())
    if not factors:
        raise ValueError(f"expected at least one adapted layer in {path}, got none")
    for name, parts in factors.items():
        if parts.keys() - {"ranknum"} != needed:
            raise ValueError(
                f"expected {', '.join(sorted(needed))} of {name} in {path}, got {', '.join(sorted(parts))}"
            )
        A, B = parts["A"], parts["B"]
        if A.ndim == 4 or B.ndim == 4:
            raise ValueError(
                f"expected linear layers in {path}, got {name}, a convolution, which cannot be imported yet"
            )
        rows = A.shape[0]
        shapes = [tuple(t.shape) for t in parts.values()]
        fit = A.ndim == B.ndim == 2 and B.shape[1] == rows and ("E" not in parts or parts["E"].numel() == rows)
        if not fit or not all(t.is_floating_point() for t in parts.values()):
            raise ValueError(f"expected factors of one rank for {name} in {path}, got {shapes}; the file is damaged")
