"""Parameter groups: lambda takes larger steps than the directions (ALGORITHMS 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .bank import Bank, find_bank, find_config
from .config import IGUConfig
from .unwrap import unwrap

# Per Adam step each lambda moves by about its learning rate while a whole row of P moves by sqrt(out) times it: a ratio of the order of
# sqrt(d) makes Delta W of orthonormal directions grow as fast as LoRA's. At 30 training fails at rates at which it does not at 10
# (docs/choices.md).
DEFAULT_LAMBDA_LR_RATIO = 10.0


def param_groups(
    model: nn.Module,
    lr: float,
    lambda_lr_ratio: float | None = None,
    weight_decay: float = 0.0,
    p_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimizer parameter groups of an adapted model.

    Args:
        model: adapted by :func:`igulora.adapt`.
        lr: learning rate of P, Q and of the modules to save.
        lambda_lr_ratio: lambda's learning rate over ``lr``; by default 10 for orthonormal directions and 1 for `init` "gaussian" or "zero".
        weight_decay: of P, Q and the modules to save; lambda has none, the budget is what shrinks it.
        p_lr_ratio: P's learning rate over ``lr``, which is Q's (LoRA+ takes 16 where P starts at zero).

    Returns:
        Groups named "vectors" (P and Q; with a ``p_lr_ratio`` other than 1 "P" and "Q"), "lambda" and, where there are any, "saved", each
        with its ``lr`` and ``weight_decay``.

    Raises:
        ValueError: the model is not adapted, ``lr`` or ``p_lr_ratio`` is not positive, or ``lambda_lr_ratio`` negative.
    """
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or lr <= 0:
        raise ValueError(f"expected a learning rate lr > 0, got {lr!r}")
    if isinstance(p_lr_ratio, bool) or not isinstance(p_lr_ratio, (int, float)) or p_lr_ratio <= 0:
        raise ValueError(f"expected p_lr_ratio > 0, got {p_lr_ratio!r}")
    model = unwrap(model)
    bank = find_bank(model)
    lambda_lr_ratio = _ratio(model, lambda_lr_ratio)
    vectors: dict[str, tuple[tuple[str, ...], float]] = {"vectors": (("lora_P", "lora_Q"), lr)}
    if p_lr_ratio != 1.0:
        vectors = {"P": (("lora_P",), lr * p_lr_ratio), "Q": (("lora_Q",), lr)}
    lambdas, saved = _trained(bank, ("lora_E",)), bank.others(model)
    groups = [
        *(
            {"name": name, "params": _trained(bank, factors), "lr": rate, "weight_decay": weight_decay}
            for name, (factors, rate) in vectors.items()
        ),
        {"name": "lambda", "params": lambdas, "lr": lr * lambda_lr_ratio, "weight_decay": 0.0},
        {"name": "saved", "params": saved, "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _trained(bank: Bank, factors: tuple[str, ...]) -> list[nn.Parameter]:
    """The parameters of these names, layer by layer, that are trained."""
    return [p for layer in bank.layers for factor in factors if (p := getattr(layer, factor)).requires_grad]


def split_lambda(optimizer: torch.optim.Optimizer, model: nn.Module, lambda_lr_ratio: float | None = None) -> None:
    """Give lambda groups of its own in an optimizer that somebody else built: ``lambda_lr_ratio`` times the learning rate, no weight decay.

    For a fresh optimizer, before the learning rate scheduler is built. All other options of a group are kept.

    Args:
        optimizer: holds the parameters of ``model``; those it does not hold are left out.
        model: adapted by :func:`igulora.adapt`.
        lambda_lr_ratio: as in :func:`param_groups`.

    Raises:
        ValueError: the model is not adapted, ``lambda_lr_ratio`` is negative, or a group has no learning rate to take a multiple of.
    """
    ratio = _ratio(model, lambda_lr_ratio)
    lambdas = {id(layer.lora_E) for layer in find_bank(model).layers}
    for group in list(optimizer.param_groups):
        ours = [p for p in group["params"] if id(p) in lambdas]
        if not ours:
            continue
        if not isinstance(group.get("lr"), (int, float)):
            raise ValueError(
                f"expected an optimizer with a learning rate for lambda_lr_ratio={ratio:g}, got {type(optimizer).__name__} with "
                f"lr={group.get('lr')!r}; pass an optimizer of your own, or lambda_lr_ratio=1"
            )
        options = {key: value for key, value in group.items() if key != "params"}
        options |= {"lr": group["lr"] * ratio, "weight_decay": 0.0}
        others = [p for p in group["params"] if id(p) not in lambdas]
        if others:
            group["params"] = others
            optimizer.add_param_group({**options, "params": ours})
        else:
            group.update(options)


def _ratio(model: nn.Module, lambda_lr_ratio: float | None) -> float:
    if lambda_lr_ratio is not None and lambda_lr_ratio < 0:
        raise ValueError(f"expected lambda_lr_ratio >= 0, got {lambda_lr_ratio}")
    if lambda_lr_ratio is not None:
        return lambda_lr_ratio
    return default_lambda_lr_ratio(find_config(model))


def default_lambda_lr_ratio(config: IGUConfig) -> float:
    """Lambda's learning rate over that of P and Q where none is given: 1 for the Gaussian start and from zero, else 10."""
    return 1.0 if config.init in ("gaussian", "zero") else DEFAULT_LAMBDA_LR_RATIO
