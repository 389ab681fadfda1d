"""How cost grows: whole steps with rank, tokens, layers and adapted matrices; scoring and allocation with what they walk over.

    python -m igulora.benchmarks.scaling            # ten minutes on two cores; writes results/scaling/<date>-<machine>.json
    python -m igulora.benchmarks.scaling --quick    # tiny shapes, seconds; its times mean nothing
    python -m igulora.benchmarks.scaling.page       # picture and page from the newest record

Steps are those of a random Llama with SmolLM2's layers, timed like every other case (``runner.py``). One thing varies at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from igulora.kernels import allocate_triplets, importance_update, orthogonality_grad_
from igulora.kernels.importance import row_table
from igulora.kernels.orthogonality import work_table

from .. import allocator
from ..cases import Case, ModelCase
from ..checks import Arithmetic
from ..machine import RESULTS
from ..methods import METHODS as REGISTRY
from ..methods import quiet_peft
from ..models import load_model
from ..ratios import quartiles
from ..record import close_record, keep, open_record, standard_file
from ..runner import Options, Run

FOLDER = RESULTS / "scaling"
METHODS = ("floor", "instantaneous", "default", "peft-lora", "peft-adalora")
# A layer of SmolLM2-135M; a small vocabulary, so that what is adapted is most of the work.
_LAYER = {
    "vocab_size": 4096,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
_TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
_MATRICES = (
    ("q_proj",),
    ("q_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a curve: ``value`` of what varies, and the step measured there."""

    curve: str
    value: int
    layers: int
    case: Case


def points(quick: bool) -> Iterator[Point]:
    """All points of all curves, the common one once for each of them."""
    layers, length, rank = (2, 16, 8) if quick else (8, 128, 32)

    def point(curve: str, value: int, depth: int = layers, **changed: Any) -> Point:
        asked = {"rows": 4, "length": length, "rank": rank, **changed}
        return Point(curve, value, depth, Case(f"{curve}-{value}", "scaling", target_rank=asked["rank"] // 2, **asked))

    for value in (4, 8) if quick else (8, 16, 32, 64, 128):
        yield point("rank", value, rank=value)
    for rows in (2, 4) if quick else (1, 2, 4, 8, 16):
        yield point("tokens", rows * length, rows=rows)
    for depth in (1, 2) if quick else (2, 4, 8, 16):
        yield point("layers", depth, depth)
    for targets in _MATRICES[2:] if quick else _MATRICES:
        yield point("matrices", len(targets) * layers, targets=targets)


def steps(quick: bool, rounds: int, reporter: Any) -> list[dict[str, Any]]:
    """Ratios of every method that can run here at every point."""
    found = []
    missing = {name: reason for name in METHODS if (reason := REGISTRY[name].available()) is not None}
    for name, reason in missing.items():
        reporter.say(f"{name} is skipped: {reason}")
    names = tuple(name for name in METHODS if name not in missing)
    arithmetic = Arithmetic()
    for point in points(quick):
        config = {**(_TINY if quick else _LAYER), "num_hidden_layers": point.layers}
        base = load_model(ModelCase("scaling", "a random Llama", config=tuple(config.items())))
        options = Options(names, rounds, memory=False, counts=False)
        result = Run(point.case, base, options, reporter, arithmetic)()
        trainable = result["methods"]["instantaneous"]["trainable"]
        found.append(
            {
                "curve": point.curve,
                "value": point.value,
                "adapter_parameters": trainable,
                **{key: result[key] for key in ("case", "step", "ratios")},
            }
        )
    return found


def _timed(run: Callable[[], object], repeats: int) -> dict[str, float]:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return quartiles(seconds)


def scoring(quick: bool, repeats: int) -> list[dict[str, Any]]:
    """Score update and orthogonality penalty over banks of growing size: matrices of 32 rows of 576."""
    found = []
    rank, length = (4, 16) if quick else (32, 576)
    for matrices in (2, 4) if quick else (15, 30, 60, 120, 240, 480, 960):
        size = matrices * rank * length
        weight, path, mean, deviation = (torch.rand(size) for _ in range(4))
        regions, groups = [0, matrices * rank, length], [0, matrices, rank, length]
        rows, parts, grad = row_table(regions), work_table(groups), torch.zeros(size)

        def score() -> None:
            importance_update(weight, path, mean, deviation, regions, table=rows)  # noqa: B023

        def penalty() -> None:
            orthogonality_grad_(weight, grad, groups, 0.1, table=parts)  # noqa: B023

        found.append(
            {"parameters": size, "scores_s": _timed(score, repeats), "orthogonality_s": _timed(penalty, repeats)}
        )
    return found


def allocation(quick: bool, repeats: int) -> list[dict[str, Any]]:
    """Allocation over growing numbers of triplets, half of which stay."""
    found = []
    for exponent in (2, 3) if quick else (3, 3.5, 4, 4.5, 5, 5.5, 6):
        n = round(10**exponent)
        scores = torch.rand(n, generator=torch.Generator().manual_seed(0))
        layer, budget = torch.arange(n) // 32, torch.tensor(n // 2)
        live = allocate_triplets(scores, budget, layer)
        if int(live.sum()) != n // 2:
            raise RuntimeError(f"expected {n // 2} live triplets of {n}, got {int(live.sum())}")
        found.append({"triplets": n, "seconds": _timed(lambda: allocate_triplets(scores, budget, layer), repeats)})  # noqa: B023
    return found


class _Lines:
    """Tells each point once."""

    def __init__(self) -> None:
        self._last = ""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def total(self, ticks: int) -> None:
        pass

    def tick(self, text: str) -> None:
        point = text.partition(":")[0]
        if point != self._last:
            self.say(point)
        self._last = point


def main(arguments: list[str] | None = None) -> int:
    """Measure all curves and write their record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run")
    parser.add_argument("--rounds", type=int, default=6, help="repetitions of every step (default 6)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/scaling/<date>-<machine>.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    allocator.keep_freed_memory()
    start, lines, opened = time.perf_counter(), _Lines(), open_record()
    lines.say("scoring and allocation")
    operators = {name: measure(options.quick, 3 if options.quick else 15) for name, measure in _OPERATORS.items()}
    with quiet_peft():
        results = steps(options.quick, options.rounds, lines)
    record = close_record(opened, results, time.perf_counter() - start) | operators
    output = keep(record, options.output or FOLDER / standard_file(record).name)
    print(f"written: {output}  ({record['seconds_in_all']:.0f} s)")
    return 0


_OPERATORS: dict[str, Callable[[bool, int], list[dict[str, Any]]]] = {"scoring": scoring, "allocation": allocation}


if __name__ == "__main__":
    sys.exit(main())
