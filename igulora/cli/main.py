"""Entry point of the ``igulora`` command: subcommands, and errors told in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import igulora

from .. import benchmarks, kernels
from . import bench, export, finetune, import_, inspect, profile, project, study, tune

# Several folders where igulora is installed in place.
_PACKAGES = tuple(str(Path(str(p.__file__)).resolve().parent) for p in (igulora, kernels, benchmarks))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="igulora",
        description="Adaptive-rank fine-tuning (IGU-LoRA, AdaLoRA). 'igulora finetune' alone runs a demo of a few minutes.",
    )
    parser.add_argument("--version", action="version", version=f"igulora {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (finetune, inspect, export, import_, tune, bench, profile, project, study):
        sub = module.add_parser(subparsers)
        sub.set_defaults(run=module.run)
        sub.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 or what the command says, 2 for an error of the user's, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt as stop:
        _complain(str(stop) or "stopped")
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        # What the operating system says of a file or a folder is the user's to mend, wherever it was said.
        if args.traceback or not (_ours(error) or isinstance(error, PermissionError | NotADirectoryError)):
            raise
        _complain(f"error: {error}")
        return 2


def _ours(error: BaseException) -> bool:
    """Whether one of igulora's own checks raised the error; anything else is a fault whose traceback is needed."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(Path(trace.tb_frame.f_code.co_filename).resolve()).startswith(_PACKAGES)


def _complain(text: str) -> None:
    sys.stderr.write(f"igulora: {text}\n")
