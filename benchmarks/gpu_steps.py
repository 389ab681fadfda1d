"""A whole training step on a GPU: ours, PEFT's LoRA and AdaLoRA, and the frozen floor; paired, interleaved, one process.

The methods are those of ``methods/``, on one randomly initialised Llama whose frozen weights they share. A time is that of a block of
steps as long as a scoring window, from a device at rest to a device at rest, divided by its steps: all kinds of step that an estimator
has take part by their share, and the host runs ahead of the device as it does in training. Two batches: a short one, where the host is
what a step waits for, and a long one, where it may be the device. A profile of the short one says which, part by part. Its steps are also
taken without the host (``gpu_replays.py``).
"""

from __future__ import annotations

import copy
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from gpu_layers import tuned
from gpu_machine import Clock, Deadline, Setting, Times
from gpu_replays import captured
from torch import Tensor, nn

from igulora.benchmarks.cases import Case
from igulora.benchmarks.checks import check_start
from igulora.benchmarks.methods import Batch, Floor, Igulora, Instantaneous, Method, PeftAdaLora, PeftLora
from igulora.benchmarks.ratios import paired_ratios, quartiles
from igulora.kernels.backend import use_backend
from igulora.measure.parts import PARTS
from igulora.measure.profiling import profile_step

CONFIG = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "use_cache": False,
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "use_cache": False,
}


class SmallWindow(Igulora):
    """Ours with a scoring window that Triton's interpreter can get through."""

    options: ClassVar[dict[str, object]] = {"window": 1, "ig_every": 1}


class ByReference(Instantaneous):
    """Ours by its PyTorch reference: what the kernels replace."""

    name = "instantaneous-reference"
    title = "igulora, no path rows, PyTorch reference in place of the kernels"

    def step(self, batch: Batch) -> Tensor:
        with use_backend("reference"):
            return super().step(batch)


METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Floor, Instantaneous, Igulora, ByReference, PeftLora, PeftAdaLora)
}
_PROFILED = (Floor.name, Instantaneous.name, PeftLora.name, PeftAdaLora.name)
_LONG = (*_PROFILED, Igulora.name)


def model_of(setting: Setting) -> nn.Module:
    """The frozen base model. Its attention asks for no mask: making one waits for the device, in every method's every forward."""
    import transformers

    transformers.AttentionInterface.register("causal-sdpa", transformers.AttentionInterface()["sdpa"])
    config = transformers.LlamaConfig(**(TINY if setting.tiny else CONFIG), attn_implementation="causal-sdpa")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with torch.device(setting.device):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()


def tokens(setting: Setting, model: nn.Module, rows: int, length: int) -> Batch:
    """Random token sequences, each its own label."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator).to(setting.device)
    return {"input_ids": ids, "labels": ids}


class Steps:
    """The methods of one comparison.

    Args:
        kinds: which they are, by name.

    Attributes:
        methods: those that run here. outcome: what is known of each. batch, long: what the steps are taken on.
    """

    def __init__(self, setting: Setting, kinds: dict[str, type[Method]] = METHODS) -> None:
        self.setting, self.kinds = setting, kinds
        self.clock = Clock(setting.device)
        self.case = Case(
            "gpu",
            "llama",
            rows=4,
            length=16 if setting.tiny else 512,
            rank=2 if setting.tiny else 32,
            target_rank=1 if setting.tiny else 16,
        )
        self.base = model_of(setting)
        self.batch = tokens(setting, self.base, self.case.rows, self.case.length)
        self.long = tokens(setting, self.base, self.case.rows, 2 * self.case.length if setting.tiny else 2048)
        self.small = tokens(setting, self.base, self.case.rows, 8)
        self.methods: dict[str, Method] = {}
        self.outcome: dict[str, dict[str, Any]] = {}

    @property
    def window(self) -> int:
        """Steps in a block."""
        return next((m.config.window for m in self.methods.values() if type(m) in (Igulora, SmallWindow)), 1)

    def _held(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated(self.setting.device) if self.clock.cuda else 0

    # -- building -----------------------------------------------------------------------------------------------------

    def build(self, deadline: Deadline) -> dict[str, Any]:
        """Every method on the shared weights, checked and brought into its pruning phase, and what each keeps."""
        choices = self._tuned()
        with torch.no_grad():
            reference = self.base(input_ids=self.small["input_ids"]).logits
        for name, kind in self.kinds.items():
            if deadline.passed:
                self.outcome[name] = {"cut": "the part's time was over"}
                continue
            kind = SmallWindow if self.setting.tiny and kind is Igulora else kind
            if self.setting.tiny and kind is ByReference:
                continue
            try:
                self.outcome[name] = self._add(name, kind, reference)
            except ModuleNotFoundError as error:
                self.outcome[name] = {"skipped": str(error)}
            except Exception:
                self.outcome[name] = {"error": traceback.format_exc()}
                self.clock.synchronize()  # a device that is lost raises here, which ends the part
        case = {"rows": self.case.rows, "length": self.case.length, "r": self.case.rank}
        return {"methods": self.outcome, "model": self._model(), "case": case, "choices": choices}

    def _tuned(self) -> dict[str, Any]:
        """Measure the products of ours: of the batches, and of both with path rows appended."""
        head = self.base.get_output_embeddings()
        linears = [m for m in self.base.modules() if isinstance(m, nn.Linear) and m is not head]
        layers = sorted({(m.out_features, m.in_features) for m in linears})
        shapes = [batch["input_ids"].shape for batch in (self.batch, self.long)]
        rows = sorted({(count + extra) * length for count, length in shapes for extra in (0, 1)})
        if self.setting.tiny:
            layers, rows = layers[:1], rows[:1]
        return tuned(self.setting, layers, rows, self.case.rank)

    def _add(self, name: str, kind: type[Method], reference: Tensor) -> dict[str, Any]:
        before = self._held()
        torch.manual_seed(0)
        shared = {id(p): p for p in self.base.parameters()}
        method = kind(copy.deepcopy(self.base, shared), self.case)
        change = check_start(name, method, reference, self.small)
        method.prepare(self.small)
        self.methods[name] = method
        return {
            "title": method.title,
            "trainable": method.trainable(),
            "change_at_start": change,
            "held": self._held() - before,
        }

    def _model(self) -> dict[str, Any]:
        weights = sum(p.numel() for p in self.base.parameters())
        linears = sum(isinstance(m, nn.Linear) for m in self.base.modules()) - 1
        return {"parameters": weights, "linears": linears, **self.base.config.to_diff_dict()}

    # -- eager --------------------------------------------------------------------------------------------------------

    def block(self, method: Method, batch: Batch, steps: int) -> float:
        """Seconds per step of a block."""
        gc.collect()
        gc.disable()
        try:
            self.clock.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                torch.compiler.cudagraph_mark_step_begin()
                loss = method.step(batch)
            self.clock.synchronize()
            elapsed = time.perf_counter() - start
        finally:
            gc.enable()
        if not torch.isfinite(loss):
            raise RuntimeError(f"expected a finite loss from {method.name}, got {loss.item()}")
        return elapsed / steps

    def eager(self, batch: Batch, names: list[str], deadline: Deadline) -> dict[str, Any]:
        """Rounds in which every method takes a block of steps, in alternating order, until the time is over; the first only warms up.

        Memory is that of the first round: what a method holds, and what its steps allocate beyond it.
        """
        order = [name for name in names if name in self.methods]
        memory = {name: self._peak(name, batch) for name in order}
        least, most = (1, 1) if self.setting.tiny else (2, 4) if self.setting.quick else (3, 12)
        times: Times = {name: [] for name in order}
        for turn in range(most):
            if turn >= least and deadline.passed:
                break
            for name in order if turn % 2 else reversed(order):
                times[name].append(self.block(self.methods[name], batch, self.window))
        for name in order:
            method, capacity = self.methods[name], self.case.rank * self._model()["linears"]
            live = method.live()
            if method.adaptive and not (live is not None and 0 < live < capacity):
                raise RuntimeError(f"expected {name} to have pruned some of {capacity} triplets, got {live} live")
        return {
            "batch": list(batch["input_ids"].shape),
            "steps_in_block": self.window,
            "rounds": len(next(iter(times.values()), [])),
            "seconds": times,
            "step": {name: quartiles(series) for name, series in times.items()},
            "ratios": paired_ratios(times),
            "memory": memory if self.clock.cuda else {},
        }

    def _peak(self, name: str, batch: Batch) -> dict[str, int]:
        """Bytes beyond the frozen model: held between steps, and at the peak of a step (of a window: all kinds there are)."""
        before, held = self._held(), self.outcome[name]["held"]
        if self.clock.cuda:
            torch.cuda.reset_peak_memory_stats(self.setting.device)
        self.block(self.methods[name], batch, self.window)
        peak = torch.cuda.max_memory_allocated(self.setting.device) if self.clock.cuda else before
        return {"held": held, "peak": peak - before + held}

    # -- where the time goes ------------------------------------------------------------------------------------------

    def profile(self, deadline: Deadline) -> dict[str, Any]:
        """A step of the short batch under the profiler, by part: on the device, on the host, and kernels launched."""
        found: dict[str, Any] = {}
        for name in [name for name in _PROFILED if name in self.methods]:
            if deadline.passed:
                found[name] = {"cut": "the part's time was over"}
                continue
            method = self.methods[name]
            kind = next(iter(method.kinds()))
            try:
                profile = profile_step(
                    lambda method=method: method.step(self.batch),  # type: ignore[misc]
                    method.model,
                    before=lambda method=method, kind=kind: method.seek(kind, self.small),  # type: ignore[misc]
                    warmup=2,
                    adapted=name != Floor.name,
                    title=method.title,
                )
            except Exception:
                found[name] = {"error": traceback.format_exc()}
                self.clock.synchronize()
                continue
            columns = ("seconds", "host_seconds", "kernels", "launches", "waits")
            found[name] = {
                "wall_seconds": profile.wall_seconds,
                "profiled_seconds": profile.profiled_seconds,
                "parts": {part: {key: getattr(profile.parts[part], key) for key in columns} for part in PARTS},
            }
        return {"methods": found, "batch": list(self.batch["input_ids"].shape)}


def items(setting: Setting) -> Iterator[tuple[str, Callable[[Deadline], dict[str, Any]]]]:
    """Building; eager steps of both batches, their profile, captured steps."""
    steps = Steps(setting)
    runs: dict[str, Callable[[Deadline], dict[str, Any]]] = {
        "methods": steps.build,
        "eager": lambda deadline: steps.eager(steps.batch, list(METHODS), deadline.within(0.3)),
        "eager, long": lambda deadline: steps.eager(steps.long, list(_LONG), deadline.within(0.5)),
        "profile": steps.profile,
        "graphs": lambda deadline: captured(steps, deadline),
    }
    for name, run in runs.items():
        yield name, _by_reference(run) if setting.tiny else run


def _by_reference(run: Callable[[Deadline], dict[str, Any]]) -> Callable[[Deadline], dict[str, Any]]:
    """Triton's interpreter would take a minute for these steps, and layers and kernels are interpreted anyway."""

    def plainly(deadline: Deadline) -> dict[str, Any]:
        with use_backend("reference"):
            return run(deadline)

    return plainly
