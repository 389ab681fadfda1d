"""RankLog: what happened to the ranks along a run, kept on the device until somebody asks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .bank import Bank
from .importance import Importance


class RankLog:
    """Allocations of a run, and the series of traced modules (IGU-LoRA figure 7).

    Args:
        bank: the triplets.
        trace: names of the modules whose series are kept.
    """

    def __init__(self, bank: Bank, trace: list[str]) -> None:
        self.bank, self.trace = bank, trace
        # Per allocation: step, budget, live mask, the number of each module's first triplet in it, and each module's importance.
        self._events: list[tuple[int, int, Tensor, list[int], dict[str, float] | None]] = []
        self._series: list[tuple[int, Tensor]] = []

    def allocated(self, step: int, budget: int, importance: dict[str, float] | None = None) -> None:
        """Note the bank's new live mask, and what the modules were ranked by where whole matrices are.

        An allocation makes a mask anew: it is kept, and its ranks are counted when somebody asks.
        """
        self._events.append((step, budget, self.bank.live, self.bank.starts, importance))

    def scored(self, step: int, importance: Importance) -> None:
        """Note the statistics of the traced modules after a score update."""
        if self.trace:
            stats = importance.module_stats()
            self._series.append((step, torch.stack([stats[k] for k in ("y", "mean", "deviation")])))

    def history(self) -> list[dict[str, Any]]:
        """One entry per allocation: step, budget and the live rank of every module (synchronises with the device).

        Where matrices are ranked as wholes ("flexlora", "igu-flex"), also the "importance" of every module that it was decided by.
        """
        out: list[dict[str, Any]] = []
        for step, budget, live, starts, importance in self._events:
            values = live.tolist()
            ranks = [int(sum(values[a:b])) for a, b in itertools.pairwise(starts)]
            entry = {"step": step, "budget": budget, "ranks": dict(zip(self.bank.names, ranks, strict=True))}
            out.append(entry if importance is None else {**entry, "importance": importance})
        return out

    def series(self, eps: float) -> dict[str, list[dict[str, float]]]:
        """Per traced module and score update: step, y_t, running mean, running deviation and SNR_t (IGU-LoRA appendix G)."""
        out: dict[str, list[dict[str, float]]] = {name: [] for name in self.trace}
        where = [self.bank.names.index(name) for name in self.trace]
        for step, stats in self._series:
            values = stats[:, where].tolist()
            for k, name in enumerate(self.trace):
                y, mean, deviation = values[0][k], values[1][k], values[2][k]
                out[name].append(
                    {"step": step, "y": y, "mean": mean, "deviation": deviation, "snr": mean / (deviation + eps)}
                )
        return out

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "history": self.history(),
            "trace": self.trace,
            "series": [[step, stats.tolist()] for step, stats in self._series],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; series of other modules than the traced ones are dropped."""
        each = list(range(len(self.bank.names) + 1))  # of past allocations the ranks are known, one number per module
        self._events = [
            (
                int(e["step"]),
                int(e["budget"]),
                torch.tensor([e["ranks"][name] for name in self.bank.names]),
                each,
                e.get("importance"),
            )
            for e in state["history"]
        ]
        self._series = []
        if state["trace"] == self.trace:
            self._series = [(int(step), _statistics(stats)) for step, stats in state["series"]]


def _statistics(rows: list[list[float | None]]) -> Tensor:
    """(3, modules) of a saved series; None is what JSON of format 1 made of NaN."""
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows])
