"""One run of a study: a method trains a model on a task, and is evaluated on rows that it has not seen."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import igulora
from igulora.bank import find_bank
from igulora.training.loop import BatchStream
from igulora.training.report import trainable_parameters

from .plan import Budget, MethodSpec, Run, Training
from .tasks import Prepared

_ALIGN_BATCHES = 8
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Learner:
    """A method at work.

    Attributes:
        step: one optimizer step on a batch. optimizer: whose learning rate a schedule sets.
        trainable: parameters that train at the start.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Any], None]
    trainable: int


def learner(
    method: MethodSpec,
    base: nn.Module,
    heads: list[str],
    budget: Budget,
    training: Training,
    rate: float,
    seed: int,
    loss: Loss,
    batches: list[Any],
) -> Learner:
    """A copy of ``base`` under a method; ``batches`` are those it will train on, for methods that measure before."""
    model = copy.deepcopy(base).train()
    make = _peft if method.library == "peft" else _ours
    return make(method, model, heads, budget, training, rate, seed, loss, batches)


def _schedule(training: Training, window: int) -> dict[str, int]:
    """Pruning from the third window, or a tenth of the run, to four fifths of it, every second step."""
    first = max(training.steps // 10, 3 * window + 1)
    return {"total_steps": training.steps, "t_init": first, "t_final": training.steps // 5, "delta_t": 2}


def _ours(
    method: MethodSpec,
    model: nn.Module,
    heads: list[str],
    budget: Budget,
    training: Training,
    rate: float,
    seed: int,
    loss: Loss,
    batches: list[Any],
) -> Learner:
    options: dict[str, Any] = {
        "r": budget.r, "target_rank": budget.target, "modules_to_save": heads, "seed": seed, **method.options,
    }  # fmt: skip
    pruning = method.method not in ("lora", "ralora", "ralora-pro")
    if pruning:
        own = igulora.IGUConfig(method.method, total_steps=10**6).window
        options.setdefault("window", min(own or 1, training.window))
        options = _schedule(training, options["window"]) | options
    if method.method in ("ralora", "ralora-pro") and not {"blocks", "block_pattern"} & options.keys():
        pro = method.method == "ralora-pro"
        found = igulora.align(
            model,
            batches[:_ALIGN_BATCHES],
            lambda b: loss(model, b),
            r=budget.target,
            pro=pro,
            exclude_modules=heads,
            seed=seed,
        )
        options["block_pattern"] = found.blocks
        if pro:
            options["rank_pattern"] = found.ranks
    igulora.adapt(model, igulora.IGUConfig(method.method, **options))
    groups = igulora.param_groups(model, lr=rate, weight_decay=training.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    controller = igulora.Controller(model, optimizer=optimizer)

    def step(batch: Any) -> None:
        controller.backward(lambda b: loss(model, b), batch)
        optimizer.step()
        controller.step()
        optimizer.zero_grad()

    return Learner(model, optimizer, step, trainable_parameters(model, find_bank(model).ranks()))


def _peft(
    method: MethodSpec,
    model: nn.Module,
    heads: list[str],
    budget: Budget,
    training: Training,
    rate: float,
    seed: int,
    loss: Loss,
    batches: list[Any],
) -> Learner:
    import peft

    shared = {"target_modules": "all-linear", "modules_to_save": heads, "exclude_modules": heads, **method.options}
    adaptive = method.method == "adalora"
    if adaptive:
        times = _schedule(training, 1)
        config: Any = peft.AdaLoraConfig(
            init_r=budget.r, target_r=budget.target, lora_alpha=budget.r, total_step=times["total_steps"], tinit=times["t_init"],
            tfinal=times["t_final"], deltaT=times["delta_t"], **shared,
        )  # fmt: skip
    else:
        dora = method.method == "dora"
        config = peft.LoraConfig(r=budget.target, lora_alpha=budget.target, use_dora=dora, **shared)
    wrapped = peft.get_peft_model(model, config)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=training.weight_decay, fused=True)
    taken = 0

    def step(batch: Any) -> None:
        nonlocal taken
        value = loss(wrapped, batch)
        if adaptive:
            value = value + peft_penalty(wrapped, config.orth_reg_weight)
        value.backward()
        optimizer.step()
        if adaptive:
            wrapped.base_model.update_and_allocate(taken)
        taken += 1
        optimizer.zero_grad()

    return Learner(wrapped, optimizer, step, sum(p.numel() for p in trained))


def peft_penalty(model: nn.Module, weight: float) -> Tensor:
    """The orthogonality penalty of PEFT's AdaLoRA, which it adds only to a loss that the model itself returns."""
    total, count = torch.zeros(()), 0
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.t() if "lora_A" in name else p.t() @ p
            total, count = total + torch.linalg.matrix_norm(gram - torch.eye(len(gram))), count + 1
    return weight * total / max(count, 1)


def factor(step: int, steps: int, warmup: float) -> float:
    """Of the learning rate at a step: a rise over the first ``warmup`` of them, then a line to zero."""
    rising = max(int(warmup * steps), 1)
    return min((step + 1) / rising, (steps - step) / max(steps - rising, 1))


def train(run: Run, method: MethodSpec, training: Training, task: Prepared) -> dict[str, Any]:
    """Train once: metrics on validation and test rows, wall time. The seed draws the head, the start, the order of rows and the samples."""
    started = time.perf_counter()
    stream = BatchStream(len(task.train), training.rows, seed=run.seed)
    batches = [task.collate(task.train, stream[k]) for k in range(training.steps)]
    base, heads = task.model(run.seed)
    torch.manual_seed(run.seed)  # after the model, which draws its head where it is made for the first time
    made = learner(method, base, heads, run.budget, training, run.learning_rate, run.seed, task.loss, batches)
    rates = [group["lr"] for group in made.optimizer.param_groups]
    begin = time.perf_counter()
    for step, batch in enumerate(batches):
        for group, rate in zip(made.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step, training.steps, training.warmup)
        made.step(batch)
    seconds = time.perf_counter() - begin
    return {
        "metric": task.metric,
        "validation": task.evaluate(made.model, task.validation),
        "test": task.evaluate(made.model, task.test),
        "seconds": seconds,
        "seconds_in_all": time.perf_counter() - started,
        "trainable": made.trainable,
    }
