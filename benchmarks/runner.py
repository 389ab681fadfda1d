"""Times whole training steps of several methods: checked first, then paired and interleaved in one process.

Every round runs each method once, forwards and backwards in turn; what counts is the ratio of two methods within a round, its median and
quartiles over the rounds. Before anything is timed, a fresh adapter must leave the model's outputs as they are, and a method's gradients
and path samples must be those of a float64 computation; afterwards the adaptive methods must really have pruned. What does not fit into
memory is reported, and the rest goes on.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from igulora.errors import first_line

from .cases import MODELS, Case
from .checks import Arithmetic, check_start
from .counts import count_step
from .memory import peak_memory
from .methods import METHODS, Method
from .models import load_model, make_batch, small_batch
from .ratios import Times, paired_ratios, quartiles

Batch = dict[str, Tensor]


class Reporter(Protocol):
    """Who is told how a run goes: lines to print, and ticks of a progress bar of ``total`` of them."""

    def say(self, text: str) -> None:
        """A line."""

    def total(self, ticks: int) -> None:
        """How many more ticks there will be."""

    def tick(self, text: str) -> None:
        """One more thing is done; ``text`` says what comes next."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a case is measured.

    Attributes:
        methods: names of :data:`METHODS`, in the order of the tables.
        rounds: repetitions of every method.
        memory, counts: whether to measure the memory of a step, and to count its launches and host syncs.
        clock: seconds, rising.
    """

    methods: tuple[str, ...]
    rounds: int = 6
    memory: bool = True
    counts: bool = True
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    clock: Callable[[], float] = time.perf_counter


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or (where PyTorch has no class for it) on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


def build(name: str, base: nn.Module, case: Case) -> Method:
    """A method on modules of its own around the frozen tensors of ``base``; the random start is the same at every call."""
    torch.manual_seed(0)
    shared: dict[int, Any] = {id(t): t for t in (*base.parameters(), *base.buffers())}
    return METHODS[name](copy.deepcopy(base, shared), case)


def check_pruned(name: str, method: Method, capacity: int | None) -> int | None:
    """Triplets live at the end.

    Raises:
        RuntimeError: an adaptive method has not pruned: its steps were not those that it should be timed at.
    """
    live = method.live()
    if method.adaptive and not (live is not None and capacity is not None and 0 < live < capacity):
        raise RuntimeError(
            f"expected {name} to have pruned some of its {capacity} triplets while it was timed, got {live} live"
        )
    return live


class Run:
    """One case: its methods, built and checked, then timed, counted and measured.

    Args:
        base: the frozen model, on the device of ``options``.
        arithmetic: what was checked of the methods already, in a run of several cases.
    """

    def __init__(
        self, case: Case, base: nn.Module, options: Options, reporter: Reporter, arithmetic: Arithmetic | None = None
    ) -> None:
        self.case, self.base, self.options, self.reporter = case, base, options, reporter
        self.arithmetic = arithmetic or Arithmetic(options.device)
        self.batch, self.small = (
            {k: v.to(options.device) for k, v in batch.items()}
            for batch in (make_batch(base, case.rows, case.length), small_batch(base, case))
        )
        self.methods: dict[str, Method] = {}
        self.result: dict[str, Any] = {"case": dataclasses.asdict(case), "rounds": options.rounds, "methods": {}}

    def __call__(self) -> dict[str, Any]:
        """Everything that ``options`` ask for, as JSON-able values."""
        phases = 2 + self.options.rounds + self.options.memory
        self.reporter.total(phases * len(self.options.methods))
        self._build()
        times = self._time()
        for name, method in self.methods.items():
            found = self.result["methods"][name]
            found["live_at_end"] = check_pruned(name, method, found["live_at_start"])
        self.result["seconds"] = times
        self.result["step"] = {name: quartiles(series) for name, series in times.items()}
        self.result["ratios"] = paired_ratios(times)
        if self.options.counts:
            self.result["counts"] = {name: count_step(method, self.small) for name, method in self.methods.items()}
        names = list(self.methods)
        self.methods.clear()  # their memory is not what the next part measures
        if self.options.memory:
            self.result["memory"] = {}
            for name in names:
                self._guarded(name, lambda name=name: self._memory(name))  # type: ignore[misc]
                self.reporter.tick(f"{self.case.name}: memory of {name}")
        return self.result

    def _guarded(self, name: str, run: Callable[[], object]) -> bool:
        """Run something of one method; where memory does not suffice or a package does not import it is out, which is reported: False."""
        try:
            run()
            return True
        except Exception as error:
            if not (out_of_memory(error) or isinstance(error, ImportError)):
                raise
            what = "out of memory" if out_of_memory(error) else "cannot be imported"
            reason = first_line(error)
        self.methods.pop(name, None)
        self.result["methods"].setdefault(name, {"title": METHODS[name].title})["error"] = f"{what}: {reason}"
        self.reporter.say(f"  {self.case.name}: {name} is left out, {what}: {reason}")
        gc.collect()
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _build(self) -> None:
        with torch.no_grad():
            reference = self.base(input_ids=self.small["input_ids"]).logits

        def one(name: str) -> None:
            method = build(name, self.base, self.case)
            change = check_start(name, method, reference, self.small)
            start = method.capacity()
            method.prepare(self.small)
            self.methods[name] = method
            self.result["methods"][name] = {
                "title": method.title,
                "trainable": method.trainable(),
                "change_at_start": change,
                # In the dtype in which an error shows best, and in the one that is timed.
                **self.arithmetic.errors(name, {METHODS[name].check_dtype, next(self.base.parameters()).dtype}),
                "kinds": method.kinds(),
                "live_at_start": start,
            }

        for name in self.options.methods:
            self.reporter.tick(f"{self.case.name}: building {name}")
            self._guarded(name, lambda name=name: one(name))  # type: ignore[misc]

    def _time(self) -> Times:
        """Interleaved step times in seconds.

        Per method one time per round, averaged over its kinds of step by their share; besides ``name:kind`` for each kind of a method
        that has several.
        """
        times: Times = {}
        for turn in range(
            -1, self.options.rounds
        ):  # turn -1 warms up: first use of a shape allocates and packs weights
            order = list(self.methods) if turn % 2 else list(reversed(self.methods))
            for name in order:
                what = f"round {turn + 1} of {self.options.rounds}" if turn >= 0 else "warming up"
                self.reporter.tick(f"{self.case.name}: {what}")
                found: dict[str, float] = {}
                if not self._guarded(name, lambda name=name, found=found: found.update(self._kinds(name))):  # type: ignore[misc]
                    times = {key: series for key, series in times.items() if key.partition(":")[0] != name}
                elif turn >= 0:
                    for key, seconds in found.items():
                        times.setdefault(key, []).append(seconds)
        return times

    def _kinds(self, name: str) -> dict[str, float]:
        """Seconds of one step of each kind, and of their weighted mean."""
        method, found = self.methods[name], {name: 0.0}
        kinds = method.kinds()
        for kind, share in kinds.items():
            method.seek(kind, self.small)
            seconds = self.step(method)
            method.check_kind(kind)
            found[name] += share * seconds
            if len(kinds) > 1:
                found[f"{name}:{kind}"] = seconds
        return found

    def step(self, method: Method) -> float:
        """Seconds of one step, from a device at rest to a device at rest, garbage collected before and not during it."""
        gc.collect()
        gc.disable()
        try:
            self._rest()
            start = self.options.clock()
            loss = method.step(self.batch)
            self._rest()
            elapsed = self.options.clock() - start
        finally:
            gc.enable()
        if not torch.isfinite(loss):
            raise RuntimeError(f"expected a finite loss from {method.name}, got {loss.item()}")
        return elapsed

    def _rest(self) -> None:
        if self.options.device.type == "cuda":
            torch.cuda.synchronize(self.options.device)

    def _memory(self, name: str) -> None:
        def make(model: nn.Module) -> Method:
            return build(name, model, self.case)

        self.result["memory"][name] = peak_memory(make, self.base, self.batch, self.small)


def run_cases(cases: list[Case], options: Options, reporter: Reporter) -> list[dict[str, Any]]:
    """All cases, each model loaded once.

    Raises:
        MissingExtra: the weights of a model are not installed.
        RuntimeError: a method's results are wrong, see ``checks.py`` and :func:`check_pruned`.
    """
    results = []
    arithmetic = Arithmetic(options.device)
    for name in dict.fromkeys(case.model for case in cases):
        base = load_model(MODELS[name]).to(options.device)
        for case in (case for case in cases if case.model == name):
            try:
                result = Run(case, base, options, reporter, arithmetic)()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                reporter.say(f"{case.name}: left out, not even the bare model fits into memory")
                continue
            result["case"] |= {"model_title": MODELS[name].title, "dtype": MODELS[name].dtype}
            results.append(result)
    return results
