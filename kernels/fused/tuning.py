"""Measuring the forms of one base product: run each, check it against the library, time it, take the fastest.

Contract. Operands are drawn here, with a generator of their own, so that the caller's random numbers and tensors stay as they are. A
form counts only if its result is the library's up to the dtype's rounding; one that is wrong or cannot run is left out and its reason
kept. All forms are timed in turns, so that a clock that drifts drifts for all; before each run the L2 cache is overwritten, since a
layer's weight comes from memory in training. The library wins unless another form's median is below its own by more than the spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import choice_file
from . import gemm
from .choice import LIBRARY, Problem, Product, adopt, candidates, environment
from .common import family, padded_rank
from .product import base_product

_WARM_UP, _ROUNDS, _ROUNDS_ON_CPU = 3, 20, 3
_LEAST_GAIN = 0.01  # of the library's time: less is noise on any device
_DROPOUT = 0.1
_FLUSH_BYTES = 256 << 20  # several times any L2; writing it also gives the host time to enqueue the run that is timed

Runs = Mapping[Product, Callable[[], Tensor]]
Timer = Callable[[Runs], dict[Product, list[float]]]  # milliseconds of each run of each form


class Timing(NamedTuple):
    """Median of the runs and half of the distance between their quartiles, in milliseconds."""

    median: float
    spread: float


@dataclass(frozen=True)
class Measurement:
    """What was measured for a problem.

    Attributes:
        product: the form to use. rows, rank: measured with. timings: of the forms that were right. dropped: why others do not count.
    """

    problem: Problem
    rows: int
    rank: int
    product: Product
    timings: dict[Product, Timing]
    dropped: dict[Product, str]

    def entry(self) -> dict[str, Any]:
        """As the file of choices holds it."""
        return {
            "product": str(self.product),
            "ms": round(self.timings[self.product].median, 6),
            "library_ms": round(self.timings[LIBRARY].median, 6),
            "rows": self.rows,
            "rank": self.rank,
            "tried_ms": {str(product): round(timing.median, 6) for product, timing in self.timings.items()},
            "dropped": {str(product): reason for product, reason in self.dropped.items()},
        }


def tune(problem: Problem, rows: int, rank: int, device: torch.device) -> Measurement:
    """Measure a problem, keep the choice on disk and use it from now on."""
    measured = measure(problem, rows, rank, device)
    choice_file.add(environment(device), {str(problem): measured.entry()})
    adopt(device, problem, measured.product)
    return measured


def measure(problem: Problem, rows: int, rank: int, device: torch.device, timer: Timer | None = None) -> Measurement:
    """Time the forms of a problem with so many rows and this rank.

    Args:
        timer: replaces the device's own.

    Raises:
        torch.OutOfMemoryError: operands and results do not fit.
    """
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        runs, dropped = _right_runs(problem, rows, rank, device)
        timings = {product: _timing(times) for product, times in (timer or _timer(device))(runs).items()}
    return Measurement(problem, rows, rank, fastest(timings), timings, dropped)


def fastest(timings: Mapping[Product, Timing]) -> Product:
    """The form with the least median, of those that beat the library by more than the noise of both; the library where none does."""
    library = timings[LIBRARY]

    def beats_it(timing: Timing) -> bool:
        return timing.median + max(_LEAST_GAIN * library.median, library.spread, timing.spread) < library.median

    better = [product for product, timing in timings.items() if beats_it(timing)]
    return min(better, key=lambda product: timings[product].median, default=LIBRARY)


def _right_runs(
    problem: Problem, rows: int, rank: int, device: torch.device
) -> tuple[dict[Product, Callable[[], Tensor]], dict[Product, str]]:
    """The forms whose results are right, and why the others are not; all of them are compiled after this."""
    operands = _operands(problem, rows, rank, device)
    A, weight = operands[:2]

    def run_of(product: Product) -> Callable[[], Tensor]:
        return lambda: base_product(
            *operands, transposed=problem.transposed, temporary=problem.temporary, product=product
        )

    runs = {LIBRARY: run_of(LIBRARY)}
    dropped: dict[Product, str] = {}
    expected = runs[LIBRARY]()
    for product in candidates(problem, family(device))[1:]:
        if product.form == "descriptors" and not gemm.fits_descriptors(A, weight):
            dropped[product] = "row strides are no multiples of 16 bytes"
            continue
        run = run_of(product)
        try:
            wrong = _difference(run(), expected)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways, and whatever the failure, the library is there
            dropped[product] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if wrong:
            dropped[product] = wrong
        else:
            runs[product] = run
    return runs, dropped


def _operands(problem: Problem, rows: int, rank: int, device: torch.device) -> tuple[Any, ...]:
    """Arguments of ``base_product`` up to dropout; both terms are of size one, so that neither hides a fault in the other."""
    g = torch.Generator(device).manual_seed(0)
    N, K, dtype = problem.columns, problem.inner, problem.dtype

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype, device=device)

    A = normal(rows, K, dtype=dtype)
    weight = normal(*((N, K) if problem.transposed else (K, N)), dtype=dtype).mul_(K**-0.5)
    S = torch.zeros((rows, padded_rank(rank)), dtype=dtype, device=device)
    S[:, :rank] = normal(rows, rank)
    F = normal(rank, N).mul_(rank**-0.5)
    coef = (1.0 + 0.1 * normal(rank), torch.ones(rank, device=device), 1.0) if problem.transposed else None
    seed = torch.ones((), dtype=torch.int64, device=device) if problem.dropout else None
    return A, weight, S, F, coef, None, None, seed, _DROPOUT if problem.dropout else 0.0


def _difference(got: Tensor, expected: Tensor) -> str | None:
    """What is wrong with a result, or None. The bound catches a row, column or term that is missing, not a rounding more."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"gave {tuple(got.shape)} {got.dtype} instead of {tuple(expected.shape)} {expected.dtype}"
    bound = max(4 * torch.finfo(got.dtype).eps, 2e-3) * float(expected.abs().max())
    worst = float((got - expected).abs().max())
    return None if worst <= bound else f"differs from the library's result by {worst:.3g}, more than {bound:.3g}"


def _timing(times: list[float]) -> Timing:
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, (third - first) / 2)


def _timer(device: torch.device) -> Timer:
    return _event_times if device.type == "cuda" else host_times


def host_times(runs: Runs, clock: Callable[[], float] = time.perf_counter) -> dict[Product, list[float]]:
    """By the host's clock, for devices that compute as they are told: the interpreter's."""
    times: dict[Product, list[float]] = {product: [] for product in runs}
    for _ in range(_ROUNDS_ON_CPU):
        for product, run in runs.items():
            start = clock()
            run()
            times[product].append(1e3 * (clock() - start))
    return times


def _event_times(runs: Runs) -> dict[Product, list[float]]:
    """By the device's events, on the current CUDA device and stream."""
    for run in runs.values():
        for _ in range(_WARM_UP):
            run()
    flushed = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events: dict[Product, list[tuple[Any, Any]]] = {product: [] for product in runs}
    for _ in range(_ROUNDS):
        for product, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            start.record()
            run()
            end.record()
            events[product].append((start, end))
    torch.cuda.synchronize()
    return {product: [start.elapsed_time(end) for start, end in pairs] for product, pairs in events.items()}
