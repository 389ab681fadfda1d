"""One fine-tuning run from data to report; what ``igulora finetune`` calls."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapt import adapt
from ..bank import find_bank
from ..config import IGUConfig
from ..files import write_json
from ..saved_adapter import save_adapter
from . import demo
from .aligning import check_alignment_asked, measure, read_alignment, wants_alignment, with_alignment, write_alignment
from .causal_lm import CausalLM, closed_set
from .data import DataSource, Example, class_names, hold_out, load_table, read_examples
from .loop import CHECKPOINTS, Trainer
from .modeling import load_causal_lm, load_sequence_model, load_tokenizer
from .move_plots import has_moves, plot_moves
from .output import RUN_FILE, check_output, check_same_run, clear_output
from .plots import plot_budget, plot_ranks, plot_series
from .progress import MetricsFile, read_metrics
from .report import Report, peak_memory, trainable_parameters
from .settings import RESUMABLE, RunSettings, find_device
from .tasks import Classification, Regression, Task

DEMO = "demo"


@dataclass(frozen=True)
class DataOptions:
    """Which rows a run learns from and is tested on.

    ``train`` None is the demo's data set, BBC News. Without ``evaluation``, ``eval_fraction`` of the training rows are held out
    (0: no evaluation). ``limit_train`` and ``limit_eval`` keep the first rows of each only; for the demo they say how many
    articles.
    """

    train: DataSource | None = None
    evaluation: DataSource | None = None
    text_columns: tuple[str, ...] = ()
    target_column: str | None = None
    eval_fraction: float = 0.1
    limit_train: int | None = None
    limit_eval: int | None = None


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, its report, and where its pictures are."""

    output: Path
    report: Report
    pictures: tuple[Path, ...]
    stopped_early: bool


def finetune(
    model_name: str,
    data: DataOptions,
    settings: RunSettings,
    igu_options: dict[str, Any],
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Any = None,
) -> RunResult:
    """Fine-tune ``model_name`` and write adapter, metrics, pictures and report into ``output``.

    Args:
        model_name: folder, hub name, or "demo" for SmolLM2-135M.
        data: which rows.
        settings: how to train.
        igu_options: fields of :class:`igulora.IGUConfig`; ``total_steps``, the seed and the head's modules are filled in.
        output: the run's folder.
        resume: go on from its latest checkpoint, exactly. overwrite: replace the run in it.
        console: a ``rich.console.Console``, or None to say nothing.

    Raises:
        ValueError, TypeError: an option, the data or the model does not fit; before anything in ``output`` changes.
        Interrupted, NonFiniteLoss: see :class:`Trainer`; a checkpoint is kept.
        MissingExtra: an optional package is missing.
    """
    started = time.perf_counter()
    check_output(output, resume, overwrite)
    device = find_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    train, evaluation = read_data(model_name, data, settings)
    steps = total_steps(len(train), settings)
    config = IGUConfig(**{**igu_options, "total_steps": steps, "seed": settings.seed})
    check_alignment_asked(config, settings)
    description = {
        "model": model_name,
        "data": asdict(data) | {"text_columns": list(data.text_columns)},
        "settings": settings.to_dict(),
        "config": config.to_dict(),
    }
    if resume:
        usual = {"settings": RunSettings().to_dict(), "config": IGUConfig(config.method, total_steps=10**6).to_dict()}
        check_same_run(output, description, RESUMABLE, usual)
    torch.manual_seed(settings.seed)
    model, task, heads = load_model(model_name, train, evaluation, settings, console)
    if heads:
        config = IGUConfig(**{**config.to_dict(), "modules_to_save": [*config.modules_to_save, *heads]})
    train_rows, eval_rows = task.encode(train), task.encode(evaluation)
    model = model.to(device)
    layers = None
    if wants_alignment(config):
        if not resume:
            _say(console, f"Measuring the gradients of the first {settings.align_batches} batches")
        layers = read_alignment(output) if resume else measure(config, model, task, train_rows, settings)
        config = with_alignment(config, layers)
    adapt(model, config)
    trainer = Trainer(model, task, train_rows, eval_rows, steps, settings, output, console)
    if resume:
        extra = trainer.resume()
        _say(console, f"Resumed {output} at step {trainer.step} of {steps}")
    else:
        trained = trainable_parameters(model, trainer.controller.live_ranks())
        extra = {"trainable": trained, "triplets": trainer.live, "seconds": 0.0, "before": {}}
        if eval_rows:
            _say(console, f"Evaluating the model as it is on {len(eval_rows)} held-out rows")
            extra["before"] = trainer.evaluate()
            _say(console, _metrics_line(extra["before"]))
        clear_output(output)
        write_json(output / RUN_FILE, description)
        if layers is not None:
            write_alignment(layers, output)
    modules = len(find_bank(model).names)
    _say(
        console,
        f"Training {modules} modules, {extra['triplets']} triplets, {extra['trainable']:,} parameters with "
        f"method {config.method}: {steps} steps of {settings.batch_size * settings.accumulation_steps} sequences, "
        f"{len(train_rows)} rows",
    )
    before_loop = time.perf_counter()
    extra["seconds"] += before_loop - started
    outcome = trainer.run(extra, resumed=resume)
    save_adapter(model, output, trainer.controller)  # before the evaluation, which may be interrupted
    after = trainer.evaluate() if eval_rows else {}
    if after:
        MetricsFile(output / "metrics.jsonl", outcome.step).write("eval", outcome.step, **after)
    ranks = trainer.controller.live_ranks()
    report = Report(
        metric=task.metric,
        before=extra["before"],
        after=after,
        trainable_before=extra["trainable"],
        trainable_after=trainable_parameters(model, ranks),
        triplets_before=extra["triplets"],
        triplets_after=sum(ranks.values()),
        steps=outcome.step,
        step_seconds=outcome.step_seconds,
        peak_memory=peak_memory(trainer.device),
        seconds=extra["seconds"] + time.perf_counter() - before_loop,
    )
    pictures = draw(trainer, ranks, config, output)
    write_json(output / "report.json", asdict(report) | {"best": outcome.best, "best_step": outcome.best_step})
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    if console is not None:
        report.show(console)
        if outcome.best and outcome.best_step != outcome.step:
            _say(
                console,
                f"Best evaluation after pruning: {_metrics_line(outcome.best)} at step {outcome.best_step}, in {output / 'best'}",
            )
        _say(console, f"Adapter, metrics and pictures are in {output}; see: igulora inspect {output}")
    return RunResult(output, report, pictures, outcome.stopped_early)


def read_data(model_name: str, data: DataOptions, settings: RunSettings) -> tuple[list[Example], list[Example]]:
    """Training and evaluation rows.

    Raises:
        ValueError: see :func:`load_table` and :func:`read_examples`; or a model other than the demo's has no data.
    """
    if data.train is None:
        if model_name != DEMO:
            raise ValueError(
                f"expected training data for the model {model_name!r}, got none; give --train a file or a hub data set"
            )
        if settings.task != "causal-lm":
            raise ValueError(
                f"expected task causal-lm for the demo's articles, got {settings.task!r}; or give --train a file"
            )
        return demo.bbc_examples(data.limit_train or 1500, data.limit_eval or 300, settings.seed)

    def read(source: DataSource) -> list[Example]:
        return read_examples(load_table(source), settings.task, source.name, data.text_columns, data.target_column)

    train = read(data.train)
    if data.evaluation is not None:
        evaluation = read(data.evaluation)
    elif data.eval_fraction:
        train, evaluation = hold_out(train, data.eval_fraction, settings.seed)
    else:
        evaluation = []
    return train[: data.limit_train], evaluation[: data.limit_eval]


def total_steps(rows: int, settings: RunSettings) -> int:
    """Optimizer steps of a run: ``steps``, or what ``epochs`` passes over ``rows`` rows take."""
    if settings.steps is not None:
        return settings.steps
    micro_batches = math.ceil(rows / settings.batch_size)
    return max(1, math.ceil(settings.epochs * micro_batches / settings.accumulation_steps))


def load_model(
    name: str, train: Sequence[Example], evaluation: Sequence[Example], settings: RunSettings, console: Any = None
) -> tuple[nn.Module, Task, list[str]]:
    """The base model, its task and the names of the modules of a fresh head.

    Raises:
        ValueError: the model cannot be loaded, or the classes of the evaluation rows are not those of the training rows.
    """
    heads: list[str] = []
    task: Task
    if settings.task == "causal-lm":
        if name == DEMO:
            model, tokenizer = demo.load_smollm2(say=lambda text: _say(console, text))
            if settings.dtype != "auto":
                model = model.to(getattr(torch, settings.dtype))
        else:
            tokenizer = load_tokenizer(name)
            model = load_causal_lm(name, settings.dtype)
        choices = closed_set(train, evaluation)
        task = CausalLM(tokenizer, model, settings.max_length, settings.system_prompt, choices)
    elif name == DEMO:
        raise ValueError(
            f"expected task causal-lm for the demo model, got {settings.task!r}; name an encoder with --model"
        )
    else:
        classes = class_names(train, evaluation) if settings.task == "classification" else None
        tokenizer = load_tokenizer(name)
        model, heads = load_sequence_model(name, settings.dtype, classes, tokenizer)
        if classes is None:
            task = Regression(tokenizer, settings.max_length)
        else:
            task = Classification(tokenizer, settings.max_length, classes)
    if settings.gradient_checkpointing:
        # transformers renamed it; where both are there the older name warns.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, task, heads


def draw(trainer: Trainer, ranks: dict[str, int], config: IGUConfig, output: Path) -> tuple[Path, ...]:
    """The run's pictures: ranks, budget and loss, and the traced modules' series."""
    controller = trainer.controller
    start = {name: config.rank_at_start(name) for name in ranks}
    pictures = [
        plot_ranks(ranks, start, output / "ranks.png"),
        plot_budget(read_metrics(output / "metrics.jsonl"), controller.history, output / "budget.png"),
    ]
    if has_moves(controller.history):
        pictures.append(plot_moves(controller.history, start, output / "moves.png"))
    if any(controller.series.values()):
        pictures.append(plot_series(controller.series, output / "series.png"))
    return tuple(pictures)


def _metrics_line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _say(console: Any, text: str) -> None:
    if console is not None:
        console.print(text, highlight=False)
