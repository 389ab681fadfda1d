"""``igulora import``: an adapter of PEFT's as an adapter folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..convert import read_peft
from ..saved_adapter import write_adapter
from .options import check_new


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``import``."""
    parser = subparsers.add_parser(
        "import",
        help="make an adapter folder of a LoRA or AdaLoRA that PEFT saved",
        description="Make an adapter folder, as igulora.load_adapter and igulora inspect read it, of a LoRA (by its singular values) or an "
        "AdaLoRA (with its triplets and ranks) that PEFT saved. To train on from one, see igulora.import_peft.",
    )
    parser.add_argument("adapter", metavar="PEFT_FOLDER", type=Path, help="folder with adapter_config.json")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to write into; new or empty")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run ``igulora import``.

    Raises:
        ValueError, FileNotFoundError: the adapter is missing, damaged or of another kind, or the output folder is not empty.
    """
    check_new(args.output)
    write_adapter(read_peft(args.adapter), args.output)
