"""One run of a study: a method trains a model on a task, and is evaluated on rows that it has not seen."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch

import igulora
from igulora.errors import check_choice

from ..recipes import FIXED, Recipe, learner, our_config, peft_config
from .extras import removal, watched
from .plan import MethodSpec, Run, Study, Training
from .tasks import Prepared


def _schedule(training: Training, window: int) -> dict[str, int]:
    """Pruning from the third window, or a tenth of the run, to four fifths of it, every second step."""
    first = max(training.steps // 10, 3 * window + 1)
    return {"total_steps": training.steps, "t_init": first, "t_final": training.steps // 5, "delta_t": 2}


def recipe(run: Run, method: MethodSpec, training: Training) -> Recipe:
    """What a run's method trains with."""
    window, options = 1, dict(method.options)
    if method.library == "igulora" and method.method not in FIXED:
        own = igulora.IGUConfig(method.method, total_steps=10**6).window
        window = options.setdefault("window", min(own or 1, training.window))
    return Recipe(
        method.library,
        method.method,
        *run.budget,
        schedule=_schedule(training, window),
        rate=run.learning_rate,
        seed=run.seed,
        optimizer={"weight_decay": training.weight_decay, **method.optimizer},
        options=options,
        trace=training.watch > 0,
    )


def check(study: Study) -> None:
    """Whether all methods of a study can be configured, before any of them runs.

    Raises:
        ValueError: an option is unknown or does not fit (names the method).
        ImportError: a method's library is not installed.
    """
    for name, method in study.methods.items():
        known = inspect.signature(igulora.param_groups if method.library == "igulora" else torch.optim.AdamW).parameters
        for option in method.optimizer:
            check_choice(f"optimizer of [methods.{name}]", option, known)
        for budget in study.budgets_of(name):
            run = Run("", name, budget, study.learning_rates[0], study.seeds[0])
            try:
                made = recipe(run, method, study.training_of(name))
                our_config(made, []) if method.library == "igulora" else peft_config(made, [])
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"expected options of [methods.{name}] that fit r {budget.r} to {budget.target}: {error}"
                ) from error


def factor(step: int, steps: int, warmup: float) -> float:
    """Of the learning rate at a step: a rise over the first ``warmup`` of them, then a line to zero."""
    rising = max(int(warmup * steps), 1)
    return min((step + 1) / rising, (steps - step) / max(steps - rising, 1))


def train(run: Run, method: MethodSpec, training: Training, task: Prepared) -> dict[str, Any]:
    """Train once: metrics on validation and test rows, wall time. The seed draws the head, the start, the order of rows and the samples."""
    started = time.perf_counter()
    batches = task.batches(training, run.seed)
    base, heads = task.model(training, run.seed)
    torch.manual_seed(run.seed)  # after the model, which draws its head where it is made for the first time
    made = learner(recipe(run, method, training), base.train(), heads, task.loss, batches)
    rates = [group["lr"] for group in made.optimizer.param_groups]
    begin = time.perf_counter()
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
        "trainable": made.trainable,
        "ranks": made.ranks(),
    }
    if made.controller is not None and training.watch:
        found["series"] = watched(made.controller.series, training.watch)
    if made.controller is not None and training.remove:
        found["removed"] = removal(made.model, task, training.remove)
    return found | {"seconds_in_all": time.perf_counter() - started}
