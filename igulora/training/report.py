"""The table a run ends with."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapt import adapted_layers
from .extras import require


@dataclass(frozen=True)
class Report:
    """Figures of a finished run. Times in seconds, memory in bytes; ``before`` and ``after`` are evaluation metrics."""

    metric: str
    before: dict[str, float]
    after: dict[str, float]
    trainable_before: int
    trainable_after: int
    triplets_before: int
    triplets_after: int
    steps: int
    step_seconds: float
    peak_memory: int
    seconds: float

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, before, after) in words; one-sided figures leave "before" empty."""
        names = [self.metric, *(name for name in self.after if name != self.metric)] if self.after else []
        rows = [(f"held-out {name}", f"{self.before[name]:.4f}", f"{self.after[name]:.4f}") for name in names]
        saved = 1.0 - self.trainable_after / self.trainable_before if self.trainable_before else 0.0
        return [
            *rows,
            ("live triplets", f"{self.triplets_before:,}", f"{self.triplets_after:,}"),
            ("trainable parameters", f"{self.trainable_before:,}", f"{self.trainable_after:,} (−{saved:.0%})"),
            ("optimizer step, median", "", f"{self.step_seconds:.3g} s ({self.steps} steps)"),
            ("peak memory", "", f"{self.peak_memory / 2**20:,.0f} MiB"),
            ("whole run", "", f"{self.seconds // 60:.0f} min {self.seconds % 60:.0f} s"),
        ]

    def show(self, console: Any) -> None:
        """Print the table on a rich console."""
        table = require("rich.table", "demo", "the final report").Table(title="What the run did", title_justify="left")
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="left" if not heading else "right")
        for row in self.rows():
            table.add_row(*row)
        console.print(table)


def trainable_parameters(model: nn.Module, ranks: dict[str, int]) -> int:
    """Parameters that training changes: of adapters those of live triplets, ``ranks`` by module."""
    layers = list(adapted_layers(model))
    ours = {id(p) for layer in layers for p in (layer.lora_P, layer.lora_E, layer.lora_Q)}
    others = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in ours)
    # Method "lora" has no λ to train.
    sizes = [layer.p_length + layer.q_length + int(layer.lora_E.requires_grad) for layer in layers]
    return others + sum(size * count for size, count in zip(sizes, ranks.values(), strict=True))


def peak_memory(device: torch.device) -> int:
    """Most memory used so far, in bytes: allocated on the device, or resident for the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
