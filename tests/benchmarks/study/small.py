"""A small study, and what stands for training in it."""

from __future__ import annotations

from typing import Any

import pytest

from igulora.benchmarks.study import conduct as conducting
from igulora.benchmarks.study.plan import Run

FILE = """
name = "small"
seeds = [0, 1, 2, 3]
learning_rates = [1e-3, 4e-3]
budgets = [[4, 2]]
[training]
steps = 30
rows = 4
window = 2
[tasks.polarity]
data = "movie-polarity"
train = 40
validation = 12
test = 12
length = 12
[methods.igu]
[methods.fixed]
method = "lora"
[methods.peft-lora]
library = "peft"
"""


class Pretended:
    """Stands for training: known metrics, and a stop after so many runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, better: dict[str, float]) -> None:
        self.better, self.runs, self.most = better, [], 10**6
        monkeypatch.setattr(conducting, "train", self)
        monkeypatch.setattr(conducting, "_prepared", lambda task: None)

    def __call__(self, run: Run, *_: Any) -> dict[str, Any]:
        if len(self.runs) == self.most:
            raise KeyboardInterrupt
        self.runs.append(run.key)
        reached = self.better[run.method] + 0.01 * run.seed - abs(run.learning_rate - 4e-3)
        reached += 0.002 * (len(run.method) * (run.seed + 1) % 4)  # so that differences spread
        return {
            "metric": "accuracy", "validation": {"accuracy": reached, "loss": 1.0}, "test": {"accuracy": reached - 0.1, "loss": 1.0},
            "seconds": 3.0, "seconds_in_all": 4.0, "trained_at_start": 20, "trained_at_end": 10,
        }  # fmt: skip
