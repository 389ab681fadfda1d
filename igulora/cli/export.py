"""``igulora export``: an adapter for programs that know plain LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..export import export_peft
from ..files import read_json
from ..training.output import RUN_FILE
from .options import check_new

DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``export``."""
    parser = subparsers.add_parser(
        "export",
        help="write a plain LoRA adapter that PEFT loads",
        description="Fold the singular values in and write a plain LoRA adapter; modules of rank 0 are left out.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a run, or of igulora.save_adapter")
    parser.add_argument("--format", choices=("peft",), default="peft", help="what to write (default: peft)")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to write into; new or empty")
    parser.add_argument(
        "--uniform-rank",
        action="store_true",
        help="pad all modules to one rank, for servers that read r and lora_alpha only",
    )
    parser.add_argument("--base-model", metavar="NAME", help="base model to name in it (default: the run's)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run ``igulora export``.

    Raises:
        ValueError, FileNotFoundError: the adapter is missing or damaged, or the output folder is not empty.
    """
    check_new(args.output)
    base = args.base_model
    if base is None and (args.adapter / RUN_FILE).is_file():
        name = read_json(args.adapter / RUN_FILE).get("model")
        base = DEMO_BASE if name == "demo" else name
    export_peft(args.adapter, args.output, base, uniform_rank=args.uniform_rank)
