"""How a method trains a model, ours and PEFT's by one description: what studies compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import igulora
from igulora.bank import find_bank
from igulora.config import FIXED_RANK
from igulora.optim import default_lambda_lr_ratio
from igulora.training.report import trainable_parameters

_ALIGN_BATCHES = 8
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Recipe:
    """One method and what it trains with.

    Attributes:
        library: "igulora" or "peft". method: of :class:`igulora.IGUConfig`, or "lora", "dora", "adalora" of PEFT's.
        r, target: triplets per matrix, at the start of methods that prune and at the end of all.
        schedule: total_steps, t_init, t_final and delta_t of methods whose ranks change.
        rate: learning rate. optimizer: further options of AdamW.
        options: of the method's own config; they win over what follows from the rest.
        trace: whether our methods keep score series.
    """

    library: str
    method: str
    r: int
    target: int
    schedule: dict[str, int]
    rate: float
    seed: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    trace: bool = False


@dataclass
class Learner:
    """A method at work.

    Attributes:
        step: one optimizer step on a batch. optimizer: whose learning rate a schedule sets.
        ranks: live triplets by matrix, now; of a method without Lambda its ranks. trained: parameters that train, now; of adapters those
            of live triplets.
        controller: of our methods.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Any], None]
    ranks: Callable[[], dict[str, int]]
    trained: Callable[[], int]
    controller: igulora.Controller | None = None


def learner(recipe: Recipe, model: nn.Module, heads: list[str], loss: Loss, batches: list[Any]) -> Learner:
    """``model`` adapted in place; ``batches`` are those it will train on, for methods that measure before.

    PEFT draws its start from PyTorch's own generator, which is the caller's to seed.
    """
    return (_peft if recipe.library == "peft" else _ours)(recipe, model, heads, loss, batches)


def our_config(recipe: Recipe, heads: list[str], **measured: Any) -> igulora.IGUConfig:
    """The config of one of our methods.

    Raises:
        ValueError, TypeError: an option is unknown or does not fit.
    """
    schedule = {} if recipe.method in FIXED_RANK else recipe.schedule
    options = {
        "r": recipe.r,
        "target_rank": recipe.target,
        "modules_to_save": heads,
        "seed": recipe.seed,
        **schedule,
        **recipe.options,
    }
    return igulora.IGUConfig.from_dict({"method": recipe.method, **options, **measured})


def peft_config(recipe: Recipe, heads: list[str]) -> Any:
    """The config of one of PEFT's methods.

    Raises:
        TypeError: an option is unknown. ValueError: one does not fit.
    """
    import peft

    shared = {"target_modules": "all-linear", "modules_to_save": heads, "exclude_modules": heads, **recipe.options}
    if recipe.method != "adalora":
        return peft.LoraConfig(r=recipe.target, lora_alpha=recipe.target, use_dora=recipe.method == "dora", **shared)
    times = recipe.schedule
    return peft.AdaLoraConfig(
        init_r=recipe.r, target_r=recipe.target, lora_alpha=recipe.r, total_step=times["total_steps"], tinit=times["t_init"],
        tfinal=times["t_final"], deltaT=times["delta_t"], **shared,
    )  # fmt: skip


def resolved(recipe: Recipe) -> dict[str, Any]:
    """All that a recipe comes to, JSON-able, defaults filled in: of ours the whole config, of PEFT's what is given to it."""
    if recipe.library == "peft":
        return {
            "optimizer": recipe.optimizer,
            "options": recipe.options,
            "schedule": recipe.schedule if recipe.method == "adalora" else {},
        }
    config = our_config(recipe, [])
    optimizer = {"lambda_lr_ratio": default_lambda_lr_ratio(config), **recipe.optimizer}
    return {"optimizer": optimizer, "options": config.to_dict()}


def _ours(recipe: Recipe, model: nn.Module, heads: list[str], loss: Loss, batches: list[Any]) -> Learner:
    measured: dict[str, Any] = {}
    if recipe.method in ("ralora", "ralora-pro") and not {"blocks", "block_pattern"} & recipe.options.keys():
        found = igulora.align(
            model,
            batches[:_ALIGN_BATCHES],
            lambda b: loss(model, b),
            r=recipe.target,
            pro=recipe.method == "ralora-pro",
            exclude_modules=heads,
            seed=recipe.seed,
        )
        measured = {"block_pattern": found.blocks} | (
            {"rank_pattern": found.ranks} if recipe.method == "ralora-pro" else {}
        )
    igulora.adapt(model, our_config(recipe, heads, **measured))
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=recipe.rate, **recipe.optimizer), fused=True)
    controller = igulora.Controller(model, optimizer=optimizer, trace="all" if recipe.trace else ())

    def step(batch: Any) -> None:
        controller.backward(lambda b: loss(model, b), batch)
        optimizer.step()
        controller.step()
        optimizer.zero_grad()

    def ranks() -> dict[str, int]:
        return find_bank(model).ranks()

    return Learner(model, optimizer, step, ranks, lambda: trainable_parameters(model, ranks()), controller)


def _peft(recipe: Recipe, model: nn.Module, heads: list[str], loss: Loss, batches: list[Any]) -> Learner:
    import peft

    adaptive, config = recipe.method == "adalora", peft_config(recipe, heads)
    wrapped = peft.get_peft_model(model, config)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, fused=True, **recipe.optimizer)
    taken = 0

    def step(batch: Any) -> None:
        nonlocal taken
        value = loss(wrapped, batch)
        if adaptive:
            value = value + _penalty(wrapped, config.orth_reg_weight)
        value.backward()
        optimizer.step()
        if adaptive:
            wrapped.base_model.update_and_allocate(taken)
        taken += 1
        optimizer.zero_grad()

    named = wrapped.base_model.model.named_modules()
    layers = {name: module for name, module in named if len(getattr(module, "lora_A", ()))}

    def ranks() -> dict[str, int]:
        if adaptive and taken:
            return {name: int((layer.lora_E["default"] != 0).sum()) for name, layer in layers.items()}
        return {name: layer.r["default"] for name, layer in layers.items()}

    def parameters() -> int:
        """Those of adapters by triplet: a row of A, a column of B and, with AdaLoRA, an entry of E; DoRA's magnitudes beside them."""
        now, stored = ranks(), {name: layer.r["default"] for name, layer in layers.items()}
        sizes = {name: layer.in_features + layer.out_features + adaptive for name, layer in layers.items()}
        return sum(p.numel() for p in trained) - sum((stored[name] - now[name]) * sizes[name] for name in layers)

    return Learner(wrapped, optimizer, step, ranks, parameters)


def _penalty(model: nn.Module, weight: float) -> Tensor:
    """The orthogonality penalty of PEFT's AdaLoRA, which it adds only to a loss that the model itself returns."""
    total, count = torch.zeros(()), 0
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.t() if "lora_A" in name else p.t() @ p
            total, count = total + torch.linalg.matrix_norm(gram - torch.eye(len(gram))), count + 1
    return weight * total / max(count, 1)
