"""Pictures of triplets that move, and of what an alignment measured: who gave and who gained, and what it was decided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import heat, heat_size, new_figure, saved


def rank_changes(history: Sequence[Mapping[str, Any]], start: Mapping[str, int]) -> dict[str, list[int]]:
    """Module -> its rank after each adjustment, less the one it started with."""
    return {name: [event["ranks"][name] - rank for event in history] for name, rank in start.items()}


def plot_moves(history: Sequence[Mapping[str, Any]], start: Mapping[str, int], path: Path) -> Path:
    """Modules by adjustments: triplets gained (red) and given (blue) since the start, and beside them what modules were ranked by.

    Args:
        history: entries of :attr:`igulora.Controller.history` that have an "importance".
        start: every module's rank at the start.

    Raises:
        ValueError: nothing has moved.
    """
    if not history:
        raise ValueError("expected adjustments to draw, got none; train past t_init")
    names, steps = list(start), [event["step"] for event in history]
    changes = rank_changes(history, start)
    most = max(1, *(abs(value) for row in changes.values() for value in row))
    height = max(2.4, 0.13 * len(names) + 1.0)
    figure, axes = new_figure([height], 2, 14.0)
    left, right = axes[0]
    shown = [changes[name] for name in names]
    image = left.imshow(shown, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    figure.colorbar(image, ax=left, label="triplets gained since the start", pad=0.01)
    given, gained = (sum(sign * row[-1] > 0 for row in shown) for sign in (-1, 1))
    left.set_title(f"Rank movement: {given} modules gave, {gained} gained", fontsize=10)
    labels = [f"{name}  {changes[name][-1]:+d}" for name in names]
    left.set_yticks(range(len(names)), labels, fontsize=5 if len(names) > 40 else 7)
    values = [[event["importance"][name] for event in history] for name in names]
    image = right.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=right, label="importance", pad=0.01)
    right.set_title("What modules were ranked by", fontsize=10)
    right.set_yticks([])
    places = sorted({round(i * (len(steps) - 1) / 9) for i in range(10)})
    for axis in (left, right):
        axis.set_xticks(places, [str(steps[i]) for i in places], fontsize=7)
        axis.set_xlabel("optimizer step", fontsize=8)
    return saved(figure, path)


def plot_dimensionality(layers: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Effective rank of every matrix's gradient and the blocks chosen for it, modules by layers (RaLoRA's figures).

    Args:
        layers: :meth:`igulora.Alignment.to_dict`.
    """
    measured = {name: layer["dimensionality"] for name, layer in layers.items()}
    blocks = {name: layer["blocks"] for name, layer in layers.items()}
    width, height = heat_size(measured)
    figure, axes = new_figure([height, height], 1, width)
    title = f"Gradient dimensionality by layer and module, {min(measured.values()):.0f} to {max(measured.values()):.0f}"
    heat(figure, axes[0][0], measured, max(measured.values()), "effective rank", title, ".0f")
    heat(figure, axes[1][0], blocks, max(blocks.values()), "blocks", "Blocks of the adapters")
    return saved(figure, path)


def has_moves(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the entries of a history say what modules were ranked by."""
    return bool(history) and all("importance" in event for event in history)
