"""The methods of the family beside PEFT's, on MiniLM and movie reviews: does each learn, and what does its step cost.

    python -m igulora.benchmarks.family              # half an hour on two cores; results/family/<date>-<machine>.json, README.md

All methods train side by side on the same batches, a step of each in turn, in alternating order; a time is that of a block of steps as long
as a scoring window, so that all kinds of step take part by their share, and ratios are taken block by block.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from igulora.cli.finetune import quieten_transformers
from igulora.training.demo import minilm_folder
from igulora.training.loop import BatchStream
from igulora.training.modeling import load_sequence_model, load_tokenizer
from igulora.training.tasks import Classification, Regression

from . import allocator
from .machine import RESULTS, circumstances
from .pages import keep, place, table
from .ratios import Times, quartiles
from .recipes import Recipe, learner
from .reviews import TASKS, examples

FOLDER = RESULTS / "family"
OURS = ("igu", "adalora", "lora", "flexlora", "igu-flex", "ralora", "ralora-pro")
PEFT = ("peft-lora", "peft-adalora")


@dataclass(frozen=True)
class Plan:
    """What is trained: ranks, batches, steps; the adaptive methods' schedule follows from the steps."""

    r: int = 8
    target_rank: int = 4
    rows: int = 16
    length: int = 64
    steps: int = 240
    held_out: int = 1000
    lr: float = 2e-3
    window: int = 16

    @property
    def schedule(self) -> dict[str, int]:
        """An allocation every second step from a quarter of the run to three quarters."""
        return {"total_steps": self.steps, "t_init": self.steps // 4, "t_final": self.steps // 4, "delta_t": 2}


def recipe(name: str, plan: Plan) -> Recipe:
    """What a method of the study trains with, each library's other defaults as they are."""
    method = name.removeprefix("peft-")
    options = {"window": plan.window} if name in ("igu", "igu-flex") else {}
    library = "peft" if name in PEFT else "igulora"
    return Recipe(library, method, plan.r, plan.target_rank, plan.schedule, plan.lr, options=options)


def run(task_name: str, plan: Plan, methods: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Train all methods on one task; metrics before and after, times by block."""
    folder = str(minilm_folder())
    tokenizer = load_tokenizer(folder)
    train, held_out = examples(task_name, plan.held_out)
    classes = ["negative", "positive"] if task_name == "polarity" else None
    torch.manual_seed(0)
    base, heads = load_sequence_model(folder, "float32", classes, tokenizer)
    task: Any = (
        Regression(tokenizer, plan.length) if classes is None else Classification(tokenizer, plan.length, classes)
    )
    rows, tests = task.encode(train), task.encode(held_out)
    stream = BatchStream(len(rows), plan.rows, seed=0)
    batches = [task.collate([rows[i] for i in stream[k]]) for k in range(plan.steps)]
    device = torch.device("cpu")
    before = task.evaluate(base, tests, 64, device)
    learners = {
        name: learner(recipe(name, plan), copy.deepcopy(base).train(), heads, task.loss, batches) for name in methods
    }
    trainable = {name: made.trained() for name, made in learners.items()}
    times: Times = {name: [] for name in methods}
    for start in range(0, plan.steps, plan.window):
        for name in methods if start // plan.window % 2 else reversed(methods):
            gc.collect()
            begin = time.perf_counter()
            for batch in batches[start : start + plan.window]:
                learners[name].step(batch)
            times[name].append((time.perf_counter() - begin) / len(batches[start : start + plan.window]))
        say(f"{task_name}: step {min(start + plan.window, plan.steps)}/{plan.steps}")
    after = {name: task.evaluate(made.model, tests, 64, device) for name, made in learners.items()}
    settled = {name: series[2:] for name, series in times.items()}  # first calls make plans and tables
    return {
        "metric": task.metric,
        "before": before,
        "after": after,
        "seconds": times,
        "step": {name: quartiles(series) for name, series in settled.items()},
        "over_igu": {
            name: quartiles([a / b for a, b in zip(series, settled["igu"], strict=True)])
            for name, series in settled.items()
            if name != "igu"
        },
        "trainable": trainable,
    }


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "# The family on MiniLM and movie reviews",
        "",
        "Made by `python -m igulora.benchmarks.family`; one seed, a short run: it shows that each method learns and what its step costs, "
        "not which learns best.",
        "",
        place(record),
        "",
    ]
    for name, result in record["tasks"].items():
        metric = result["metric"]
        lines += [f"## {name.capitalize()}: {metric} {result['before'][metric]:.3f} before training", ""]
        found = []
        for method, step in result["step"].items():
            over = result["over_igu"].get(method)
            ratio = "1" if over is None else f"{over['median']:.2f} ({over['q1']:.2f} to {over['q3']:.2f})"
            found.append(
                [f"`{method}`", f"{result['after'][method][metric]:.3f}", f"{step['median'] * 1e3:.0f}", ratio,
                 f"{result['trainable'][method]:,}"]
            )  # fmt: skip
        lines += [
            table(
                ["method", f"{metric} after", "ms per step", "over `igu` (quartiles)", "trained at the start"], found
            ),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Plan.steps, help=f"optimizer steps (default {Plan.steps})")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--methods", nargs="+", choices=(*OURS, *PEFT), default=[*OURS, *PEFT], metavar="METHOD")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the record and its page")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    allocator.keep_freed_memory()
    quieten_transformers()
    plan = Plan(steps=options.steps)
    methods = list(dict.fromkeys(["igu", *options.methods]))
    record: dict[str, Any] = {
        **circumstances(),
        "plan": {**vars(plan), **plan.schedule},
        "tasks": {name: run(name, plan, methods, print) for name in TASKS},
    }
    keep(record, page(record), options.output)
    print(page(record))


if __name__ == "__main__":
    main()
