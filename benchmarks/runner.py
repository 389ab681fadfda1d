"""Times a whole training step: ours, PEFT's LoRA and AdaLoRA, and the frozen floor; paired, interleaved, one process.

    make bench                                 # the registry's cases on the real model, about 15 minutes on two cores
    make bench ARGS="--quick"                   # fewer repetitions, the short batch only
    make bench ARGS="--model tiny"              # seconds; shows that everything runs, says nothing about speed

Every round runs each method once, forwards and backwards in turn; what counts is the ratio of two methods within a
round, its median and quartiles over the rounds. Results are checked before anything is timed: a fresh adapter must
leave the model's outputs as they are, and afterwards the adaptive methods must really have pruned.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import gc
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cases import CASES, MODELS, Case
from .counts import count_step
from .machine import RESULTS, machine, versions
from .memory import peak_memory
from .methods import DEFAULT_METHODS, METHODS, Method
from .models import load_model, make_batch, small_batch
from .ratios import Times, paired_ratios, quartiles

FORMAT = 1


def build(name: str, model: nn.Module, case: Case) -> Method:
    """A method on its own copy of the model; the random start is the same at every call."""
    torch.manual_seed(0)
    return METHODS[name](model, case)


def check_start(name: str, method: Method, reference: Tensor, batch: dict[str, Tensor]) -> float:
    """The largest change of a logit by a fresh adapter, relative to the largest logit.

    Raises:
        RuntimeError: it exceeds what rounding of the model's dtype explains; timing it would compare different
            computations.
    """
    change = (method.logits(batch) - reference).abs().max().item() / reference.abs().max().item()
    bound = 8 * torch.finfo(reference.dtype).eps
    if not change <= bound:
        raise RuntimeError(
            f"expected {name} to leave the outputs of the base model as they are, got a relative change of {change:.2e}"
        )
    return change


def time_step(method: Method, batch: dict[str, Tensor]) -> float:
    """Seconds of one step, garbage collected before and not during it."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        loss = method.step(batch)
        elapsed = time.perf_counter() - start
    finally:
        gc.enable()
    if not torch.isfinite(loss):
        raise RuntimeError(f"expected a finite loss from {method.name}, got {loss.item()}")
    return elapsed


def measure(
    methods: dict[str, Method],
    batch: dict[str, Tensor],
    small: dict[str, Tensor],
    rounds: int,
    say: Callable[[str], None],
) -> Times:
    """Interleaved step times, in seconds.

    Returns:
        Per method one time per round, averaged over its kinds of step by their share; besides ``name:kind`` for each
        kind of a method that has several.
    """
    times: Times = {}
    order = list(methods)
    for turn in range(-1, rounds):  # turn -1 warms up: first use of a shape allocates and packs weights
        for name in order if turn % 2 else reversed(order):
            method, mean = methods[name], 0.0
            kinds = method.kinds()
            for kind, share in kinds.items():
                method.seek(kind, small)
                seconds = time_step(method, batch)
                mean += share * seconds
                if turn >= 0 and len(kinds) > 1:
                    times.setdefault(f"{name}:{kind}", []).append(seconds)
            if turn >= 0:
                times.setdefault(name, []).append(mean)
        say(f"    round {turn + 1}/{rounds}" if turn >= 0 else "    warmed up")
    return times


def operator_profile(method: Method, batch: dict[str, Tensor], top: int = 14) -> list[dict[str, Any]]:
    """Where a step's time goes: self time of its most expensive operators, in milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        method.step(batch)
    rows = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)[:top]
    return [{"operator": e.key, "calls": e.count, "ms": round(e.self_cpu_time_total / 1e3, 2)} for e in rows]


def run_case(
    case: Case, base: nn.Module, names: list[str], rounds: int, say: Callable[[str], None], profiled: bool
) -> dict[str, Any]:
    """Check, time and count all methods on one case."""
    batch, small = make_batch(base, case.rows, case.length), small_batch(base, case)
    with torch.no_grad():
        reference = base(input_ids=small["input_ids"]).logits
    methods: dict[str, Method] = {}
    result: dict[str, Any] = {"case": dataclasses.asdict(case), "rounds": rounds, "methods": {}}
    for name in names:
        method = methods[name] = build(name, copy.deepcopy(base), case)
        change = check_start(name, method, reference, small)
        start = method.live()
        method.prepare(small)
        result["methods"][name] = {
            "title": method.title,
            "trainable": method.trainable(),
            "change_at_start": change,
            "kinds": method.kinds(),
            "live_at_start": start,
        }
    say(f"  {case.name}: outputs of a fresh adapter equal the base model's for {', '.join(names)}")
    times = measure(methods, batch, small, rounds, say)
    for name, method in methods.items():
        live = method.live()
        capacity = case.rank * sum(
            isinstance(m, nn.Linear) for m in base.modules() if m is not base.get_output_embeddings()
        )
        if method.adaptive and not (live is not None and 0 < live < capacity):
            raise RuntimeError(
                f"expected {name} to have pruned some of its {capacity} triplets while it was timed, got {live} live"
            )
        result["methods"][name]["live_at_end"] = live
    result["seconds"] = times
    result["step"] = {name: quartiles(series) for name, series in times.items()}
    result["ratios"] = paired_ratios(times)
    if profiled:
        result["profile"] = {
            name: operator_profile(methods[name], batch) for name in ("floor", "instantaneous") if name in methods
        }
    result["counts"] = {name: count_step(method, small) for name, method in methods.items() if name != "floor"}
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2-135m")
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="only this case (may be repeated)")
    parser.add_argument(
        "--methods", default=",".join(DEFAULT_METHODS), help=f"comma-separated, of {', '.join(METHODS)}"
    )
    parser.add_argument("--rounds", type=int, help="repetitions of every method (default 6, with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="the case with the shortest batch only, three rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement")
    parser.add_argument("--output", type=Path, help="result file (default benchmarks/results/<date>-<machine>.json)")
    options = parser.parse_args(arguments)
    options.methods = options.methods.split(",")
    unknown = set(options.methods) - set(METHODS)
    if unknown:
        parser.error(f"unknown method {sorted(unknown)}; there are {', '.join(METHODS)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and write its result file."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    os.environ["TQDM_DISABLE"] = "1"  # the loader's progress bars
    warnings.filterwarnings(
        "ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning
    )  # PEFT
    say = partial(print, flush=True)
    cases = (
        [CASES[name] for name in options.case]
        if options.case
        else [c for c in CASES.values() if c.model == options.model]
    )
    if options.quick:
        cases = [min(cases, key=lambda c: c.rows * c.length)]
    rounds = options.rounds or (3 if options.quick else 6)
    place = machine()
    say(f"{place['cpu']}, {place['cores']} cores, {options.threads} threads, torch {torch.__version__}")
    start = time.perf_counter()
    results = []
    for name in dict.fromkeys(c.model for c in cases):
        base = load_model(MODELS[name])
        for case in (c for c in cases if c.model == name):
            result = run_case(case, base, options.methods, rounds, say, profiled=True)
            if not options.no_memory:
                batch, small = make_batch(base, case.rows, case.length), small_batch(base, case)
                result["memory"] = {}
                for method in options.methods:
                    make = partial(build, method, case=case)
                    result["memory"][method] = peak_memory(make, copy.deepcopy(base), batch, small)
                say("    memory measured")
            result["case"]["model_title"] = MODELS[name].title
            result["case"]["dtype"] = MODELS[name].dtype
            results.append(result)
    record = {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "machine": place,
        "versions": versions(),
        "threads": options.threads,
        "seconds_in_all": round(time.perf_counter() - start, 1),
        "results": results,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", f"{place['cpu']} {place['cores']}c".lower()).strip("-")
    output = options.output or RESULTS / f"{record['date']}-{slug}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for result in results:
        say(f"{result['case']['name']}: medians of paired ratios to the floor")
        for name in options.methods:
            if name != "floor" and "floor" in options.methods:
                ratio = result["ratios"][f"{name}/floor"]
                say(f"  {name:14} {ratio['median']:.3f}  [{ratio['q1']:.3f}, {ratio['q3']:.3f}]")
    say(f"written: {output}  ({record['seconds_in_all']:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
