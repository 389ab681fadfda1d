"""What was kept of a row that becomes a new triplet: its scores, its sums and the optimizer's moments start at zero (FlexLoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bank import Bank
from .importance import Importance

Place = tuple[int, int]  # number of a matrix, and a row of it


@torch.no_grad()
def start_anew(
    bank: Bank,
    importance: Importance,
    optimizer: torch.optim.Optimizer,
    gained: Sequence[Place],
    sums: tuple[Tensor | None, ...],
) -> None:
    """Score states, sums and the optimizer's moments of new triplets start at zero; all others stay what they are.

    Args:
        sums: flat buffers of an unfinished window.
    """
    kept = [importance.mean, importance.deviation, *(flat.detach() for flat in sums if flat is not None)]
    views = [bank.matrix_views(flat) for flat in kept]
    for k, row in gained:
        layer, name = bank.layers[k], bank.names[k]
        importance.terms[:, bank.starts[k] + row] = 0.0
        for part in ("lora_P", "lora_E", "lora_Q"):
            for view in views:
                view[name, part][row] = 0.0
            _forget_row(optimizer, getattr(layer, part), row)


def check_states(optimizer: torch.optim.Optimizer, bank: Bank) -> None:
    """Raise where the optimizer does not train all adapters, or a row of its states cannot be set to zero."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in held for p in bank.parameters() if p.requires_grad and p.numel()):
        raise ValueError(
            f"expected the one optimizer that trains the adapters, got {type(optimizer).__name__} without some of their parameters: give "
            "igulora.Controller(model, optimizer=...) the one made of igulora.param_groups(model)"
        )
    for param in bank.parameters():
        for key, value in optimizer.state.get(param, {}).items():
            if _has_rows(value, param) and not value.is_floating_point():
                raise ValueError(
                    f"expected an optimizer with states of floating-point numbers, got {key!r} of {type(optimizer).__name__} in "
                    f"{value.dtype}: rows of a triplet that is gained have to start at zero there. Use one that does not quantise them"
                )


def _has_rows(value: Any, param: nn.Parameter) -> bool:
    """Whether a state has an entry, or a row of them, for every row of its parameter."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == param.shape[0]


def _forget_row(optimizer: torch.optim.Optimizer, param: nn.Parameter, row: int) -> None:
    for value in optimizer.state.get(param, {}).values():
        if _has_rows(value, param):
            value[row] = 0
