"""Quadrature along the path alpha * Delta W: which nodes a window visits and what each sample weighs (ALGORITHMS 2.2; Eq. 5-7).

A window of M micro-batches scores J = ceil(M / ig_every) of them. The path gradient is ``T = 1/J sum_j sum_rows u g(alpha)``: the
quadrature hands out, per scored micro-batch, an alpha and a factor u for every sampled sequence, and the factor of the training
gradient itself where the endpoint f(1) takes part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from .config import IGUConfig
from .distributed import Processes

_T = TypeVar("_T")
_SPREAD = 0x9E3779B1  # odd, so that windows get seeds far apart: a generator takes 32 bits of one


@dataclass(frozen=True)
class PathSample:
    """What one scored micro-batch samples.

    Attributes:
        alphas, factors: one list per copy of the sampled sequences (a second copy when f(0) is evaluated), one value per sequence.
        endpoint: factor of the training gradient f(1).
    """

    alphas: list[list[float]]
    factors: list[list[float]]
    endpoint: float = 0.0


class Quadrature:
    """Draws the nodes of an estimator, window by window, from a seeded generator.

    Data-parallel processes draw alike, each for the joint batch, and take the rows of their own: together they sample what one process
    would of all their rows. Each window's draws depend on the seed and its number alone, so that batches of different sizes put the
    processes out of step for no longer than a window.

    Args:
        config: reads ``estimator``, ``nodes``, ``weights``, ``include_f0``, ``window``, ``ig_every``, ``seed``.
        processes: those that sample together.
    """

    def __init__(self, config: IGUConfig, processes: Processes | None = None) -> None:
        self.config = config
        self.processes = processes or Processes()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.per_window = -(-config.window // config.ig_every)  # type: ignore[operator]
        self._plan: list[tuple[float, float]] = []
        self._windows = 0
        self._planned = 0  # nodes of this window so far: Gauss nodes are taken in turn, across windows

    @property
    def samples_path(self) -> bool:
        """Whether the estimator needs path rows of its own (beside the training rows)."""
        return self.config.estimator in ("gauss", "stratified", "trapezoid")

    def next_window(self) -> None:
        """Forget what is left of this window's plan and draw for the next one."""
        self._plan, self._planned = [], 0
        self._windows += 1
        self.generator.manual_seed((self.config.seed ^ self._windows * _SPREAD) % 2**32)

    def sample(self, rows: int) -> PathSample:
        """Nodes and factors for ``rows`` sequences of this process's next scored micro-batch."""
        if self.config.estimator == "trapezoid":
            return self._trapezoid(rows)
        joint = rows * self.processes.count
        if len(self._plan) < joint:
            self._plan += self._gauss(joint) if self.config.estimator == "gauss" else self._strata(joint)
        taken, self._plan = self._own(self._plan[:joint]), self._plan[joint:]
        return PathSample([[alpha for alpha, _ in taken]], [[factor for _, factor in taken]])

    def _own(self, joint: list[_T]) -> list[_T]:
        """This process's part of a list for the rows of all."""
        rows = len(joint) // self.processes.count
        return joint[self.processes.rank * rows :][:rows]

    def on_path(self, rows: int | None) -> list[float]:
        """Alphas of a training pass on the path: one for the batch, or (``rows`` given) one per sequence, each from its own stratum."""
        n = self.config.nodes
        assert n is not None
        if rows is None:
            return [(self._draw_below(n) + 1) / n]
        joint = rows * self.processes.count
        order = torch.randperm(joint, generator=self.generator)
        jitter = torch.rand(joint, generator=self.generator)
        # 1 - (.) keeps alpha in (0, 1]: at alpha = 0 a training row would train nothing.
        return self._own((1.0 - (order + jitter) / joint).tolist())

    def rows_of(self, batch_size: int) -> list[int]:
        """Which sequences of a batch the path pass sees: a random ``ig_fraction`` of them, at least one, as many in each process."""
        wanted = max(1, round(self.config.ig_fraction * batch_size))  # type: ignore[operator]
        if wanted >= batch_size:
            return list(range(batch_size))
        order = torch.randperm(batch_size * self.processes.count, generator=self.generator)
        first = batch_size * self.processes.rank
        own = order[(order >= first) & (order < first + batch_size)] - first
        return sorted(own[:wanted].tolist())

    def _draw_below(self, n: int) -> int:
        return torch.randint(n, (1,), generator=self.generator).tolist()[0]

    def _trapezoid(self, rows: int) -> PathSample:
        config, n = self.config, self.config.nodes
        assert n is not None
        node = (self._draw_below(n - 1) + 1) / n
        end = 1 / (2 * n)
        if config.weights == "eq6":
            interior = 1 / n
        else:
            # Without f(0) its weight goes to the interior, so that a constant integrand keeps its integral.
            interior = (n - 1) / n + (0.0 if config.include_f0 else end)
        alphas, factors = [[node] * rows], [[interior] * rows]
        if config.include_f0:
            alphas.append([0.0] * rows)
            factors.append([end] * rows)
        return PathSample(alphas, factors, endpoint=end)

    def _gauss(self, rows: int) -> list[tuple[float, float]]:
        points, weights = gauss_legendre(self.config.nodes)  # type: ignore[arg-type]
        n, total = len(points), self.per_window * rows
        # As many nodes went before as this and the earlier windows have; earlier ones had as many rows, but for uneven batches.
        before = self._windows * total + self._planned
        self._planned += total
        turns = [(before + i) % n for i in range(total)]
        counts = [turns.count(k) for k in range(n)]
        # Where a window visits every node the factors make it the exact rule; else the rule holds over the windows.
        factor = [w * total / c if all(counts) else w * n for w, c in zip(weights, counts, strict=True)]
        return [(points[k], factor[k]) for k in turns]

    def _strata(self, rows: int) -> list[tuple[float, float]]:
        total = self.per_window * rows
        order = torch.randperm(total, generator=self.generator)
        jitter = torch.rand(total, generator=self.generator)
        return [(a, 1.0) for a in ((order + jitter) / total).tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Generator state (uint8 tensor), number of the window, its nodes so far and what is left of its plan."""
        return {
            "generator": self.generator.get_state(),
            "turn": self._windows,
            "planned": self._planned,
            "plan": [list(p) for p in self._plan],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken."""
        self.generator.set_state(state["generator"].to(torch.uint8).cpu())
        self._windows, self._planned = int(state["turn"]), int(state.get("planned", 0))
        self._plan = [(float(a), float(u)) for a, u in state["plan"]]


def gauss_legendre(n: int) -> tuple[list[float], list[float]]:
    """The n nodes and weights of the open Gauss-Legendre rule on [0, 1]; exact for polynomials up to degree 2n - 1."""
    points, weights = np.polynomial.legendre.leggauss(n)
    return ((points + 1) / 2).tolist(), (weights / 2).tolist()


def path_factors(alpha: float, path: str) -> tuple[float, float]:
    """(multiplier of Delta W in the forward, factor of the section-1 gradient) at ``alpha``.

    "delta": (alpha, 1), the paper's path. "factors": P, lambda and Q each scaled by alpha, differentiated through as the released
    code does: (alpha^3, alpha^3).
    """
    return (alpha, 1.0) if path == "delta" else (alpha**3, alpha**3)
