"""import_peft: go on with an adapter that PEFT trained. LoRA (by singular value decomposition) and AdaLoRA (as it is)."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapt import check_plain
from .adapter_file import AdapterFile
from .bases import Conv1DBase
from .config import IGUConfig
from .fit import check_fits
from .peft_folder import PREFIX, Factors, PeftConfig, read_parts
from .saved_adapter import install
from .targets import find_targets

_FIRST_DUE = 4  # steps from which on three score updates precede an allocation


def import_peft(
    model: nn.Module, directory: str | Path, config: IGUConfig | None = None, *, step: int | None = None
) -> nn.Module:
    """Adapt a base model with the adapter in a folder that PEFT wrote; returns the model. Its outputs are PEFT's.

    LoRA: each ``B A`` is decomposed, so that rows of P and Q are orthonormal and lambda holds singular values; where ``config`` asks for
    more triplets than the adapter has, the others are orthogonal to them and start at lambda = 0. AdaLoRA: its triplets as they are, the
    pruned ones left out, so that ranks and with them the budget's start are those of the folder; scores start anew. Modules of
    ``modules_to_save`` come along.

    Args:
        model: the base model that the adapter was trained on.
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        config: how to go on. Its targets become the folder's layers, ``modules_to_save`` and, for AdaLoRA, ranks and ``lora_alpha`` the
            folder's. By default ranks stay as they are (method "lora", lambda trained).
        step: for AdaLoRA, in place of a config: optimizer steps already taken; go on along the folder's own schedule. Its cubic budget,
            started anew from the ranks of a step between, is the same curve.

    Raises:
        FileNotFoundError, ValueError: the folder is incomplete or damaged, holds something else than plain LoRA or AdaLoRA (says what), or
            is another model's. Everything is checked before the first change.
        TypeError: ``config`` is not an IGUConfig.
    """
    directory = Path(directory)
    check_plain(model)
    file = read_peft(directory, config, step=step)
    check_fits(model, file, directory)
    by_name = dataclasses.replace(file.config, target_modules="|".join(re.escape(name) for name in file.modules))
    modules = {name: file.modules[name] for name in find_targets(model, by_name, list(file.saved))}  # in model order
    return install(model, dataclasses.replace(file, modules=modules))


def read_peft(directory: str | Path, config: IGUConfig | None = None, *, step: int | None = None) -> AdapterFile:
    """What :func:`import_peft` puts into a model, without one; arguments and errors are the same."""
    directory = Path(directory)
    if config is not None and not isinstance(config, IGUConfig):
        raise TypeError(f"expected an IGUConfig, got {type(config).__name__}; build one with igulora.IGUConfig(...)")
    if config is not None and step is not None:
        raise ValueError(
            "expected either a config to go on with or the step of the folder's own schedule, got both; leave one out"
        )
    if config is not None and config.bidirectional:
        raise ValueError(
            f"expected a method that starts from the ranks in the folder, got method={config.method!r}, which keeps rows in reserve; use "
            '"igu", "adalora" or "lora"'
        )
    if config is not None and {config.blocks, *config.block_pattern.values()} != {1}:
        raise ValueError(
            "expected blocks=1 to go on with an adapter of PEFT, whose triplets span whole matrices, got blocks"
        )
    if config is not None and config.init == "zero":
        config = dataclasses.replace(config, init="orthonormal")  # what the rows are: it says how fast lambda may learn
    meta = PeftConfig.read(directory)
    if step is not None and meta.kind != "ADALORA":
        raise ValueError(
            "expected step with an AdaLoRA adapter, got it with a LoRA, which has no schedule; leave it out"
        )
    factors, saved = read_parts(directory, meta)
    if meta.kind == "ADALORA":
        return _from_adalora(meta, factors, saved, config, step)
    return _from_lora(meta, factors, saved, config)


def _from_lora(meta: PeftConfig, factors: Factors, saved: Factors, config: IGUConfig | None) -> AdapterFile:
    ranks = {name: parts["A"].shape[0] for name, parts in factors.items()}
    r, alpha = meta.number("r", 8), meta.number("lora_alpha", 8)
    for name, rank in ranks.items():
        if meta.of_module("rank_pattern", name, r) != rank or rank == 0:
            raise ValueError(
                f"expected rank {meta.of_module('rank_pattern', name, r)} for {name} by {meta.path}, got tensors of rank {rank}; files of "
                "two adapters were mixed"
            )
    if config is None:
        config, stored = _fixed(max(ranks.values()), meta), ranks
    else:
        stored = {name: config.rank_of(name) for name in ranks}
        for name, rank in ranks.items():
            if stored[name] < rank:
                raise ValueError(
                    f"expected r >= {rank}, the adapter's rank at {name}, got {stored[name]}; raise r "
                    "(target_rank says what it is pruned to)"
                )
    generator = torch.Generator().manual_seed(config.seed)
    modules = {}
    for name, parts in factors.items():
        scaling = meta.of_module("alpha_pattern", name, alpha)
        scaling /= math.sqrt(ranks[name]) if meta.values.get("use_rslora") else ranks[name]
        P, E, Q = _decomposed(
            parts["A"].double(), parts["B"].double() * (scaling / config.scale), stored[name], generator
        )
        modules[name] = _module(P, E, Q, config)
    return _file(meta, config, modules, saved, dict.fromkeys(modules, config.scale))


def _decomposed(A: Tensor, B: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """P (rank, out), E (rank,), Q (rank, in) with orthonormal rows and ``P^T diag(E) Q = B A``, E descending and zero beyond A's rank.

    QR of both factors leaves an r x r matrix to decompose: exact, at the cost of the factors' size.
    """
    left, left_core = torch.linalg.qr(B)  # (out, k), (k, r)
    right, right_core = torch.linalg.qr(A.t())  # (in, k'), (k', r)
    U, S, Vt = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    P, Q = (left @ U).t()[:rank], (right @ Vt.t()).t()[:rank]
    E = torch.zeros(rank, dtype=A.dtype)
    E[: S.numel()] = S[:rank]
    return _completed(P, rank, generator), E, _completed(Q, rank, generator)


def _completed(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` rows: the given orthonormal ones, then ones orthogonal to them; where no direction is left, random unit rows."""
    more = torch.randn((count - rows.shape[0], rows.shape[1]), generator=generator, dtype=rows.dtype)
    free = min(more.shape[0], rows.shape[1] - rows.shape[0])
    more /= more.norm(dim=1, keepdim=True)
    for _ in range(2):  # once more: what rounding left of the given directions
        more[:free] -= (more[:free] @ rows.t()) @ rows
        more[:free] = torch.linalg.qr(more[:free].t())[0].t()
    return torch.cat((rows, more))


def _from_adalora(
    meta: PeftConfig, factors: Factors, saved: Factors, config: IGUConfig | None, step: int | None
) -> AdapterFile:
    init_r, alpha = meta.count("init_r", 12), meta.number("lora_alpha", 8)
    live = _live_rows(meta, factors)
    ranks = {name: int(rows.sum()) for name, rows in live.items()}
    scale = {}
    for name, parts in factors.items():
        # PEFT divides by the rank of the start, a float32 number, and by a little more; an alpha of 0 stands for the rank there is.
        ranknum = parts.get("ranknum", torch.tensor([float(init_r)])).float() + 1e-5
        scale[name] = (alpha if alpha > 0 else float(parts["A"].shape[0])) / float(ranknum.flatten()[0])
    if step is not None:
        config = _scheduled(max(ranks.values()), meta, step)
    elif config is None:
        config = _fixed(max(ranks.values()), meta)
    common, most = next(iter(scale.values())), max(ranks.values())
    if config.adaptive:
        config = dataclasses.replace(config, r=max(most, config.target_rank or 0))
    else:
        config = dataclasses.replace(config, r=most, target_rank=most)
    config = dataclasses.replace(config, lora_alpha=common * config.initial_rank or None)
    modules = {}
    for name, parts in factors.items():
        rows = live[name]
        modules[name] = _module(parts["B"].t()[rows], parts["E"].flatten()[rows], parts["A"][rows], config)
    return _file(meta, config, modules, saved, scale)


def _live_rows(meta: PeftConfig, factors: Factors) -> dict[str, Tensor]:
    """name -> (rows,) bool: which rows of the file the last allocation left.

    ``rank_pattern`` says it, of the rows there were before (PEFT writes the live ones only). Without one the zero lambdas were pruned,
    unless all are zero: the start of a run.
    """
    pattern = {
        re.sub(r"\.lora_E(\..*)?$", "", k.removeprefix(PREFIX)): v for k, v in meta.table("rank_pattern").items()
    }
    zeros = {name: parts["E"].flatten() == 0 for name, parts in factors.items()}
    untrained = all(bool(rows.all()) for rows in zeros.values())
    live = {}
    for name, parts in factors.items():
        rows = parts["A"].shape[0]
        if not pattern:
            live[name] = torch.ones(rows, dtype=torch.bool) if untrained else ~zeros[name]
            continue
        flags = pattern.get(name)
        if not isinstance(flags, list) or rows not in (len(flags), sum(map(bool, flags))):
            got = "none" if flags is None else f"{flags!r} for {rows} rows"
            raise ValueError(f"expected rank_pattern in {meta.path} to say which rows of {name} live, got {got}")
        live[name] = torch.tensor(flags, dtype=torch.bool) if rows == len(flags) else torch.ones(rows, dtype=torch.bool)
    return live


def _scheduled(rank: int, meta: PeftConfig, step: int) -> IGUConfig:
    """The rest of the folder's own schedule after ``step`` steps; fixed ranks where the last allocation is over."""
    total, t_final = meta.count("total_step"), meta.count("tfinal", 0)
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < total:
        raise ValueError(f"expected 0 <= step < {total}, the total_step in {meta.path}, got {step!r}")
    if total - t_final - step < _FIRST_DUE:
        return _fixed(rank, meta)
    return IGUConfig(
        method="adalora",
        r=max(rank, meta.count("target_r", 8)),
        target_rank=meta.count("target_r", 8),
        total_steps=total - step,
        t_init=max(meta.count("tinit", 0) - step, _FIRST_DUE - 1),
        t_final=t_final,
        delta_t=max(meta.count("deltaT", 1), 1),
        beta1=meta.number("beta1", 0.85),
        beta2=meta.number("beta2", 0.85),
        orthogonality=meta.number("orth_reg_weight", 0.5),
        dropout=meta.number("lora_dropout", 0.0),
        init="gaussian",
    )


def _fixed(rank: int, meta: PeftConfig) -> IGUConfig:
    """Ranks as they are; lambda is trained with P and Q."""
    return IGUConfig(method="lora", r=rank, init="orthonormal", dropout=meta.number("lora_dropout", 0.0))


def _module(P: Tensor, E: Tensor, Q: Tensor, config: IGUConfig) -> dict[str, Tensor]:
    """The tensors of an adapter folder. Where lambda is not trained (``init="lora"``) P takes it."""
    if config.init == "lora":
        P, E = P * E.unsqueeze(1), torch.ones_like(E)
    P, E, Q = (t.float().contiguous() for t in (P, E, Q))
    return {"lora_P": P, "lora_E": E, "lora_Q": Q, "mask": torch.ones_like(E), "live": torch.ones_like(E)}


def _file(
    meta: PeftConfig, config: IGUConfig, modules: Factors, saved: Factors, scale: dict[str, float]
) -> AdapterFile:
    modules = {name: modules[name] for name in sorted(modules, key=_by_number)}
    ranks = {name: parts["lora_E"].shape[0] for name, parts in modules.items()}
    config = dataclasses.replace(
        config,
        target_modules=list(modules),
        exclude_modules=[],
        modules_to_save=sorted(saved),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != config.initial_rank},
    )
    kinds = dict.fromkeys(modules, Conv1DBase.kind) if meta.values.get("fan_in_fan_out") else {}
    return AdapterFile(config, modules, saved, {"ranks": ranks, "scale": scale, "kinds": kinds, "history": []}, {})


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
