"""adapt, merge, unmerge and remove: adapters into a model and out again, by replacing modules in place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .adapter import SVDAdapter
from .bank import Bank, base_model, find_bank
from .bases import Base
from .config import IGUConfig
from .context import PathContext
from .distributed import stop_averaging
from .errors import MergeWarning, nearest
from .exchange import check_moves, put_aside
from .experts import AdaptedExperts, ExpertLinear, ExpertSlice, bases_of, find_slices, wrap_experts
from .layers import AdaptedLayer, wrap
from .pretrained import save_as_before, warn_when_saved
from .recompute import Recompute
from .saved import SavedModule, TrainedWhole
from .targets import find_saved, find_targets, tied_weights
from .unwrap import reshard, unwrap


def stored_rank(rank: int, config: IGUConfig) -> int:
    """Triplets that are stored where ``rank`` live at the start: with those that the layer may gain."""
    return config.initial_rank if config.bidirectional and rank else rank


def _replace(model: nn.Module, swaps: dict[int, nn.Module]) -> None:
    """Put ``swaps[id(module)]`` in the place of every module, wherever it occurs."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and id(child) in swaps and parent is not swaps[id(child)]:
                parent._modules[child_name] = swaps[id(child)]


def adapt(model: nn.Module, config: IGUConfig) -> nn.Module:
    """Inject adapters into ``model`` in place and freeze everything else; returns the same model.

    The layers that ``config.target_modules`` names become adapted ones (:class:`FusedSVDLinear`, :class:`FusedSVDEmbedding`,
    :class:`FusedSVDConv2d`), the modules of ``modules_to_save`` get a trained copy. At the start the outputs equal the base model's. All
    checks come before the first change.

    Args:
        model: any module; a bare ``nn.Linear`` cannot be replaced in itself: make a ``FusedSVDLinear`` of it.
        config: what to adapt and how.

    Raises:
        TypeError: ``config`` is not an IGUConfig or ``model`` not a module.
        ValueError: no target matched, a match cannot be adapted (says why), the model is adapted already,
            targets lie on several devices, or a name matches nothing.
    """
    check_plain(model)
    if not isinstance(config, IGUConfig):
        raise TypeError(f"expected an IGUConfig, got {type(config).__name__}; build one with igulora.IGUConfig(...)")
    if config.method in ("ralora", "ralora-pro"):
        lacks = "blocks" if config.blocks == 1 and not config.block_pattern else ""
        lacks = lacks or ("ranks" if config.method == "ralora-pro" and not config.rank_pattern else "")
        if lacks:
            raise ValueError(
                f"expected {lacks} that were measured for method={config.method!r}, got none: found = igulora.align(model, batches), then "
                "IGUConfig(..., block_pattern=found.blocks, rank_pattern=found.ranks)"
            )
    saved = find_saved(model, config)
    layers = dict.fromkeys(find_targets(model, config, saved))
    slices = find_slices(model, config, saved)
    known = [*layers, *dict.fromkeys(slices.values()), *slices]
    for option in ("rank_pattern", "block_pattern"):
        for ending in getattr(config, option):
            if not any(name == ending or name.endswith("." + ending) for name in known):
                raise ValueError(
                    f"expected {option} to name adapted layers, got {ending!r}, which matches none.{nearest(ending, known)}"
                )
    names = [name for name in bases_of(model) if name in layers or name in slices]
    ranks = [config.rank_at_start(name) for name in names]
    check_moves(config, sum(rank > 0 for rank in ranks))
    inject(model, config, names, saved, [stored_rank(rank, config) for rank in ranks])
    put_aside(find_bank(model), ranks)
    return model


def check_plain(model: nn.Module) -> None:
    """Raise unless ``model`` is a module without adapters."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    if any("igulora_banks" in vars(m) for m in model.modules()):
        raise ValueError(
            "expected a plain model, got one whose igulora adapters PEFT keeps; go on with those, or take them out by PEFT's own "
            "merge_and_unload() or unload()"
        )
    if any(isinstance(m, (SVDAdapter, SavedModule)) for m in model.modules()):
        raise ValueError(
            "expected a model without igulora adapters, got one adapted already; "
            "call igulora.remove(model) first, or go on with the adapters it has"
        )
    if any(hasattr(m, "lora_A") for m in model.modules()):
        raise ValueError(
            "expected a plain model, got one with PEFT adapters; merge them first (model = model.merge_and_unload())"
        )


def inject(model: nn.Module, config: IGUConfig, names: list[str], saved: list[str], ranks: list[int]) -> nn.Module:
    """What :func:`adapt` does, for exactly the layers ``names`` with ``ranks`` and the modules ``saved``, all by full name."""
    modules = dict(model.named_modules())
    bases = bases_of(model)
    for name in names:
        obstacle = bases[name].obstacle()
        if obstacle is not None:
            raise ValueError(f"expected layers that can be adapted, got {name!r} ({bases[name].kind}): {obstacle}")
        blocks, sides = config.blocks_of(name), (bases[name].in_features, bases[name].out_features)
        if any(side % blocks for side in sides):
            raise ValueError(
                f"expected blocks that divide both sides of {name!r} ({sides[0]} in, {sides[1]} out), got {blocks}; give it others in "
                "block_pattern, or 1"
            )
    devices = sorted({str(bases[n].device) for n in names})
    if len(devices) > 1:
        raise ValueError(
            f"expected all target layers on one device, got {', '.join(devices)}; move the model to one first"
        )
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        context = PathContext(needs_controller=config.adaptive)
        layers = _build_layers(bases, config, names, ranks)
        swaps = wrap_experts(layers)
        swaps |= {id(modules[n]): layer for n, layer in zip(names, layers, strict=True) if n in modules}
        for name in saved:
            swaps[id(modules[name])] = SavedModule(modules[name], context).train(modules[name].training)
        bank = Bank(names, list(layers), context)
    except BaseException:
        for param, flag in trained:
            param.requires_grad_(flag)
        raise
    model.requires_grad_(False)
    _replace(model, swaps)
    keep_layers_called(model)
    model.igulora_bank = bank  # type: ignore[assignment]
    model.igulora_config = config  # type: ignore[assignment]
    warn_when_saved(model)
    return model


def _build_layers(bases: dict[str, Base], config: IGUConfig, names: list[str], ranks: list[int]) -> list[AdaptedLayer]:
    generator = torch.Generator().manual_seed(config.seed)
    layers = []
    for name, rank in zip(names, ranks, strict=True):
        module = bases[name].module
        layer = (ExpertLinear if isinstance(module, ExpertSlice) else wrap)(
            module,
            rank,
            blocks=config.blocks_of(name),
            dropout=config.dropout,
            init=config.init or "zero",
            init_lambda=config.init_lambda,
            generator=generator,
        )
        layer.scale = config.scale
        layer.recompute = Recompute() if config.recompute_inputs else None
        layer.train(module.training)
        layers.append(layer)
    return layers


def keep_layers_called(model: nn.Module) -> None:
    """In evaluation nn.TransformerEncoderLayer hands its layers' weights to a fused kernel; a layer with a hook gets called."""
    for parent in model.modules():
        if isinstance(parent, nn.TransformerEncoderLayer):
            for layer in (parent.linear1, parent.linear2):
                if hasattr(layer, "base_layer"):
                    layer.register_forward_pre_hook(_called)


def _called(_module: nn.Module, _args: object) -> None:
    return None


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """The adapted layers of ``model`` in bank order.

    Raises:
        ValueError: the model is not adapted, or PEFT keeps its adapters.
    """
    layers = find_bank(model).layers
    ours = [layer for layer in layers if isinstance(layer, AdaptedLayer)]
    if len(ours) < len(layers):
        raise ValueError(
            "expected a model of igulora.adapt, got one whose adapters PEFT keeps; call its own merge_adapter(), unmerge_adapter(), "
            "merge_and_unload() or unload()"
        )
    return ours


def saved_modules(model: nn.Module) -> dict[str, TrainedWhole]:
    """The modules trained whole, by their full names in the base model."""
    named = base_model(unwrap(model)).named_modules()
    return {name: m for name, m in named if isinstance(m, TrainedWhole) and m.trained is not None}


def merge(model: nn.Module) -> nn.Module:
    """Fold every update into its base weight, so that a forward costs what the base model's costs; returns the model.

    Quantised weights are quantised anew, and the old ones kept until :func:`unmerge`. What is lost is told by a :class:`MergeWarning`
    and, layer by layer, by :func:`merge_errors`.

    Raises:
        ValueError: the model is not adapted or merged already, a weight cannot be written, or it is tied to another layer's. Nothing is
            changed then.
    """
    layers = adapted_layers(model)
    if any(layer.merged for layer in layers):
        raise ValueError("expected an unmerged model, got a merged one; call igulora.unmerge(model) first")
    names = dict(zip(find_bank(model).names, layers, strict=True))
    check_mergeable(model, names)
    reshard(model)
    for layer in layers:
        layer.merge()
    warn_of_loss(names)
    return model


def check_mergeable(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raise unless an update may be written into the weight of each of ``layers``, the adapted ones by their names in ``model``."""
    tied = tied_weights(model)
    for name, layer in layers.items():
        fixed = layer.base.fixed()
        if fixed is not None:
            raise ValueError(f"expected weights that can be written, got {name!r} ({layer.base.kind}): {fixed}")
        if id(layer.weight) in tied:
            raise ValueError(
                f"expected weights of one layer each, got {name!r}, whose weight is that of another module too, which the update would "
                "change; give that one a copy first (head.weight = nn.Parameter(head.weight.detach().clone())), or serve the adapter "
                "unmerged"
            )


def merge_errors(model: nn.Module) -> dict[str, float]:
    """By layer, how far a merged weight is from base plus update, as a share of the update's norm.

    1 is as far off as without the update: quantising dropped it. 0.0 for weights that are not quantised. Of a PEFT model, merged layers.

    Raises:
        ValueError: the model is not adapted, or not merged.
    """
    inner = base_model(unwrap(model))
    layers: dict[str, Any]
    if hasattr(inner, "igulora_banks"):
        layers = {name: m for name, m in inner.named_modules() if hasattr(m, "igu_adapters") and m.merged}
    else:
        layers = dict(zip(find_bank(model).names, adapted_layers(model), strict=True))
    if not layers or not all(layer.merged for layer in layers.values()):
        raise ValueError(
            "expected a merged model, got an unmerged one; call igulora.merge(model) first, or a PEFT model's merge_adapter()"
        )
    return {name: layer.merge_error for name, layer in layers.items()}


@torch.no_grad()
def warn_of_loss(names: Mapping[str, Any], stacklevel: int = 3) -> None:
    """Say how much of the updates is lost in quantised weights, if any: of merged layers by their names."""
    lossy = {name: layer for name, layer in names.items() if layer.merge_error > 0.0}
    if not lossy:
        return
    worst, layer = max(lossy.items(), key=lambda item: item[1].merge_error)
    size = float(layer.base.dense().float().norm())
    share = float(layer.delta_weight().norm()) / size if size else 0.0
    warnings.warn(
        f"merging quantised {len(lossy)} weights anew, which keeps an update only as far as it is coarser than what the weight can "
        f"hold: errors of up to {layer.merge_error:.0%} of the update ({worst}, {layer.base.kind}; the update is {share:.2%} of the "
        "weight). igulora.merge_errors(model) has all. The adapter beside the unmerged model, or merged into the unquantised one, loses "
        "nothing",
        MergeWarning,
        stacklevel=stacklevel,
    )


def unmerge(model: nn.Module) -> nn.Module:
    """Take the updates out of the base weights again (exact in quantised weights, else up to rounding); returns the model.

    Raises:
        ValueError: the model is not adapted, or not merged.
    """
    layers = adapted_layers(model)
    if not all(layer.merged for layer in layers):
        raise ValueError("expected a merged model, got an unmerged one; call igulora.merge(model) first")
    reshard(model)
    for layer in layers:
        layer.unmerge()
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take the adapters out and put the plain modules back; returns the model.

    After :func:`merge` the trained weights stay (updates in the base weights, trained copies of the modules to save); without it the
    base model returns. Parameters stay frozen.

    Raises:
        ValueError: the model is not adapted.
    """
    model = unwrap(model)
    layers = adapted_layers(model)
    merged = bool(layers) and all(layer.merged for layer in layers)
    swaps: dict[int, nn.Module] = {
        id(layer): layer.base_layer for layer in layers if not isinstance(layer, ExpertLinear)
    }
    swaps |= {id(m): m.base_layer for m in model.modules() if isinstance(m, AdaptedExperts)}
    for saved in model.modules():
        if isinstance(saved, SavedModule):
            swaps[id(saved)] = saved.module.requires_grad_(False) if merged else saved.original
    _replace(model, swaps)
    stop_averaging(model)
    save_as_before(model)
    del model.igulora_bank
    del model.igulora_config
    return model
