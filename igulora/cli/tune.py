"""``igulora tune``: measure which form of the adapted product is fastest on this device; look at what was measured, drop it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter_file import CONFIG_FILE, read_adapter
from ..errors import first_line
from ..folders import place
from ..kernels import tuning
from ..kernels.backend import interpreting
from ..training.extras import require

_DTYPES = ("bfloat16", "float16", "float32")
_SHARE = "share: of the time of cuBLAS with a kernel for the rank term"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``tune``."""
    parser = subparsers.add_parser(
        "tune",
        help="measure which kernels are fastest on this GPU",
        description="Measure which form of the adapted product is fastest on the current CUDA device, for the layers and batches that "
        "are named. The choice is kept on disk and used by every later run with the same device and versions; what was never "
        "measured runs cuBLAS with a kernel for the rank term. IGULORA_TUNE=1 measures during a run instead, as shapes come up.",
    )
    parser.add_argument(
        "--layer", metavar="OUTxIN", type=_layer, action="append", default=[], help="a linear layer; may be repeated"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="all linear layers of a model (folder or hub name) or of an adapter's folder"
    )
    parser.add_argument(
        "--rows",
        metavar="N",
        type=int,
        action="append",
        default=[],
        help="tokens of a batch, all sequences together; holds for counts up to the next power of two; may be repeated (default: 2048)",
    )
    parser.add_argument(
        "--rank",
        metavar="N",
        type=int,
        default=32,
        help="of the adapters; holds for ranks up to the next power of two (default: 32)",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the base model (default: bfloat16)")
    parser.add_argument("--dropout", action="store_true", help="as with dropout on the adapters' inputs")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--show", action="store_true", help="show what was measured, on any device, and measure nothing")
    kept.add_argument("--clear", action="store_true", help="drop what was measured, on any device")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run ``igulora tune``.

    Raises:
        ValueError: there is nothing to measure or no device to do so, a number is out of range, or memory does not suffice.
    """
    wanted = bool(args.layer or args.model)
    if (args.show or args.clear) and wanted:
        raise ValueError("expected --show or --clear alone, got layers to measure with it")
    if not (args.show or args.clear or wanted):
        raise ValueError(
            "expected layers to measure, got none; give --layer OUTxIN or --model NAME, or look at earlier results with --show"
        )
    console = require("rich.console", "demo", "the command line").Console()
    if args.show:
        _show(console)
    elif args.clear:
        count = tuning.clear()
        console.print(f"Dropped {count} measured choices from {tuning.file()}", highlight=False, soft_wrap=True)
    else:
        device = _device()
        _measure(
            console, args, device, list(dict.fromkeys([*args.layer, *(layers_of(args.model) if args.model else [])]))
        )


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if interpreting():
        return torch.device("cpu")
    raise ValueError(
        f"expected a CUDA device to measure on, got none that torch {torch.__version__} can use; run this on the machine that trains"
    )


def layers_of(name: str) -> list[tuple[int, int]]:
    """The different (out, in) of the linear layers of a model, without its weights and its output head, or of an adapter's folder.

    Raises:
        ValueError, FileNotFoundError: there is no such model, it has no linear layer, or the adapter is damaged.
    """
    folder = Path(name)
    if place(folder, CONFIG_FILE).is_file():
        shapes = [(p["lora_P"].shape[1], p["lora_Q"].shape[1]) for p in read_adapter(folder).modules.values()]
    else:
        transformers = require("transformers", "demo", "reading a model's layers")
        try:
            config = transformers.AutoConfig.from_pretrained(name)
            with torch.device("meta"):
                model = transformers.AutoModel.from_config(config)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"expected a model or an igulora adapter at {name!r}, got: {first_line(error)}") from error
        shapes = [(m.out_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear)]
    if not shapes:
        raise ValueError(f"expected linear layers in {name!r}, got none; name shapes with --layer OUTxIN")
    return list(dict.fromkeys(shapes))


def _measure(console: Any, args: argparse.Namespace, device: torch.device, layers: Sequence[tuple[int, int]]) -> None:
    rows, found = args.rows or [2048], []
    measuring = tuning.tune(layers, rows, args.rank, getattr(torch, args.dtype), device, args.dropout)
    total = 2 * len(layers) * len(rows)
    try:
        with console.status(f"product 1 of {total}") as status:
            for done, measured in enumerate(measuring, start=1):
                found.append(measured)
                status.update(f"product {min(done + 1, total)} of {total}")
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"expected products that fit into the memory of {device}, got none left after {len(found)} of {total} (those are kept); "
            "take fewer --rows, or run this while nothing else uses the device"
        ) from error
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter, times say nothing"
    console.print(_table(f"{name}; {_SHARE}", {str(m.problem): m.entry() for m in found}))
    for measured in found:
        for product, reason in measured.dropped.items():
            console.print(f"left out for {measured.problem}: {product}: {reason}", highlight=False, soft_wrap=True)
    console.print(f"Kept in {tuning.file()}", highlight=False, soft_wrap=True)


def _show(console: Any) -> None:
    kept = {environment: entries for environment, entries in tuning.kept().items() if entries}
    if not kept:
        console.print(f"No measured choices in {tuning.file()}", highlight=False, soft_wrap=True)
        return
    for environment, entries in kept.items():
        console.print(environment, highlight=False, soft_wrap=True, markup=False)
        console.print(_table(_SHARE, entries))


def _table(title: str, entries: dict[str, dict[str, Any]]) -> Any:
    """One line per problem; entries may come from a file that somebody edited."""
    rich_table = require("rich.table", "demo", "the command line")
    table = rich_table.Table(title=title, title_justify="left", box=rich_table.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("product, rows x columns x inner", "form and tile"):
        table.add_column(heading, overflow="fold")
    for heading in ("ms", "share"):
        table.add_column(heading, justify="right")
    for problem, entry in sorted(entries.items()):
        time, library = entry.get("ms"), entry.get("library_ms")
        numbers = all(isinstance(v, int | float) and v > 0 for v in (time, library))
        cells = (f"{time:.3g}", f"{time / library:.2f}") if numbers else ("–", "–")  # type: ignore[operator]
        table.add_row(problem, str(entry.get("product", "–")), *cells)
    return table


def _layer(text: str) -> tuple[int, int]:
    sizes = re.fullmatch(r"(\d+)[x×](\d+)", text.strip().lower())
    if sizes is None or not all(int(size) for size in sizes.groups()):
        raise argparse.ArgumentTypeError(f"expected OUTxIN such as 11008x4096, got {text!r}")
    return int(sizes[1]), int(sizes[2])
