"""``igulora project``: what a training step of each method would cost on a model and a card that are not here."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..files import write_json
from ..measure.roofline import CARDS, HOST_S, LAUNCH_S, PROJECTION, SHORT, SUSTAINED, SYNC_S, Roofline, card
from ..training.extras import require
from .tables import make_table


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``project``."""
    parser = subparsers.add_parser(
        "project",
        help="project launches, bytes and step time of every method on any model and card, without either",
        description=(
            f"A {PROJECTION}: every method takes a training step on the meta device, counters note launches, waits, bytes and FLOPs, "
            "and a roofline makes a time of them. A call takes the longer of its bytes over the bandwidth and its FLOPs over the "
            "sustained rate, and a fixed time for each launch; a step takes the longer of that and of the host's time for its "
            "launches, and the waits."
        ),
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a built-in configuration (llama-3-8b, ...), a config.json or its folder, or owner/name; dense, with nn.Linear layers",
    )
    short = [*SHORT, *(name for name in CARDS if name not in SHORT.values())]
    parser.add_argument("--card", default="H100", help=f"{', '.join(short)} (default: H100)")
    parser.add_argument("--bandwidth", type=float, metavar="TB/S", help="of the memory, in place of the card's")
    parser.add_argument("--rate", type=float, metavar="TFLOP/S", help="dense bf16 products, in place of the card's")
    parser.add_argument(
        "--sustained",
        type=float,
        default=SUSTAINED,
        metavar="X",
        help=f"share of the rate that products reach (default: {SUSTAINED})",
    )
    for name, seconds, text in (
        ("launch", LAUNCH_S, "of each launch on the device"),
        ("host", HOST_S, "of each launch on the host"),
        ("sync", SYNC_S, "of each wait for the device"),
    ):
        parser.add_argument(
            f"--{name}-cost",
            type=float,
            default=1e6 * seconds,
            metavar="US",
            help=f"microseconds {text} (default: {1e6 * seconds:g})",
        )
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="sequences in a batch (default: 4)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens in each (default: 512)")
    parser.add_argument(
        "--rank", type=int, default=32, metavar="N", help="triplets per matrix at the start (default: 32)"
    )
    parser.add_argument(
        "--target-rank", type=int, metavar="N", help="their average after pruning (default: half of the rank)"
    )
    parser.add_argument(
        "--methods", metavar="NAMES", help="comma-separated (default: floor, igulora, PEFT's and the release)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the projection to a file")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run ``igulora project``.

    Raises:
        ValueError: an unknown model, card or method (names the nearest), or a number out of range.
    """
    roofline = _roofline(args)
    for name in ("rows", "length", "rank"):
        if getattr(args, name) < 1:
            raise ValueError(f"expected --{name} of at least 1, got {getattr(args, name)}")
    target = max(args.rank // 2, 1) if args.target_rank is None else args.target_rank
    if not 0 < target <= args.rank:
        raise ValueError(f"expected --target-rank from 1 to the rank of {args.rank}, got {target}")
    require("transformers", "bench", "igulora project")
    from ..benchmarks.cases import Case
    from ..benchmarks.methods import quiet_peft
    from ..benchmarks.projection.project import DEFAULTS, check_methods, project
    from ..benchmarks.projection.shapes import find_shape

    console = require("rich.console", "demo", "the command line").Console()
    names = (
        DEFAULTS if args.methods is None else tuple(name.strip() for name in args.methods.split(",") if name.strip())
    )
    if names != DEFAULTS:
        check_methods(names)
    shape = find_shape(args.model)
    _check_length(shape, args.length)
    case = Case("project", shape.name, args.rows, args.length, args.rank, target)
    with console.status("projecting") as status, quiet_peft():
        made = project(shape, case, roofline, names, say=lambda title: status.update(f"projecting {title}"))
    _print(console, made)
    if args.json is not None:
        write_json(args.json, made)
        console.print(f"Written ({PROJECTION}): {args.json}", highlight=False, soft_wrap=True)


def _roofline(args: argparse.Namespace) -> Roofline:
    numbers = ("bandwidth", "rate", "sustained", "launch_cost", "host_cost", "sync_cost")
    for name in numbers:
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"expected --{name.replace('_', '-')} to be a number of at least 0, got {value}")
    costs = {f"{name}_s": 1e-6 * getattr(args, f"{name}_cost") for name in ("launch", "host", "sync")}
    return Roofline(card=card(args.card), sustained=args.sustained, **costs).with_figures(args.bandwidth, args.rate)


def _check_length(shape: Any, length: int) -> None:
    if shape.longest and length > shape.longest:
        raise ValueError(f"expected --length of at most {shape.longest} for {shape.title}, got {length}")


def _print(console: Any, made: dict[str, Any]) -> None:
    model, case, roofline = made["model"], made["case"], made["roofline"]
    on = roofline["card"]
    batch = f"{case['rows']}×{case['length']} tokens, r = {case['rank']}"
    figures = f"{on['bandwidth']:g} TB/s, {on['rate']:g} TFLOP/s × {roofline['sustained']:g}"
    costs = [
        f"{1e6 * roofline[key]:g} µs {what}"
        for key, what in (("launch_s", "a launch"), ("host_s", "of the host"), ("sync_s", "a wait"))
    ]
    console.print(
        f"{PROJECTION.capitalize()}: {model['title']}, {model['layers']} layers, {batch}, on {on['name']} ({figures}, {', '.join(costs)})",
        highlight=False,
        soft_wrap=True,
    )
    headings = ("method", "launches", "syncs", "GB", "TFLOP", "step, ms", "/ floor", "/ LoRA", "/ AdaLoRA")
    table = make_table(f"Projected step ({PROJECTION})", *headings)
    for name, entry in made["methods"].items():
        mean, over = entry["mean"], entry["over"]
        table.add_row(
            name,
            f"{mean['launches']:,.0f}",
            f"{mean['syncs']:,.0f}",
            f"{(mean['read'] + mean['written']) / 1e9:,.1f}",
            f"{mean['flops'] / 1e12:,.2f}",
            f"{1e3 * mean['step_s']:,.1f}" + ("*" if mean["step_s"] > mean["device_s"] else ""),
            *(f"{over[other]:.2f}" if other in over else "–" for other in ("floor", "peft-lora", "peft-adalora")),
        )
    console.print(table)
    console.print(
        "* the host or its waits are slower than the device. LoRA and AdaLoRA are PEFT's.",
        highlight=False,
        soft_wrap=True,
    )
    for name, why in made["skipped"].items():
        console.print(f"Not projected: {name}: {why}", highlight=False, soft_wrap=True)
