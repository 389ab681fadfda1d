"""Export to a plain LoRA adapter that an unmodified PEFT (and servers that read its format) loads."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import saved_modules
from .adapter_file import read_adapter
from .bank import base_model as unwrapped
from .bank import find_bank
from .bases import Conv1DBase, Conv2dBase, EmbeddingBase, describe
from .experts import ExpertBase
from .files import put_json, put_tensors
from .folders import save_whole
from .kernels.windows import widened
from .kinds import Conv2dAdapter
from .peft_folder import PEFT_CONFIG, PEFT_WEIGHTS, PREFIX
from .saved_adapter import filters_of, kinds_of
from .unwrap import unwrap


def lora_factors(P: Tensor, E: Tensor, Q: Tensor, mask: Tensor, scale: float, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """(A (live, in), B (out, live)) with ``B A = s sum_i m_i lambda_i p_i q_i^T``; the root of |s lambda| goes to each side.

    A block-diagonal adapter becomes one of the rank of all its blocks together, zero outside their windows: n times the parameters.
    Splitting the root keeps both factors of one size, so that neither loses bits when a server stores them in 16 bits.
    """
    kept = torch.nonzero((mask != 0) & (E != 0)).flatten()
    coef = (scale * mask * E)[kept]
    root = coef.abs().sqrt().unsqueeze(1)
    P, Q = widened(P, blocks), widened(Q, blocks)
    return root * Q[kept], (root * coef.sign().unsqueeze(1) * P[kept]).t().contiguous()


def export_peft(
    source: nn.Module | str | Path,
    directory: str | Path,
    base_model: str | None = None,
    *,
    uniform_rank: bool = False,
) -> Path:
    """Write a plain LoRA adapter in PEFT's format (``adapter_config.json``, ``adapter_model.safetensors``); returns the folder.

    lambda and s are folded into A and B, so that PEFT's scaling ``lora_alpha / r`` is 1 for every module: ``rank_pattern`` and
    ``alpha_pattern`` carry the rank of each; modules of rank 0 are left out. Experts of 3-D parameters, for which PEFT knows one rank,
    are padded to the largest among them.

    PEFT's LoRA leaves a convolution's dilation and padding mode out: adapters of such layers are right once merged there
    (``merge_and_unload``), and a model's export warns of them.

    Args:
        source: an adapted model, or an adapter folder of :func:`igulora.save_adapter`.
        directory: folder to write into; made when missing.
        base_model: name or path of the base model for ``base_model_name_or_path``; a model's own ``config._name_or_path`` by default.
        uniform_rank: for servers that read ``r`` and ``lora_alpha`` only: every module is padded with zeros to the largest rank, so that
            there are no patterns, and ``target_modules`` is a list of last names ("q_proj") wherever such a list says the same.

    Raises:
        ValueError: nothing is left to export (every module has rank 0).
    """
    directory = Path(directory)
    if isinstance(source, nn.Module):
        source = unwrap(source)
        content = _from_model(source)
        _warn_of_convolutions(source)
        base_model = base_model or getattr(getattr(source, "config", None), "_name_or_path", None)
        task_type = _task_type(unwrapped(source))
    else:
        content = _from_folder(source)
        task_type = None
    experts = _take_experts(content)
    live = {name: (A, B) for name, (A, B) in content.factors.items() if A.shape[0]}
    if not live and not experts:
        raise ValueError(
            "expected at least one module with a live, non-zero triplet to export, got none; train the adapter first"
        )
    largest = max(A.shape[0] for A, _ in (*live.values(), *(pair for pairs in experts.values() for pair in pairs)))
    targets: list[str] | str
    if uniform_rank:
        factors, targets = _uniform(content, largest)
    else:
        factors = live
        targets = _peft_targets(sorted(live), (content.factors.keys() | content.shapes.keys()) - live.keys())
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():
        tensors |= _entries(name, A, B, content)
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count, default=0)
    if experts:  # parameters have the rank without a pattern: PEFT warns of patterns that name no module
        common = max(A.shape[0] for pairs in experts.values() for A, _ in pairs)
    if uniform_rank:
        common = largest
    for name, pairs in experts.items():
        tensors |= _expert_entries(name, pairs, common, nested=_comes_first(name, experts))
    for name, state in content.saved.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in state.items()}
    config = _peft_config(common, ranks, targets, content, task_type, base_model)
    if experts:  # PEFT refuses dropout on parameters
        config |= {"target_parameters": sorted(experts), "lora_dropout": 0.0}
    with save_whole(directory) as folder:
        put_tensors(folder / PEFT_WEIGHTS, tensors)
        put_json(folder / PEFT_CONFIG, config)
    return directory


@dataclass
class _Content:
    """What an adapter holds, and what else is known of its model.

    Attributes:
        factors: name -> A and B of every adapted module, of rank 0 where nothing lives. kinds: name -> kind of its base.
        filters: name -> in channels, height and width of a convolution's filters.
        shapes: name -> (out, in) of the model's other linear layers. names: all other modules of the model.
        saved: name -> state of a module to save.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    kinds: dict[str, str]
    filters: dict[str, list[int]]
    saved: dict[str, dict[str, Tensor]]
    dropout: float
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)


def _from_model(model: nn.Module) -> _Content:
    bank = find_bank(model)
    content = _Content({}, {}, filters_of(model), {}, bank.layers[0].dropout if bank.layers else 0.0)
    for name, layer in zip(bank.names, bank.layers, strict=True):
        P, E, Q, mask = (t.detach().float().cpu() for t in (layer.lora_P, layer.lora_E, layer.lora_Q, layer.mask))
        content.factors[name] = lora_factors(P, E, Q, mask, layer.scale, layer.blocks)
    content.kinds = kinds_of(model)
    content.saved = {name: module.trained.state_dict() for name, module in saved_modules(model).items()}
    whole = saved_modules(model)
    closed = content.factors.keys() | whole.keys()
    for name, module in unwrapped(model).named_modules():
        if not name or name in content.factors or _is_inside(name, closed):
            continue
        content.names.add(name)
        base = None if name in whole else describe(module)
        if base is not None and base.linear:
            content.shapes[name] = (base.out_features, base.in_features)
    for name, saved in whole.items():
        content.names |= {f"{name}.{n}" for n, _ in saved.trained.named_modules() if n}
    return content


def _warn_of_convolutions(model: nn.Module) -> None:
    bank = find_bank(model)
    other = [
        name
        for name, layer in zip(bank.names, bank.layers, strict=True)
        if isinstance(layer, Conv2dAdapter) and (layer.padding_mode != "zeros" or set(layer.dilation) != {1})
    ]
    if other:
        warnings.warn(
            f"PEFT's LoRA runs convolutions without their dilation and padding mode: what is exported of {', '.join(other)} is right only "
            "once merged (model.merge_and_unload())",
            stacklevel=3,
        )


def _is_inside(name: str, outer: set[str]) -> bool:
    while name := name.rpartition(".")[0]:
        if name in outer:
            return True
    return False


def _from_folder(directory: str | Path) -> _Content:
    file = read_adapter(directory)
    kinds, filters = file.meta.get("kinds", {}), file.meta.get("filters", {})
    content = _Content({}, dict(kinds), dict(filters), file.saved, file.config.dropout)
    for name, parts in file.modules.items():
        P, E, Q, mask = (parts[k].float() for k in ("lora_P", "lora_E", "lora_Q", "mask"))
        blocks = file.config.blocks_of(name)
        content.factors[name] = lora_factors(P, E, Q, mask, float(file.meta["scale"][name]), blocks)
    return content


def _entries(name: str, A: Tensor, B: Tensor, content: _Content) -> dict[str, Tensor]:
    """The tensors of one module under PEFT's names."""
    kind = content.kinds.get(name)
    if kind == EmbeddingBase.kind:
        return {f"{PREFIX}{name}.lora_embedding_A": A, f"{PREFIX}{name}.lora_embedding_B": B}
    if kind == Conv2dBase.kind:
        A, B = A.unflatten(1, content.filters[name]), B[:, :, None, None]
    return {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}


def _take_experts(content: _Content) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Parameter -> A and B of each expert, taken out of ``content``; parameters of which nothing lives are left out."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name in [n for n in content.factors if content.kinds.get(n) == ExpertBase.kind]:
        found.setdefault(name.rpartition(".")[0], []).append(content.factors.pop(name))
    return {name: pairs for name, pairs in found.items() if any(A.shape[0] for A, _ in pairs)}


def _comes_first(name: str, experts: dict[str, Any]) -> bool:
    """Whether PEFT wraps another parameter of the same module around this one: the way out of an expert comes after the way in."""
    owner, _, parameter = name.rpartition(".")
    return parameter != "down_proj" and f"{owner}.down_proj" in experts


def _expert_entries(name: str, pairs: list[tuple[Tensor, Tensor]], rank: int, nested: bool) -> dict[str, Tensor]:
    """PEFT's tensors of a 3-D parameter: A (experts rank, in), and B (out, rank experts), in which the expert runs fastest."""
    place = name.rpartition(".")[0] + (".base_layer" if nested else "")
    padded = [_padded(A, B, rank) for A, B in pairs]
    A, B = torch.cat([A for A, _ in padded]), torch.stack([B for _, B in padded], dim=2)
    return {f"{PREFIX}{place}.lora_A.weight": A, f"{PREFIX}{place}.lora_B.weight": B.flatten(1)}


def _uniform(content: _Content, rank: int) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str] | str]:
    """All factors at one rank, and the list of target names that goes with them.

    A list of last names also names modules that have no triplets (pruned to rank 0, or never adapted): these get zeros.
    """
    live = {name for name, (A, _) in content.factors.items() if A.shape[0]}
    endings = {name.rpartition(".")[2] for name in live}
    factors = {name: _padded(A, B, rank) for name, (A, B) in content.factors.items() if name in live}
    named = {n for n in content.factors.keys() | content.names if n.rpartition(".")[2] in endings} - live
    if named - content.factors.keys() - content.shapes.keys() or any(ending.isdigit() for ending in endings):
        return factors, _peft_targets(sorted(live), (content.factors.keys() | content.names) - live)
    for name in named:
        if name in content.factors:
            factors[name] = _padded(*content.factors[name], rank)
        else:
            rows, columns = content.shapes[name]
            factors[name] = torch.zeros(rank, columns), torch.zeros(rows, rank)
    return factors, sorted(endings)


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    more = rank - A.shape[0]
    return nn.functional.pad(A, (0, 0, 0, more)), nn.functional.pad(B, (0, more))


def _peft_targets(names: list[str], others: set[str]) -> list[str] | str:
    """The names; as one expression where PEFT, which matches list entries against the ends of names, would adapt ``others`` too."""
    if any(other.endswith("." + name) for other in others for name in names):
        return "|".join(_escaped(name) for name in names)
    return names


def _peft_config(
    common: int,
    ranks: dict[str, int],
    targets: list[str] | str,
    content: _Content,
    task_type: str | None,
    base_model: str | None,
) -> dict[str, Any]:
    # Anchored: PEFT reads pattern keys as regular expressions on the end of a name, and layers.1 must not match layers.11.
    pattern = {f"^{_escaped(name)}": rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": content.dropout,
        "bias": "none",
        "fan_in_fan_out": any(content.kinds.get(name) == Conv1DBase.kind for name in ranks),
        "init_lora_weights": True,
        "target_modules": targets,
        "modules_to_save": sorted(content.saved) or None,
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
