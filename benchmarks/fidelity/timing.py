"""What path rows cost in time: whole training steps with and without them, in turns; and a forecast of the study's own duration."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from igulora.bank import find_bank
from igulora.controller import Controller
from igulora.optim import param_groups

from ..ratios import quartiles
from .problem import Problem
from .settings import Setting, Study


def time_kinds(
    problem: Problem, study: Study, settings: Sequence[Setting], say: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds of a training step of every kind, one of each per round, in an order that alternates.

    A step is ``Controller.backward`` (mixed batches), fused AdamW at learning rate 0 (the point stays where it is), ``Controller.step``
    and ``zero_grad``. Nothing is pruned.

    Returns:
        Per kind the quartiles of its steps' ratios, round by round, to the step without path rows; and all seconds.
    """
    model = problem.model.train()
    base = model.igulora_config
    optimizer = torch.optim.AdamW(param_groups(model, lr=1.0), fused=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    controllers: dict[str, Controller] = {}
    kept = {setting.kind: setting.timed_as for setting in settings if setting.kind != "plain"}
    try:
        for kind, setting in kept.items():
            model.igulora_config = dataclasses.replace(setting.config(base, 0), path_pass="mixed")
            controllers[kind] = Controller(model)
    finally:
        model.igulora_config = base

    def step(controller: Controller, position: int, batch: Any) -> float:
        controller.passes.in_window = position
        gc.collect()
        start = time.perf_counter()
        controller.backward(problem.loss, batch)
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    plain = next(controllers[kind] for kind in controllers if kind.startswith("rows"))
    steps = {"plain": (plain, 1), **{kind: (controller, 0) for kind, controller in controllers.items()}}
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    batch = problem.batch(study.steps)
    for turn in range(-1, study.rounds):  # turn -1 warms up
        for kind in list(steps) if turn % 2 else reversed(list(steps)):
            taken = step(*steps[kind], batch)
            if turn >= 0:
                seconds[kind].append(taken)
        say(f"  timing: round {turn + 1} of {study.rounds}" if turn >= 0 else "  timing: warmed up")
    model.eval()
    find_bank(model).context.unstepped = 0
    return {
        "rounds": study.rounds,
        "over_plain": {
            kind: quartiles([a / b for a, b in zip(series, seconds["plain"], strict=True)])
            for kind, series in seconds.items()
        },
        "seconds": seconds,
    }


class Forecast:
    """How long passes take on this machine, and from that how long what is left will take.

    Args:
        problem, study: a pass of one sequence and one of a whole micro-batch are timed.
    """

    def __init__(self, problem: Problem, study: Study) -> None:
        context = find_bank(problem.model).context
        batch = problem.batch(study.steps)
        one = {name: tensor[:1] for name, tensor in batch.items()}

        def taken(part: dict[str, torch.Tensor]) -> float:
            times = []
            for _ in range(3):
                start = time.perf_counter()
                problem.loss(part).backward()
                times.append(time.perf_counter() - start)
                context.unstepped = 0
            problem.model.zero_grad()
            return min(times)

        single, whole = taken(one), taken(batch)
        self.per_row = max(whole - single, 0.0) / max(study.rows - 1, 1)
        self.per_pass = max(single - self.per_row, 0.0)
        self._planned = self._spent = 0.0
        self._drift = 1.0

    def seconds(self, passes: Sequence[tuple[int, int]]) -> float:
        """Of (number of passes, sequences in each)."""
        return sum(count * (self.per_pass + rows * self.per_row) for count, rows in passes)

    def note(self, planned: float, spent: float) -> None:
        """A piece of work planned at ``planned`` seconds took ``spent``: later ones are scaled by what all of them took."""
        self._planned, self._spent = self._planned + planned, self._spent + spent
        if self._planned > 0:
            self._drift = self._spent / self._planned

    def left(self, planned: float) -> str:
        """``planned`` seconds in words, by the experience so far."""
        seconds = max(planned, 0.0) * self._drift
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
