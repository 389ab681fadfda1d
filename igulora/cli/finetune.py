"""``igulora finetune``: a model, data and options into an adapter, its metrics and its pictures."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..config import CHOICES, IGUConfig
from ..errors import check_choice
from ..presets import PRESETS, get_preset
from ..training import demo
from ..training.data import DataSource
from ..training.extras import require
from ..training.run import DEMO, DataOptions, finetune
from ..training.settings import DTYPES, SCHEDULES, TASKS, RunSettings
from .options import DEVICE_HELP, add_fields, given

# The demo: about four minutes on two cores. A window of four micro-batches makes the scores ready after twelve steps.
DEMO_OUTPUT = "igulora-demo"
DEMO_SETTINGS: dict[str, Any] = {
    "batch_size": 4, "eval_batch_size": 16, "steps": 80, "max_length": 128, "lr": 1e-3, "log_every": 5, "eval_every": 0,
    "save_every": 0, "system_prompt": demo.SYSTEM_PROMPT,
}  # fmt: skip
DEMO_CONFIG: dict[str, Any] = {"r": 8, "target_rank": 4, "delta_t": 4}
DEMO_PATH: dict[str, Any] = {"window": 4, "ig_every": 2}
DEMO_ROWS = (320, 125)

_CONFIG_HELP = {
    "method": "how ranks are chosen: igu and adalora score and prune, flexlora and igu-flex move triplets between matrices, lora keeps "
    "them, ralora and ralora-pro do in blocks that are measured first, random and magnitude are controls",
    "blocks": "blocks of every adapter (block-diagonal); ranks are then those of a block. ralora and ralora-pro measure them",
    "block_pattern": "blocks of single modules, by name ending",
    "r": "triplets per matrix at the start",
    "target_rank": "triplets per matrix after pruning, on average (all of them for lora)",
    "lora_alpha": "the update is scaled by lora_alpha / r (default: r)",
    "target_modules": "all-linear, one regular expression over full names, or several name endings",
    "exclude_modules": "name endings to leave alone",
    "target_parameters": "endings of names of 3-D parameters of experts, such as experts.down_proj; each expert is a matrix",
    "modules_to_save": "name endings of modules to train whole (a classifier's head always is)",
    "rank_pattern": "ranks at the start of single modules, by name ending",
    "dropout": "on the adapters' inputs",
    "init": "start of the directions",
    "init_lambda": "start of the singular values",
    "estimator": "how the path integral is sampled",
    "path": "what is scaled along the path",
    "path_pass": "path rows in the training batch, or passes of their own",
    "nodes": "N of trapezoid and on-path, Gauss points of gauss",
    "weights": "the trapezoid's weights: appendix A.1 or the printed Eq. 6",
    "include_f0": "also sample the start of the path",
    "aggregate": "mean of gradients or of their sizes over a window",
    "window": "micro-batches per score update (M)",
    "ig_every": "sample the path in every k-th micro-batch",
    "recompute_inputs": "recompute the adapted layers' inputs from what is kept anyway: less memory, a little more time",
    "ig_fraction": "share of the sequences that are sampled",
    "beta1": "smoothing of the sensitivity",
    "beta2": "smoothing of its deviation",
    "eps": "added to the deviation",
    "combine": "sensitivity and deviation into a score",
    "lambda_score": "score of a singular value",
    "normalize": "the three terms of a triplet's score before they are added",
    "t_init": "steps before pruning starts",
    "t_final": "steps at the final ranks",
    "delta_t": "steps between allocations",
    "budget_unit": "what the budget counts",
    "min_rank": "triplets that every matrix keeps",
    "prune": "pruned triplets may grow back until the final phase (soft) or not (hard)",
    "orthogonality": "weight of the orthogonality penalty",
    "orthogonality_form": "penalise P P' - I as a whole or off its diagonal",
    "max_rank": "triplets that a matrix may have at most (flexlora, igu-flex; default: twice the rank at the start)",
    "moves": "matrices that lose a triplet, and that gain one, at the first adjustment (default: a quarter of them)",
    "importance": "what matrices are ranked by: the entropy or a norm of their singular values, or the mean score of their triplets",
    "direction": "triplets move (both), or are only lost or only gained",
    "new_directions": "vectors of a gained triplet: Gaussian (zero-impact), zero, or Gaussian made orthogonal to the others",
}
_RUN_HELP = {
    "task": "what the rows are",
    "lr": "learning rate of AdamW",
    "lambda_lr_ratio": "learning rate of the singular values over --lr",
    "weight_decay": "of directions and heads",
    "warmup": "fraction of the steps in which the learning rate rises",
    "schedule": "learning rate after that",
    "max_grad_norm": "clip gradients to this norm; 0 does not",
    "batch_size": "sequences per micro-batch",
    "eval_batch_size": "sequences per evaluation batch (default: twice --batch-size)",
    "accumulation_steps": "micro-batches per optimizer step",
    "epochs": "passes over the training rows",
    "steps": "optimizer steps, instead of --epochs",
    "max_length": "tokens; longer texts are cut",
    "dtype": "of the base model; auto is the one it is stored in",
    "gradient_checkpointing": "recompute activations in the backward pass: less memory, more time",
    "system_prompt": "system message before every prompt (causal-lm)",
    "seed": "of the start, the order of the rows and the samples",
    "align_batches": "micro-batches whose gradients are measured before a run (ralora, ralora-pro)",
    "align_max_blocks": "blocks that such a run may choose for a matrix at most, a power of two",
    "align_r_min": "least rank that ralora-pro may choose",
    "align_r_max": "largest rank that ralora-pro may choose (default: 4 r)",
    "eval_every": "steps between evaluations; 0 for none on the way (default: once an epoch)",
    "save_every": "steps between checkpoints; 0 for none",
    "log_every": "steps between lines of metrics.jsonl",
    "patience": "evaluations without improvement after pruning that end the run; 0 never does",
    "keep_checkpoints": "checkpoints to keep",
    "threads": "CPU threads of torch",
    "device": DEVICE_HELP,
    "trace": "modules (name endings) whose score series is drawn, or none (default: first, middle and last)",
}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``finetune`` with all of its options."""
    parser = subparsers.add_parser(
        "finetune",
        help="fine-tune a model; without arguments, SmolLM2-135M on BBC News",
        description="Fine-tune a model with adaptive ranks. Without arguments: SmolLM2-135M on BBC News, a few minutes on two cores.",
    )
    model = parser.add_argument_group("model and data")
    model.add_argument("--model", default=DEMO, help="folder, hub name, or demo: SmolLM2-135M-Instruct (default: demo)")
    model.add_argument(
        "--train", metavar="DATA", help="csv, jsonl or parquet file, or a hub data set (default: the demo's articles)"
    )
    model.add_argument(
        "--eval", metavar="DATA", help="the same for evaluation (default: --eval-fraction of the training rows)"
    )
    model.add_argument("--subset", metavar="NAME", help="configuration of a hub data set")
    model.add_argument(
        "--train-split", default="train", metavar="NAME", help="split of a hub data set (default: train)"
    )
    model.add_argument("--eval-split", metavar="NAME", help="split to evaluate on; of --train when --eval is not given")
    model.add_argument(
        "--eval-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help="rows held out; 0 for no evaluation (default: 0.1)",
    )
    model.add_argument("--limit-train", type=int, metavar="N", help="use the first N training rows")
    model.add_argument("--limit-eval", type=int, metavar="N", help="use the first N evaluation rows")
    columns = parser.add_argument_group("columns (default: the usual names)")
    columns.add_argument(
        "--text-column", nargs="+", metavar="NAME", help="text, or two for a pair (classification, regression)"
    )
    columns.add_argument("--label-column", metavar="NAME", help="class name or number (classification, regression)")
    columns.add_argument(
        "--prompt-column", nargs="+", metavar="NAME", help="prompt; several are joined by an empty line (causal-lm)"
    )
    columns.add_argument("--response-column", metavar="NAME", help="response (causal-lm)")
    run_group = parser.add_argument_group("run")
    run_group.add_argument(
        "--output", metavar="DIR", help=f"folder of the run (default for the demo's data: {DEMO_OUTPUT})"
    )
    run_group.add_argument(
        "--resume", action="store_true", help="go on from the latest checkpoint in --output, exactly"
    )
    run_group.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    run_group.add_argument("--preset", metavar="NAME", help=f"the paper's hyper-parameters: {', '.join(PRESETS)}")
    run_group.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_fields(run_group, RunSettings, {"task": TASKS, "dtype": DTYPES, "schedule": SCHEDULES}, _RUN_HELP)
    science = parser.add_argument_group("method (options left out take the method's default)")
    add_fields(science, IGUConfig, CHOICES, _CONFIG_HELP, skip=("seed", "total_steps"))
    return parser


def run(args: argparse.Namespace) -> None:
    """Run ``igulora finetune``."""
    data = data_options(args)
    settings, config = resolve(args, demo_data=data.train is None)
    output = args.output or (DEMO_OUTPUT if data.train is None else None)
    if output is None:
        raise ValueError("expected --output, the folder to write the adapter and metrics into, got none")
    console = None if args.quiet else require("rich.console", "demo", "the command line").Console()
    quieten_transformers()
    finetune(
        args.model, data, settings, config, Path(output), resume=args.resume, overwrite=args.overwrite, console=console
    )


def resolve(args: argparse.Namespace, demo_data: bool) -> tuple[RunSettings, dict[str, Any]]:
    """Settings and IGUConfig options: what was given, over the preset, over the demo's values, over the defaults."""
    run_given, config_given = given(args, RunSettings), given(args, IGUConfig)
    method = config_given.get("method", "igu")
    run_values = dict(DEMO_SETTINGS) if demo_data else {}
    config_values = dict(DEMO_CONFIG) | (DEMO_PATH if method in ("igu", "igu-flex") else {}) if demo_data else {}
    if args.preset:
        preset = get_preset(args.preset)
        run_values |= preset.run_options()
        config_values |= preset.config_options(method)
        if "estimator" in config_given and "nodes" not in config_given:
            config_values.pop("nodes", None)  # the paper's N belongs to its own estimator
        run_values.pop("steps", None)
    if "epochs" in run_given:
        run_values.pop("steps", None)
    if run_given.get("trace") == ("none",):
        run_given["trace"] = ()
    if "target_modules" in config_given:
        config_given["target_modules"] = _targets(config_given["target_modules"])
    config_given.pop("seed", None)
    return RunSettings(**{**run_values, **run_given}), {**config_values, **config_given}


def data_options(args: argparse.Namespace) -> DataOptions:
    """Where the rows come from, from the parsed options.

    Raises:
        ValueError: column options of another task, or evaluation data without training data.
    """
    task = getattr(args, "task", "causal-lm")
    check_choice("task", task, TASKS)
    wrong = ("text_column", "label_column") if task == "causal-lm" else ("prompt_column", "response_column")
    for name in wrong:
        if getattr(args, name):
            right = (
                "--prompt-column and --response-column" if task == "causal-lm" else "--text-column and --label-column"
            )
            raise ValueError(f"expected {right} for --task {task}, got --{name.replace('_', '-')}; or change --task")
    if args.train is None and (args.eval or args.eval_split):
        raise ValueError("expected --train with --eval, got evaluation data only; the demo has its own")
    for name in ("limit_train", "limit_eval"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"expected --{name.replace('_', '-')} of at least 1, got {getattr(args, name)}")
    if args.train is None:
        limits = (args.limit_train or DEMO_ROWS[0], args.limit_eval or DEMO_ROWS[1])
        return DataOptions(limit_train=limits[0], limit_eval=limits[1])
    train = DataSource(args.train, args.subset, args.train_split)
    evaluation = None
    if args.eval or args.eval_split:
        evaluation = DataSource(args.eval or args.train, args.subset, args.eval_split or "test")
    texts, target = args.text_column or args.prompt_column or (), args.label_column or args.response_column
    return DataOptions(train, evaluation, tuple(texts), target, args.eval_fraction, args.limit_train, args.limit_eval)


def quieten_transformers() -> None:
    """No progress bars and advice of transformers' between our own lines; its errors still come through."""
    logging = require("transformers.utils.logging", "demo", "fine-tuning")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _targets(values: list[str]) -> str | list[str]:
    """One value with the signs of a regular expression is one; anything else is name endings."""
    if len(values) == 1 and (values[0] == "all-linear" or not re.fullmatch(r"[\w.]+", values[0])):
        return values[0]
    return list(values)
