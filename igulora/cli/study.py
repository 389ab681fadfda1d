"""``igulora study``: does one method learn better than another? Runs a declarative file, resumably, and writes its tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..training.extras import require


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``study``."""
    parser = subparsers.add_parser(
        "study",
        help="compare what methods learn: tasks x methods x budgets x seeds from a file",
        description="Train every method of a TOML file on every task, budget and seed, the learning rate picked for each on "
        "validation rows. Records are kept run by run: the same command goes on where it was stopped. Leave the machine alone where times "
        "matter.",
    )
    parser.add_argument("file", type=Path, help="the study, in TOML")
    parser.add_argument(
        "--output", type=Path, help="folder of records.jsonl and README.md (default: beside the file, with its name)"
    )
    parser.add_argument(
        "--again",
        metavar="KEY",
        help="run a row of the tables anew (TASK/METHOD/R-TARGET), or one run (its key in the records), and show both results; "
        "writes nothing",
    )
    parser.add_argument("--render", action="store_true", help="run nothing: write the page anew from the records")
    parser.add_argument(
        "--threads", metavar="N", type=int, help="of the CPU, shared by all jobs (default: one for each core)"
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        default=1,
        help="runs at the same time, each in a process of its own (default: 1)",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run ``igulora study``.

    Raises:
        ValueError, FileNotFoundError: the file, its records or its data do not fit; nothing has run then, or all finished runs are kept.
    """
    from igulora.benchmarks import allocator
    from igulora.benchmarks.study.book import Book
    from igulora.benchmarks.study.conduct import again, conduct, row
    from igulora.benchmarks.study.page import page
    from igulora.benchmarks.study.pictures import draw
    from igulora.benchmarks.study.reading import read_study
    from igulora.benchmarks.study.telling import Telling

    from .finetune import quieten_transformers

    if args.jobs < 1:
        raise ValueError(f"expected --jobs of at least 1, got {args.jobs}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"expected --threads of at least 1, got {args.threads}")
    if args.again and args.render:
        raise ValueError("expected --again or --render, got both; --again runs one row anew, --render runs nothing")
    study = read_study(args.file)
    output = args.output or args.file.with_suffix("")
    book = Book(output / "records.jsonl")
    console = require("rich.console", "demo", "the command line").Console()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.render:
        allocator.keep_freed_memory(large=False)
        quieten_transformers()
    if args.again:
        for which in row(study, book, args.again):
            then, now = again(study, book, which)
            for part in ("validation", "test"):
                text = f"{which.key}, {part}: recorded {then[part]}, now {now[part]}"
                console.print(text, highlight=False, soft_wrap=True)
        return 0
    if not args.render:
        with Telling(console, study, book) as telling:
            conduct(study, book, telling, args.jobs)
    output.mkdir(parents=True, exist_ok=True)
    (output / "README.md").write_text(page(study, book, draw(study, book, output)), encoding="utf-8")
    console.print(
        f"{len(book.records)} runs are in {book.path}, their tables in {output / 'README.md'}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
