"""The budget schedule b(t) (ALGORITHMS 2.4; AdaLoRA's cubic) and when allocations are due."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = ("warmup", "pruning", "final")


class _Times:
    """Where in a run a step lies: nothing happens up to t_i, ranks change until T - t_f and are fixed from there on."""

    t_init: int
    t_end: int
    delta_t: int

    def phase(self, step: int) -> str:
        """ "warmup" (ranks are those at the start), "pruning" (they change) or "final" (they are fixed)."""
        if step <= self.t_init:
            return "warmup"
        return "pruning" if step < self.t_end else "final"

    @property
    def first_allocation(self) -> int:
        """Step of the first allocation."""
        due = (self.t_init // self.delta_t + 1) * self.delta_t
        return min(due, self.t_end)


@dataclass(frozen=True)
class BudgetSchedule(_Times):
    """``b(t) = b_target + (b_init - b_target)(1 - (t - t_i)/(T - t_f - t_i))^3`` between t_i and T - t_f, every ``delta_t`` steps.

    Args:
        initial, target: budget before and after, in triplets or in parameters.
        t_init, t_end, delta_t: t_i, T - t_f and the allocation interval, in optimizer steps.
    """

    initial: int
    target: int
    t_init: int
    t_end: int
    delta_t: int

    def budget(self, step: int) -> int:
        """b(step), rounded down as AdaLoRA does."""
        if step <= self.t_init:
            return self.initial
        if step >= self.t_end:
            return self.target
        left = 1 - (step - self.t_init) / (self.t_end - self.t_init)
        return int((self.initial - self.target) * left**3 + self.target)

    def is_due(self, step: int) -> bool:
        """Whether triplets are allocated after ``step``."""
        return step == self.t_end or (self.t_init < step < self.t_end and step % self.delta_t == 0)


@dataclass(frozen=True)
class ExchangeSchedule(_Times):
    """``b(t) = round(b0 (1 - (t - t_i)/(T - t_f))^3)``: how many triplets are lost, and gained, at an adjustment (ALGORITHMS 4; FlexLoRA).

    0 outside t_i < t < T - t_f. The denominator is the source's: something is left to move at the end.

    Args:
        moves: b0, triplets at the beginning.
        t_init, t_end, delta_t: t_i, T - t_f and the interval of adjustments, in optimizer steps.
    """

    moves: int
    t_init: int
    t_end: int
    delta_t: int

    def moves_at(self, step: int) -> int:
        """b(step), rounded half up."""
        if not self.t_init < step < self.t_end:
            return 0
        left = max(1 - (step - self.t_init) / self.t_end, 0.0)
        return int(self.moves * left**3 + 0.5)

    def is_due(self, step: int) -> bool:
        """Whether triplets move after ``step``."""
        return step % self.delta_t == 0 and self.moves_at(step) > 0
