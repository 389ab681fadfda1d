"""One run of a study: a method trains a model on a task, and is evaluated on rows that it has not seen."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..recipes import learner
from .configuring import recipe, start_seed
from .inspection import removal, watched
from .plan import MethodSpec, Run, Training
from .tasks import Prepared


def factor(step: int, steps: int, warmup: float) -> float:
    """Of the learning rate at a step: a rise over the first ``warmup`` of them, then a line to zero."""
    rising = max(int(warmup * steps), 1)
    return min((step + 1) / rising, (steps - step) / max(steps - rising, 1))


def train(run: Run, method: MethodSpec, training: Training, task: Prepared) -> dict[str, Any]:
    """Train once: metrics on validation and test rows, wall time."""
    started = time.perf_counter()
    start = start_seed(run, training)
    batches = task.batches(training, 0 if training.varies == "start" else run.seed)
    base, heads = task.model(training, start)
    torch.manual_seed(start)  # after the model, which draws its head where it is made for the first time
    begin = time.perf_counter()
    made = learner(recipe(run, method, training), base.train(), heads, task.loss, batches)
    rates = [group["lr"] for group in made.optimizer.param_groups]
    at_start = made.trained()
    for step, batch in enumerate(batches):
        for group, rate in zip(made.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step, training.steps, training.warmup)
        made.step(batch)
    seconds = time.perf_counter() - begin
    found = {
        "metric": task.metric,
        "validation": task.evaluate(made.model, task.validation),
        "test": task.evaluate(made.model, task.test),
        "seconds": seconds,
        "trained_at_start": at_start,
        "trained_at_end": made.trained(),
        "ranks": made.ranks(),
    }
    if made.controller is not None and made.controller.config.scored:
        stats = made.controller.importance.module_stats()["score"].tolist()
        found["scores"] = dict(zip(found["ranks"], stats, strict=True))
    if made.controller is not None and training.watch:
        found["series"] = watched(made.controller.series, training.watch)
    if made.controller is not None and training.remove:
        found["removed"] = removal(made.model, task, training.remove)
    return found | {"seconds_in_all": time.perf_counter() - started}
