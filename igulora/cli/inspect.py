"""``igulora inspect``: ranks, scores and the budget's history of an adapter, as tables and as a picture."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from ..adapter_file import AdapterFile, read_adapter
from ..training.extras import require
from ..training.move_plots import has_moves, plot_moves
from ..training.plots import layer_and_kind, module_grid, plot_adapter
from .tables import make_table

_HISTORY_ROWS = 12


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``inspect``."""
    parser = subparsers.add_parser(
        "inspect",
        help="show ranks, scores and budget history of an adapter",
        description="Show ranks by layer and module, statistics of the scores, and the history of the budget.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a run, or of igulora.save_adapter")
    parser.add_argument(
        "--picture",
        metavar="FILE",
        type=Path,
        help="also draw them into this png, pdf or svg file (and triplets that moved into FILE-moves)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Run ``igulora inspect``.

    Raises:
        ValueError, FileNotFoundError: the adapter is missing or damaged, or the picture's format is unknown.
    """
    if args.picture is not None and args.picture.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"expected --picture to end in .png, .pdf or .svg, got {args.picture}")
    file = read_adapter(args.adapter)
    console = require("rich.console", "demo", "the command line").Console()
    ranks = {name: int(rank) for name, rank in file.meta["ranks"].items()}
    config = file.config
    stored = sum(parts["lora_E"].shape[0] for parts in file.modules.values())
    # A triplet is a row of P, a row of Q and, unless the method is plain LoRA, a trained singular value.
    sizes = {
        n: p["lora_P"].shape[1] + p["lora_Q"].shape[1] + int(config.init != "lora") for n, p in file.modules.items()
    }
    console.print(
        f"{args.adapter}: method {config.method}, {len(ranks)} modules, {sum(ranks.values()):,} of {stored:,} triplets live, "
        f"{sum(size * ranks[name] for name, size in sizes.items()):,} live parameters",
        highlight=False,
        soft_wrap=True,
    )
    _print_ranks(console, ranks)
    _print_scores(console, file, ranks)
    _print_history(console, file.meta["history"])
    if args.picture is not None:
        start = {name: config.rank_at_start(name) for name in ranks}
        plot_adapter(ranks, start, mean_scores(file), file.meta["history"], args.picture)
        console.print(f"Picture: {args.picture}", highlight=False, soft_wrap=True)
        if has_moves(file.meta["history"]):
            moves = args.picture.with_stem(args.picture.stem + "-moves")
            plot_moves(file.meta["history"], start, moves)
            console.print(f"Rank movement: {moves}", highlight=False, soft_wrap=True)


def triplet_scores(file: AdapterFile) -> dict[str, torch.Tensor]:
    """(r,) scores of every module's triplets (Eq. 3, without ``normalize``); empty when none were saved."""
    scores = {}
    for name, terms in file.terms.items():
        first = file.modules[name]["lora_E"].abs() if file.config.lambda_score == "magnitude" else terms[0]
        scores[name] = first + terms[1] + terms[2]
    return scores if any(bool(terms.any()) for terms in file.terms.values()) else {}


def mean_scores(file: AdapterFile) -> dict[str, float]:
    """Mean score of each module's live triplets; NaN where none lives, empty when no scores were saved."""
    out = {}
    for name, scores in triplet_scores(file).items():
        live = scores[file.modules[name]["live"] > 0]
        out[name] = float(live.mean()) if live.numel() else math.nan
    return out


def _print_ranks(console: Any, ranks: dict[str, int]) -> None:
    kinds, layers, grid = module_grid(ranks)
    if len(layers) == 1:
        table = make_table("Live triplets by module", "module", "live")
        for kind, row in zip(kinds, grid, strict=True):
            table.add_row(kind, str(row[0]))
    else:
        table = make_table(
            "Live triplets by layer and module", "layer", *(kind.split(".")[-1] for kind in kinds), "sum"
        )
        for j, layer in enumerate(layers):
            column = [row[j] for row in grid]
            cells = ["" if value is None else str(value) for value in column]
            table.add_row("–" if layer is None else str(layer), *cells, str(sum(value or 0 for value in column)))
        table.add_section()
        sums = [sum(value or 0 for value in row) for row in grid]
        table.add_row("sum", *map(str, sums), str(sum(sums)))
    console.print(table)


def _print_scores(console: Any, file: AdapterFile, ranks: dict[str, int]) -> None:
    scores = triplet_scores(file)
    if not scores:
        console.print(
            "No scores: the method does not score, or no controller was saved with the adapter.", highlight=False
        )
        return
    table = make_table(
        "Scores by kind of module", "module", "live", "mean, live", "min, live", "max", "mean, pruned", "mean |λ|"
    )
    kinds: dict[str, list[str]] = {}
    for name in scores:
        kinds.setdefault(layer_and_kind(name)[1], []).append(name)
    for kind, names in kinds.items():
        values = torch.cat([scores[name] for name in names])
        live = torch.cat([file.modules[name]["live"] for name in names]) > 0
        sizes = torch.cat([file.modules[name]["lora_E"].abs() for name in names])
        kept, pruned = values[live], values[~live]
        table.add_row(
            kind.split(".")[-1],
            str(sum(ranks[name] for name in names)),
            *(f"{float(v):.3f}" if n else "–" for v, n in (
                (kept.mean(), kept.numel()),
                (kept.min() if kept.numel() else kept.sum(), kept.numel()),
                (values.max(), values.numel()),
                (pruned.mean(), pruned.numel()),
                (sizes[live].mean(), kept.numel()),
            )),
        )  # fmt: skip
    console.print(table)


def _print_history(console: Any, history: list[dict[str, Any]]) -> None:
    if not history:
        console.print(
            "No budget history: no allocation was made, or no controller was saved with the adapter.", highlight=False
        )
        return
    table = make_table(
        f"Budget history, {len(history)} allocations", "step", "budget", "live", "modules at rank 0", "largest rank"
    )
    count = min(_HISTORY_ROWS, len(history))
    chosen = sorted({round(i * (len(history) - 1) / max(1, count - 1)) for i in range(count)})
    for index in chosen:
        event = history[index]
        values = list(event["ranks"].values())
        row = (event["step"], event["budget"], sum(values), sum(value == 0 for value in values), max(values))
        table.add_row(*map(str, row))
    console.print(table)
