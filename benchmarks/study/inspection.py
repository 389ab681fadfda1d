"""What a run of a study may measure beside its metrics, after IGU-LoRA: without single matrices (Table 8), score series (figure 7)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from igulora.bank import find_bank
from igulora.training.tasks import average_ranks, pearson

from .tasks import Prepared


def removal(model: nn.Module, task: Prepared, rows: int) -> dict[str, float]:
    """The metric on the first ``rows`` validation rows without each matrix's update, one at a time; under "" with all of them.

    The model is as before when this returns.
    """
    bank, part = find_bank(model), task.validation[:rows]
    found = {"": task.evaluate(model, part)[task.metric]}
    for name, layer in zip(bank.names, bank.layers, strict=True):
        kept = layer.lora_E.detach().clone()
        with torch.no_grad():
            layer.lora_E.zero_()
            found[name] = task.evaluate(model, part)[task.metric]
            layer.lora_E.copy_(kept)
    return found


def watched(series: dict[str, list[dict[str, float]]], count: int) -> dict[str, list[dict[str, float]]]:
    """The series of ``count`` matrices, spread over the model."""
    names = list(series)
    chosen = dict.fromkeys(round(i * (len(names) - 1) / max(count - 1, 1)) for i in range(min(count, len(names))))
    return {names[i]: series[names[i]] for i in chosen}


def rank_correlation(ones: Sequence[float], others: Sequence[float]) -> float:
    """Spearman's; 0 where one of the two is constant."""
    return pearson(*(average_ranks(torch.tensor(values, dtype=torch.float64)) for values in (ones, others)))


def settled(points: list[dict[str, float]]) -> dict[str, float]:
    """How steady a series is: its last half against the one before it.

    Returns:
        ``mean`` and ``variance`` of y_t and ``snr``, each as the last quarter's over that of the quarter before; ``autocorrelation`` at
        lag 1 over the last half.
    """
    size = len(points) // 4
    before, last = points[-2 * size : -size], points[-size:]
    y = np.array([point["y"] for point in points[-2 * size :]])
    off = y - y.mean()
    found = {"autocorrelation": float((off[1:] * off[:-1]).sum() / max((off * off).sum(), 1e-30))}
    for name, kind, measure in (("mean", "y", np.mean), ("variance", "y", np.var), ("snr", "snr", np.mean)):
        early, late = (float(measure([point[kind] for point in part])) for part in (before, last))
        found[name] = late / early if early else float("nan")
    return found
