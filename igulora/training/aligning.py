"""RaLoRA's measurement before a run: blocks, and for RaLoRA-Pro ranks, from the gradients of its first batches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..alignment import align, blocks_for
from ..config import IGUConfig
from ..files import write_json
from .loop import BatchStream
from .move_plots import plot_dimensionality
from .settings import RunSettings
from .tasks import Row, Task, to_device

ALIGNMENT_FILE, PICTURE = "alignment.json", "dimensionality.png"
Layers = dict[str, dict[str, Any]]


def wants_alignment(config: IGUConfig) -> bool:
    """Whether gradients are to be measured before this run: RaLoRA's methods, where no blocks are given."""
    return config.method in ("ralora", "ralora-pro") and not config.block_pattern and config.blocks == 1


def check_alignment_asked(config: IGUConfig, settings: RunSettings) -> None:
    """Raise ValueError where options of a measurement are given to a run that makes none."""
    if wants_alignment(config):
        return
    fields = {field.name: field.default for field in dataclasses.fields(settings) if field.name.startswith("align_")}
    given = [name for name, default in fields.items() if getattr(settings, name) != default]
    if given:
        raise ValueError(
            f"expected {', '.join(given)} with method='ralora' or 'ralora-pro' and no blocks of your own, as only then gradients are "
            f"measured, got method={config.method!r}, blocks={config.blocks} and {len(config.block_pattern)} entries in block_pattern"
        )


def measure(config: IGUConfig, model: nn.Module, task: Task, rows: Sequence[Row], settings: RunSettings) -> Layers:
    """What :func:`igulora.align` finds on the first ``align_batches`` batches of ``rows``, by layer; ranks of ``rank_pattern`` are kept."""
    if config.method == "ralora-pro" and config.rank_pattern:
        raise ValueError(
            "expected no rank_pattern with method='ralora-pro', which chooses the ranks, got one; give blocks, too, or use 'ralora'"
        )
    device = next(model.parameters()).device
    stream = BatchStream(len(rows), settings.batch_size, settings.seed)
    parts = [[rows[i] for i in stream[k]] for k in range(settings.align_batches)]
    layers = align(
        model,
        [to_device(task.collate(part), device) for part in parts],
        lambda batch: task.loss(model, batch),
        r=config.live_rank,
        pro=config.method == "ralora-pro",
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        max_blocks=settings.align_max_blocks,
        r_min=settings.align_r_min,
        r_max=settings.align_r_max,
        seed=config.seed,
    ).to_dict()
    if config.method == "ralora":
        for name, layer in layers.items():
            layer["rank"] = config.rank_of(name)
            sides = layer["in_features"], layer["out_features"]
            layer["blocks"] = blocks_for(layer["dimensionality"], layer["rank"], *sides, settings.align_max_blocks)
    return layers


def with_alignment(config: IGUConfig, layers: Layers) -> IGUConfig:
    """The options with the blocks that were measured in them, and RaLoRA-Pro's ranks."""
    if config.method == "ralora-pro":
        config = dataclasses.replace(config, rank_pattern={name: layer["rank"] for name, layer in layers.items()})
    return dataclasses.replace(config, block_pattern={name: layer["blocks"] for name, layer in layers.items()})


def write_alignment(layers: Layers, output: Path) -> Path:
    """Numbers and a picture in the folder of a run; returns the picture's path."""
    write_json(output / ALIGNMENT_FILE, layers)
    return plot_dimensionality(layers, output / PICTURE)


def read_alignment(output: Path) -> Layers:
    """What :func:`write_alignment` wrote, for a run that goes on."""
    return json.loads((output / ALIGNMENT_FILE).read_text(encoding="utf-8"))
