"""``igulora profile``: where the time of one training step goes, by part, for several methods side by side."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import check_choice, first_line, nearest
from ..files import write_json
from ..measure.parts import PARTS
from ..measure.plots import ENDINGS, plot_profiles
from ..measure.profiling import PartCost, StepProfile, profile_step
from ..training.extras import MissingExtra, require
from ..training.settings import DTYPES, find_device
from .options import add_device
from .tables import make_table

FORMAT = 1
DEMO = "demo"
FLOOR = "floor"
DEFAULT = (FLOOR, "instantaneous", "default", "peft-lora", "peft-adalora")
# Columns of the table that holds several steps, within 80 characters.
_SHORT = dict(zip(PARTS, ("base", "adapt", "path", "orth", "score", "alloc", "optim", "rest"), strict=True))
_OURS = "igulora"  # "igulora" is the default estimator, "igulora-NAME" the method NAME of ours


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``profile``."""
    parser = subparsers.add_parser(
        "profile",
        help="where the time of a training step goes, by part and method",
        description="Run one training step of each method under torch's profiler and split it into base products, adapter products, "
        "path pass, orthogonality, scores, allocation, optimizer and rest: time, launches, bytes, FLOPs and host syncs of each. Without "
        "arguments: SmolLM2-135M, a few minutes on two cores. For a loop of your own: igulora.measure.profiling.profile_step.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        default=DEMO,
        help="folder or hub name of a causal language model, an adapter's folder (igulora's or PEFT's, profiled as it is), "
        "demo: SmolLM2-135M, or tiny: a random one (default: demo)",
    )
    parser.add_argument("--base", metavar="NAME", help="base model of an adapter's folder (default: the one it names)")
    parser.add_argument(
        "--method",
        metavar="NAME",
        action="append",
        default=[],
        help=f"igulora, igulora-NAME, peft-lora, ...; may be repeated (default: {', '.join(DEFAULT)}, as far as installed)",
    )
    for flag, value, text in (
        ("--rows", 4, "sequences in the batch"),
        ("--length", 128, "tokens in each"),
        ("--rank", 32, "triplets per matrix; adaptive methods prune to half"),
        ("--warmup", 1, "steps before the measured ones"),
        ("--operators", 0, "also show the N dearest operators of each part"),
    ):
        parser.add_argument(flag, metavar="N", type=int, default=value, help=f"{text} (default: {value})")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the base model (default: as it is stored)")
    add_device(parser)
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads of torch")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="stacked bars into this png, pdf or svg file")
    parser.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="Chrome trace into this .json or .json.gz file, with the parts as ranges; of several steps, one file each",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="all figures into this file")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run ``igulora profile``.

    Raises:
        ValueError: a name is unknown, a number out of range, a file's ending unknown, or there is no such model.
    """
    _check(args)
    methods = require("igulora.benchmarks.methods", "bench", "comparing methods").METHODS
    from ..benchmarks import allocator
    from ..benchmarks.methods import quiet_peft
    from ..benchmarks.runner import out_of_memory

    allocator.keep_freed_memory()
    names = [_known(name, methods) for name in args.method]
    console = require("rich.console", "demo", "the command line").Console(markup=False, highlight=False)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler of torch 2.13 reports its starts and stops
    profiles: list[StepProfile] = []
    with quiet_peft(), console.status("loading the model") as status:
        for make in _makers(args, names, methods, console):
            try:
                for profile in _profile(args, make, status):
                    profiles.append(profile)
                    _print_profile(console, profile, args.operators)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                console.print(f"Left out, no memory for it: {first_line(error)}", soft_wrap=True)
            gc.collect()
    if not profiles:
        raise ValueError("expected at least one method that can run here, got none; the lines above say why")
    if len(profiles) > 1:
        console.print(_comparison(profiles))
        console.print(
            "One step each, one after the other: for ratios with their spread, igulora bench.", soft_wrap=True
        )
    shape = f"{args.model}, {args.rows}×{args.length} tokens"
    if args.picture is not None:
        plot_profiles(profiles, args.picture, f"Where the time of a training step goes: {shape}")
        console.print(f"Picture: {args.picture}", soft_wrap=True)
    if args.json is not None:
        _write_json(args, profiles)
        console.print(f"Figures: {args.json}", soft_wrap=True)


def _check(args: argparse.Namespace) -> None:
    for name, least in (("rows", 1), ("length", 2), ("rank", 1), ("warmup", 0), ("operators", 0), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"expected --{name} of at least {least}, got {value}")
    for name, endings in (("picture", ENDINGS), ("trace", (".json", ".json.gz")), ("json", (".json",))):
        file = getattr(args, name)
        if file is not None and not file.name.lower().endswith(tuple(endings)):
            raise ValueError(f"expected --{name} to end in {' or '.join(endings)}, got {file}")


def _known(name: str, methods: dict[str, Any]) -> str:
    """The method's own name."""
    own = {_OURS: "default"} | {f"{_OURS}-{known}": known for known, kind in methods.items() if _is_ours(kind)}
    check_choice("--method", name, (*own, *methods))
    return own.get(name, name)


def _is_ours(kind: type) -> bool:
    from ..benchmarks.methods import Igulora

    return issubclass(kind, Igulora)


# -- the steps ----------------------------------------------------------------------------------------------------------


def _makers(
    args: argparse.Namespace, names: list[str], methods: dict[str, Any], console: Any
) -> Iterator[Callable[[], Any]]:
    """What builds each method around the frozen weights of one model."""
    from ..benchmarks.cases import Case
    from ..benchmarks.methods.saved import base_of, is_adapter, open_adapter
    from ..benchmarks.runner import build

    folder = Path(args.model)
    saved = is_adapter(folder)
    base_name = (args.base or base_of(folder)) if saved else args.model
    if args.base is not None and not saved:
        raise ValueError(f"expected an adapter's folder as --model with --base, got {args.model!r}; drop --base")
    if base_name is None:
        raise ValueError(
            f"expected --base, the base model of the adapter in {folder}, got none, and the folder names none"
        )
    case = Case("profile", base_name, args.rows, args.length, args.rank, max(args.rank // 2, 1))
    base = _load(base_name, args.dtype).requires_grad_(False).train().to(find_device(args.device))
    if saved and not names:
        yield lambda: open_adapter(folder, base, case)
        return
    runnable = []
    for name in names or [name for name in DEFAULT if name in methods]:
        reason = methods[name].available()
        if reason is None:
            runnable.append(name)
        else:
            console.print(f"Skipped {name}: {reason}", soft_wrap=True)
    for name in runnable:
        yield lambda name=name: build(name, base, case)  # type: ignore[misc]


def _profile(args: argparse.Namespace, make: Callable[[], Any], status: Any) -> Iterator[StepProfile]:
    """The profiles of a method, one for each kind of step that it has."""
    from ..benchmarks.models import make_batch, small_batch

    torch.manual_seed(0)
    method = make()
    device = next(method.model.parameters()).device
    batch = {k: v.to(device) for k, v in make_batch(method.model, args.rows, args.length).items()}
    small = {k: v.to(device) for k, v in small_batch(method.model, method.case).items()}
    status.update(f"{method.name}: preparing")
    method.prepare(small)
    kinds = method.kinds()
    for kind, share in kinds.items():
        title = _title(method)
        if len(kinds) > 1:
            title += f", {kind} ({share:.0%} of steps)"
        status.update(f"{title}: measuring")
        yield profile_step(
            lambda: method.step(batch),
            method.model,
            before=lambda kind=kind: method.seek(kind, small),  # type: ignore[misc]
            warmup=args.warmup,
            adapted=method.name != FLOOR,
            title=title,
            trace=_trace_file(args.trace, method.name, kind, len(kinds)),
        )


def _title(method: Any) -> str:
    if method.name == "saved":
        return str(method.title)
    return f"{_OURS} {method.name}" if _is_ours(type(method)) else str(method.name)


def _trace_file(file: Path | None, method: str, kind: str, kinds: int) -> Path | None:
    if file is None:
        return None
    ending = ".json.gz" if file.name.endswith(".json.gz") else ".json"
    middle = f"-{method}" + (f"-{kind.replace('+', '-')}" if kinds > 1 else "")
    return file.with_name(file.name.removesuffix(ending) + middle + ending)


def _load(name: str, dtype: str) -> Any:
    """A causal language model: the demo's, one of the benchmark's registry, or by folder or hub name."""
    from ..benchmarks.cases import MODELS
    from ..benchmarks.models import load_model
    from ..training.modeling import load_causal_lm

    known = {DEMO: MODELS["smollm2-135m"], **MODELS}
    if name not in known:
        try:
            return load_causal_lm(name, dtype)
        except MissingExtra:
            raise
        except ValueError as error:
            raise ValueError(f"{error}{nearest(name, known)}") from error
    model = load_model(known[name])
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


# -- what is shown ------------------------------------------------------------------------------------------------------


def _print_profile(console: Any, profile: StepProfile, operators: int) -> None:
    total = profile.total
    device = ("kernels", "waits") if total.kernels else ()
    table = make_table(
        f"{profile.title}; {profile.device}",
        "part", "ms", "share", "launches", "MB moved", "GFLOP", "syncs", *device,
    )  # fmt: skip
    for name, cost in profile.parts.items():
        table.add_row(name, *_cells(cost, total, bool(device)))
        for operator in profile.operators[name][:operators]:
            table.add_row(f"  {operator.name} ×{operator.calls}", f"{1e3 * operator.seconds:.2f}", style="dim")
    table.add_section()
    table.add_row("whole step", *_cells(total, total, bool(device)))
    console.print(table)
    for note in profile.notes:
        console.print(note, soft_wrap=True)
    console.print()


def _cells(cost: PartCost, total: PartCost, device: bool) -> list[str]:
    share = cost.seconds / total.seconds if total.seconds else 0.0
    counts = [cost.kernels, cost.waits] if device else []
    cells = [f"{1e3 * cost.seconds:.2f}", f"{share:.1%}", f"{cost.launches:,}"]
    cells += [f"{cost.moved / 1e6:,.1f}", f"{cost.flops / 1e9:,.4g}", str(cost.syncs), *map(str, counts)]
    return [cell if cost.seconds or cost.launches or cost.syncs else "–" for cell in cells]


def _comparison(profiles: list[StepProfile]) -> Any:
    """Milliseconds by step, a column for each part; then what they add up to, and the undisturbed step."""
    shown = [name for name in PARTS if any(profile.parts[name].seconds for profile in profiles)]
    table = make_table(
        "ms of one step by part, side by side; wall: undisturbed",
        "step",
        *(_SHORT[name] for name in shown),
        "sum",
        "wall",
    )
    for profile in profiles:
        values = [profile.parts[name].seconds for name in shown] + [profile.total.seconds, profile.wall_seconds]
        table.add_row(profile.title, *(_ms(value) for value in values))
    return table


def _ms(seconds: float) -> str:
    """Four characters or so."""
    value = 1e3 * seconds
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}" if value else "–"


def _write_json(args: argparse.Namespace, profiles: list[StepProfile]) -> None:
    from ..benchmarks.record import open_record

    options = ("model", "base", "rows", "length", "rank", "dtype", "warmup")
    record = {
        **open_record(str(find_device(args.device))),
        "format": FORMAT,
        "kind": "profile",
        "options": {name: getattr(args, name) for name in options},
        "profiles": [profile.as_dict() for profile in profiles],
    }
    write_json(args.json, record)
