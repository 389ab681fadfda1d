"""``igulora bench``: what adaptive rank costs on this machine, against the frozen model and PEFT's methods."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..errors import check_choice
from ..files import write_json
from ..training.extras import require
from ..training.settings import find_device
from .options import add_device
from .tables import make_table

_REPOSITORY = "python -m igulora.benchmarks.render writes the tables of the documents from it"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``bench``."""
    parser = subparsers.add_parser(
        "bench",
        help="time whole training steps against PEFT's methods",
        description="Time whole training steps of igulora, of PEFT's methods and of the frozen model, interleaved in one process: "
        "medians and quartiles of ratios taken round by round. Leave the machine alone meanwhile. Exit code: 0; with --against 1 where a "
        "ratio of both records does not agree within its spread; 2 for an error.",
    )
    parser.add_argument("--list", action="store_true", help="show cases and methods, and which can run here")
    parser.add_argument(
        "--case",
        metavar="NAME",
        action="append",
        default=[],
        help="a case; may be repeated (default: all of the model)",
    )
    parser.add_argument("--model", metavar="NAME", default="smollm2-135m", help="whose cases (default: smollm2-135m)")
    parser.add_argument("--methods", metavar="NAME,...", help="what to compare (default: all that can run here)")
    parser.add_argument(
        "--rounds", metavar="N", type=int, help="repetitions of every method (default: 6, with --quick 3)"
    )
    parser.add_argument("--quick", action="store_true", help="the case with the shortest batch only, three rounds")
    add_device(parser)
    parser.add_argument("--threads", metavar="N", type=int, help="of the CPU (default: one for each core)")
    parser.add_argument("--no-memory", action="store_true", help="skip the measurement of memory")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="write the record there; without FILE to standard output"
    )
    parser.add_argument("--record", action="store_true", help="keep the record in benchmarks/results of this checkout")
    parser.add_argument(
        "--against",
        metavar="FILE",
        type=Path,
        help="an earlier record: do both agree within their spread? Exit code 1 where they do not",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run ``igulora bench``; returns the exit code: 1 where an earlier record does not agree, else 0.

    Raises:
        ValueError: a name is unknown, a number out of range, or the earlier record is of another machine or of nothing that was measured.
        ImportError: a package that every case needs is missing.
    """
    require("transformers", "bench", "the benchmark's models")
    from ..benchmarks import allocator
    from ..benchmarks import record as records
    from ..benchmarks.cases import CASES
    from ..benchmarks.methods import DEFAULT_METHODS, METHODS, quiet_peft
    from ..benchmarks.runner import Options, run_cases

    # With the record on standard output, what is told goes to standard error.
    console = require("rich.console", "bench", "the command line").Console(stderr=args.json == "-")
    if args.list:
        _list(console, CASES, METHODS)
        return 0
    cases = _cases(args)
    names = tuple(args.methods.split(",")) if args.methods else DEFAULT_METHODS
    for name in names:
        check_choice("--methods", name, METHODS)
    rounds = args.rounds if args.rounds is not None else 3 if args.quick else 6
    if rounds < 1:
        raise ValueError(f"expected --rounds of at least 1, got {rounds}")
    device = find_device(args.device)
    check_choice("--device", device.type, ("cpu", "cuda"))  # the others would have to be waited for
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"expected --threads of at least 1, got {args.threads}")
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    if device.type == "cpu":
        allocator.keep_freed_memory()
    opened = records.open_record(str(device))
    earlier = None if args.against is None else records.read(args.against)
    if earlier is not None:
        records.check_same_place(earlier, opened)  # before half an hour is spent
    skipped = {name: reason for name in names if (reason := METHODS[name].available()) is not None}
    for name, reason in skipped.items():
        console.print(f"{name} is skipped: {reason}", highlight=False, soft_wrap=True)
    options = Options(tuple(n for n in names if n not in skipped), rounds, memory=not args.no_memory, device=device)
    os.environ["TQDM_DISABLE"] = "1"  # the loader's progress bars
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's lines about itself, on standard error
    start = time.perf_counter()
    with quiet_peft(), Bar(console) as bar:
        results = run_cases(cases, options, bar)
    record = records.close_record(opened, results, time.perf_counter() - start) | {"skipped": skipped}
    _show(console, record)
    if args.json == "-":
        sys.stdout.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    elif args.json:
        write_json(Path(args.json), record)
    if args.record:
        file = records.keep(record, records.standard_file(record))
        console.print(f"Kept in {file}; {_REPOSITORY}", highlight=False, soft_wrap=True)
    if earlier is None:
        return 0
    rows = records.agreement(earlier, record)
    if not rows:
        raise ValueError(
            f"expected cases and methods that {args.against} holds too, got no ratio in common; name them with --case and --methods"
        )
    _compare(console, rows)
    return 0 if all(row["agrees"] for row in rows) else 1


def _cases(args: argparse.Namespace) -> list[Any]:
    from ..benchmarks.cases import CASES, MODELS

    for name in args.case:
        check_choice("--case", name, CASES)
    check_choice("--model", args.model, MODELS)
    cases = [CASES[name] for name in args.case] or [case for case in CASES.values() if case.model == args.model]
    return [min(cases, key=lambda case: case.rows * case.length)] if args.quick else cases


class Bar:
    """A progress bar where the output is a terminal, lines where it is none."""

    def __init__(self, console: Any) -> None:
        self._console, self._last = console, ""
        rich = require("rich.progress", "bench", "the progress bar")
        self._bar = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("loading", total=None)
        self._total = 0

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def total(self, ticks: int) -> None:
        """More to do."""
        self._total += ticks
        self._bar.update(self._task, total=self._total)

    def tick(self, text: str) -> None:
        """One thing done; without a terminal each new text is a line."""
        self._bar.update(self._task, advance=1, description=text)
        if not self._console.is_terminal and text != self._last:
            self.say(text)
        self._last = text


def _list(console: Any, cases: dict[str, Any], methods: dict[str, Any]) -> None:
    table = make_table("Cases", "case", "model", "rows", "tokens", "rank")
    for case in cases.values():
        table.add_row(case.name, case.model, str(case.rows), str(case.length), str(case.rank))
    console.print(table)
    table = make_table("Methods", "method", "what", "here")
    for name, method in methods.items():
        table.add_row(name, method.title, method.available() or "yes")
    console.print(table)


def _show(console: Any, record: dict[str, Any]) -> None:
    place = record["machine"]
    where = place["cpu"] if place["device"] == "cpu" else place["device"]
    console.print(
        f"{record['date']}, {where}, {place['cores']} cores, {record['threads']} threads, torch {record['versions']['torch']}",
        highlight=False,
        soft_wrap=True,
    )
    for result in record["results"]:
        table = make_table(
            f"{result['case']['name']}, medians of {result['rounds']} rounds", "method", "step, s", "over floor", "quartiles", "peak, MiB"
        )  # fmt: skip
        for name, method in result["methods"].items():
            if "error" in method:
                table.add_row(name, method["error"].partition(":")[0], "", "", "")
                continue
            ratio, peak = result["ratios"].get(f"{name}/floor"), result.get("memory", {}).get(name)
            table.add_row(
                name,
                f"{result['step'][name]['median']:.3f}",
                f"{ratio['median']:.3f}" if ratio else "–",
                f"{ratio['q1']:.3f}–{ratio['q3']:.3f}" if ratio else "–",
                f"{peak['peak'] / 2**20:.0f}" if peak else "–",
            )
        console.print(table)


def _compare(console: Any, rows: list[dict[str, Any]]) -> None:
    table = make_table("Against the earlier record", "case", "ratio", "before", "now", "within the spread")
    for row in rows:
        before, now = (f"{x['median']:.3f} [{x['q1']:.3f}–{x['q3']:.3f}]" for x in (row["before"], row["now"]))
        table.add_row(row["case"], row["ratio"], before, now, "yes" if row["agrees"] else "no")
    console.print(table)
    console.print(
        f"{sum(row['agrees'] for row in rows)} of {len(rows)} ratios agree within their spread.", highlight=False
    )
