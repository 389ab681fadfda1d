"""What each method of a study trains with, and whether all of it fits before anything runs."""

from __future__ import annotations

import inspect

import torch

import igulora
from igulora.config import BIDIRECTIONAL, FIXED_RANK, METHODS
from igulora.errors import check_choice

from ..recipes import Recipe, our_config, peft_config
from .plan import MethodSpec, Run, Study, Training


def _schedule(training: Training) -> dict[str, int]:
    """When ranks change, in all methods alike: as the study says, or as IGU-LoRA does by default."""
    names = ("t_init", "t_final", "delta_t")
    given = {name: getattr(training, name) for name in names}
    filled = igulora.IGUConfig(total_steps=training.steps, window=training.window, **given)
    return {"total_steps": training.steps} | {name: getattr(filled, name) for name in names}


def start_seed(run: Run, training: Training) -> int:
    """What draws the head, the adapters' start and the nodes; the order of rows has the run's own."""
    return 0 if training.varies == "order" else run.seed


def recipe(run: Run, method: MethodSpec, training: Training) -> Recipe:
    """What a run's method trains with."""
    options = dict(method.options)
    if method.library == "igulora" and method.method not in FIXED_RANK:
        options.setdefault("window", min(METHODS[method.method]["window"], training.window))
        if method.method not in BIDIRECTIONAL:
            options.setdefault("budget_unit", training.budget_unit)
    return Recipe(
        method.library,
        method.method,
        *run.budget,
        schedule=_schedule(training),
        rate=run.learning_rate,
        seed=start_seed(run, training),
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
        taken = inspect.signature(igulora.param_groups if method.library == "igulora" else torch.optim.AdamW).parameters
        for option in method.optimizer:
            check_choice(
                f"optimizer of [methods.{name}]", option, sorted(set(taken) - {"model", "params", "lr", "fused"})
            )
        for budget in study.budgets_of(name):
            run = Run("", name, budget, study.learning_rates[0], study.seeds[0])
            try:
                made = recipe(run, method, study.training_of(name))
                our_config(made, []) if method.library == "igulora" else peft_config(made, [])
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"expected options of [methods.{name}] that fit r {budget.r} to {budget.target}: {error}"
                ) from error
