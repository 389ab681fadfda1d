"""Export to a plain LoRA adapter that an unmodified PEFT (and servers that read its format) loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import saved_modules
from .adapter_file import read_adapter
from .bank import base_model as unwrapped
from .bank import find_bank
from .files import put_json, put_tensors
from .folders import save_whole

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def lora_factors(P: Tensor, E: Tensor, Q: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(A (live, in), B (out, live)) with ``B A = s sum_i m_i lambda_i p_i q_i^T``; the root of |s lambda| goes to each side.

    Splitting the root keeps both factors of one size, so that neither loses bits when a server stores them in 16 bits.
    """
    kept = torch.nonzero((mask != 0) & (E != 0)).flatten()
    coef = (scale * mask * E)[kept]
    root = coef.abs().sqrt().unsqueeze(1)
    return root * Q[kept], (root * coef.sign().unsqueeze(1) * P[kept]).t().contiguous()


def export_peft(source: nn.Module | str | Path, directory: str | Path, base_model: str | None = None) -> Path:
    """Write a plain LoRA adapter in PEFT's format (``adapter_config.json``, ``adapter_model.safetensors``); returns the folder.

    lambda and s are folded into A and B, so that PEFT's scaling ``lora_alpha / r`` is 1 for every module: ``rank_pattern`` and
    ``alpha_pattern`` carry the rank of each; modules of rank 0 are left out.

    Args:
        source: an adapted model, or an adapter folder of :func:`igulora.save_adapter`.
        directory: folder to write into; made when missing.
        base_model: name or path of the base model for ``base_model_name_or_path``; a model's own ``config._name_or_path`` by default.

    Raises:
        ValueError: nothing is left to export (every module has rank 0).
    """
    directory = Path(directory)
    if isinstance(source, nn.Module):
        factors, saved, dropout = _from_model(source)
        base_model = base_model or getattr(getattr(source, "config", None), "_name_or_path", None)
        task_type = _task_type(unwrapped(source))
    else:
        factors, saved, dropout = _from_folder(source)
        task_type = None
    others = {name for name, (A, _) in factors.items() if not A.shape[0]}
    if isinstance(source, nn.Module):
        others |= {name for name, m in unwrapped(source).named_modules() if isinstance(m, nn.Linear)}
    factors = {name: (A, B) for name, (A, B) in factors.items() if A.shape[0]}
    if not factors:
        raise ValueError(
            "expected at least one module with a live, non-zero triplet to export, got none; train the adapter first"
        )
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    for name, state in saved.items():
        tensors |= {f"base_model.model.{name}.{key}": value for key, value in state.items()}
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    config = _peft_config(ranks, others, sorted(saved), dropout, task_type, base_model)
    with save_whole(directory) as folder:
        put_tensors(folder / PEFT_WEIGHTS, tensors)
        put_json(folder / PEFT_CONFIG, config)
    return directory


_Content = tuple[dict[str, tuple[Tensor, Tensor]], dict[str, dict[str, Tensor]], float]


def _from_model(model: nn.Module) -> _Content:
    bank = find_bank(model)
    factors = {}
    for name, layer in zip(bank.names, bank.layers, strict=True):
        P, E, Q, mask = (t.detach().float().cpu() for t in (layer.lora_P, layer.lora_E, layer.lora_Q, layer.mask))
        factors[name] = lora_factors(P, E, Q, mask, layer.scale)
    saved = {name: module.trained.state_dict() for name, module in saved_modules(model).items()}
    return factors, saved, bank.layers[0].dropout if bank.layers else 0.0


def _from_folder(directory: str | Path) -> _Content:
    file = read_adapter(directory)
    factors = {}
    for name, parts in file.modules.items():
        P, E, Q, mask = (parts[k].float() for k in ("lora_P", "lora_E", "lora_Q", "mask"))
        factors[name] = lora_factors(P, E, Q, mask, float(file.meta["scale"][name]))
    return factors, file.saved, file.config.dropout


def _peft_targets(names: list[str], others: set[str]) -> list[str] | str:
    """The names; as one expression where PEFT, which matches list entries against the ends of names, would adapt ``others`` too."""
    if any(other.endswith("." + name) for other in others for name in names):
        return "|".join(_escaped(name) for name in names)
    return names


def _peft_config(
    ranks: dict[str, int],
    others: set[str],
    saved: list[str],
    dropout: float,
    task_type: str | None,
    base_model: str | None,
) -> dict[str, Any]:
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    # Anchored: PEFT reads pattern keys as regular expressions on the end of a name, and layers.1 must not match layers.11.
    pattern = {f"^{_escaped(name)}": rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _peft_targets(sorted(ranks), others - ranks.keys()),
        "modules_to_save": saved or None,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
    }


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _task_type(model: nn.Module) -> str | None:
    for mark, task in (("ForCausalLM", "CAUSAL_LM"), ("ForSequenceClassification", "SEQ_CLS")):
        if mark in type(model).__name__:
            return task
    return None
