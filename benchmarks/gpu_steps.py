"""A whole training step on a GPU: ours, PEFT's LoRA and AdaLoRA, and the frozen floor; paired, interleaved, one process.

The methods are those of ``methods/``, on one randomly initialised Llama whose frozen weights they share. A time is that of a block of
steps as long as a scoring window, from a device at rest to a device at rest, divided by its steps: all kinds of step that an estimator
has take part by their share, and the host runs ahead of the device as it does in training. Afterwards the steps of those that can be
captured are replayed as CUDA graphs, which leaves the device's work alone, and taken with compiled models, which is nearly that.
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
from torch import Tensor, nn

from igulora.benchmarks.cases import Case
from igulora.benchmarks.checks import check_start
from igulora.benchmarks.methods import Batch, Floor, Igulora, Instantaneous, Method, PeftAdaLora, PeftLora
from igulora.benchmarks.ratios import paired_ratios, quartiles
from igulora.kernels import allocate_triplets, importance_update, orthogonality_grad_
from igulora.kernels.backend import use_backend

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


class Replay:
    """A captured step together with what it was captured from: a graph keeps no tensor that was there before it alive.

    Args:
        graph: the capture. run: the step, whose closure holds the inputs and states that the graph reads and writes.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, run: Callable[[], object]) -> None:
        self._graph, self._run = graph, run

    def __call__(self) -> None:
        self._graph.replay()


_COMPILING = 45  # seconds that a model takes to compile


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
    """The methods of one comparison, built when first asked for.

    Attributes:
        methods: those that run here. outcome: what is known of each.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
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

    def build(self, deadline: Deadline) -> dict[str, Any]:
        """Every method on the shared weights, checked and brought into its pruning phase; what each keeps, and needs for a step."""
        choices = self._tuned()
        with torch.no_grad():
            reference = self.base(input_ids=self.small["input_ids"]).logits
        for name, kind in METHODS.items():
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
        """Measure the products of ours: of the batch, and of a batch with path rows appended."""
        head = self.base.get_output_embeddings()
        linears = [m for m in self.base.modules() if isinstance(m, nn.Linear) and m is not head]
        layers = sorted({(m.out_features, m.in_features) for m in linears})
        rows = [self.case.rows * self.case.length, (self.case.rows + 1) * self.case.length]
        return (
            tuned(self.setting, layers[:1], rows[:1], self.case.rank)
            if self.setting.tiny
            else tuned(self.setting, layers, rows, self.case.rank)
        )

    def _add(self, name: str, kind: type[Method], reference: Tensor) -> dict[str, Any]:
        before = self._held()
        torch.manual_seed(0)
        shared = {id(p): p for p in self.base.parameters()}
        method = kind(copy.deepcopy(self.base, shared), self.case)
        change = check_start(name, method, reference, self.small)
        method.prepare(self.small)
        held = self._held()
        if self.clock.cuda:
            torch.cuda.reset_peak_memory_stats(self.setting.device)
        for _ in range(1 if self.setting.tiny else 2 * getattr(getattr(method, "config", None), "window", 1)):
            method.step(self.batch)
        self.methods[name] = method
        facts = {"title": method.title, "trainable": method.trainable(), "change_at_start": change}
        if self.clock.cuda:
            peak = torch.cuda.max_memory_allocated(self.setting.device)
            facts["memory"] = {"held": held - before, "peak": peak - before}
        return facts

    def _model(self) -> dict[str, Any]:
        weights = sum(p.numel() for p in self.base.parameters())
        linears = sum(isinstance(m, nn.Linear) for m in self.base.modules()) - 1
        return {"parameters": weights, "linears": linears, **self.base.config.to_diff_dict()}

    # -- eager --------------------------------------------------------------------------------------------------------

    def _block(self, method: Method, steps: int) -> float:
        """Seconds per step of a block."""
        gc.collect()
        gc.disable()
        try:
            self.clock.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                torch.compiler.cudagraph_mark_step_begin()
                loss = method.step(self.batch)
            self.clock.synchronize()
            elapsed = time.perf_counter() - start
        finally:
            gc.enable()
        if not torch.isfinite(loss):
            raise RuntimeError(f"expected a finite loss from {method.name}, got {loss.item()}")
        return elapsed / steps

    def eager(self, deadline: Deadline) -> dict[str, Any]:
        """Rounds in which every method takes a block of steps, in alternating order, until the time is over."""
        least, most = (1, 1) if self.setting.tiny else (2, 4) if self.setting.quick else (3, 12)
        steps, order = self.window, list(self.methods)
        times: Times = {name: [] for name in order}
        until = deadline.at - 0.4 * max(deadline.left, 0)  # the rest is for the graphs
        for turn in range(most):
            if turn >= least and time.time() > until:
                break
            for name in order if turn % 2 else reversed(order):
                times[name].append(self._block(self.methods[name], steps))
        for name, method in self.methods.items():
            capacity = self.case.rank * self._model()["linears"]
            live = method.live()
            if method.adaptive and not (live is not None and 0 < live < capacity):
                raise RuntimeError(f"expected {name} to have pruned some of {capacity} triplets, got {live} live")
        return {
            "steps_in_block": steps,
            "rounds": len(next(iter(times.values()), [])),
            "seconds": times,
            "step": {name: quartiles(series) for name, series in times.items()},
            "ratios": paired_ratios(times),
        }

    # -- torch.compile ------------------------------------------------------------------------------------------------

    def compiled(self, deadline: Deadline) -> dict[str, Any]:
        """Steps whose model runs under torch.compile with CUDA graphs of its passes, which leave little to the host."""
        if not self.clock.cuda:
            return {"skipped": "needs a CUDA device"}
        result: dict[str, Any] = {}
        running: dict[str, Method] = {}
        eager = {name: method.model for name, method in self.methods.items()}
        try:
            for name in [name for name in ("floor", "instantaneous", "peft-lora") if name in self.methods]:
                if deadline.left < _COMPILING:
                    result[name] = {"cut": "the part's time was over"}
                    continue
                method = self.methods[name]
                method.model = torch.compile(method.model, mode="reduce-overhead", dynamic=False)
                start = time.perf_counter()
                try:
                    self._block(method, 4)  # compiles, warms up, records
                    running[name] = method
                    result[name] = {"compiling_s": round(time.perf_counter() - start, 1)}
                except Exception:
                    result[name] = {"error": traceback.format_exc()}
                    self.clock.synchronize()
            times: Times = {name: [] for name in running}
            while running and (len(next(iter(times.values()))) < 3 or deadline.left > 10):
                for name, method in running.items():
                    times[name].append(self._block(method, 8))
                if len(times[name]) == 12:
                    break
        finally:
            for name, model in eager.items():
                self.methods[name].model = model
        step = {name: quartiles(series) for name, series in times.items()}
        return {"methods": result, "step": step, "ratios": paired_ratios(times)}

    # -- CUDA graphs --------------------------------------------------------------------------------------------------

    def graphs(self, deadline: Deadline) -> dict[str, Any]:
        """Steps replayed as CUDA graphs, for methods whose step never waits for the host."""
        replays: dict[str, Callable[[], object]] = {}
        result: dict[str, Any] = {}
        for name, capture in (("floor", _floor), ("instantaneous", _ours), ("peft-lora", _plain)):
            if name not in self.methods:
                result[name] = {"skipped": "it did not run eagerly"}
                continue
            try:
                run = capture(self.methods[name], self.batch)
                replays[name] = self._captured(run) if self.clock.cuda else run
            except Exception:
                result[name] = {"error": traceback.format_exc()}
                self.clock.synchronize()
        result["peft-adalora"] = {"skipped": "its step reads from the device (masks are chosen on the host)"}
        times, failed = self.clock.interleaved(replays, seconds=max(deadline.left - 2, 1), rounds=(5, 30))
        result |= {name: {"error": text} for name, text in failed.items()}
        return {
            "methods": result,
            "captured": self.clock.cuda,
            "step": {name: quartiles([t / 1e3 for t in series]) for name, series in times.items()},
            "ratios": paired_ratios(times),
        }

    def _captured(self, run: Callable[[], object]) -> Replay:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, and gives autograd, cuBLAS and the optimizer what they keep
                run()
        torch.cuda.synchronize(self.setting.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            run()
        return Replay(graph, run)


def _floor(method: Method, batch: Batch) -> Callable[[], object]:
    embedded = method.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def run() -> None:
        loss = method.model(inputs_embeds=embedded, labels=batch["labels"]).loss
        torch.autograd.grad(loss, embedded)

    return run


def _optimizer(method: Method) -> torch.optim.Optimizer:
    """A fresh optimizer like the method's own, whose step may be captured."""
    assert method.optimizer is not None
    groups = [
        {k: v for k, v in group.items() if k in ("params", "lr", "weight_decay")}
        for group in method.optimizer.param_groups
    ]
    return torch.optim.AdamW(groups, fused=True, capturable=torch.cuda.is_available())


def _plain(method: Method, batch: Batch) -> Callable[[], object]:
    """LoRA: forward, backward, optimizer."""
    optimizer = _optimizer(method)

    def run() -> None:
        method.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return run


def _ours(method: Method, batch: Batch) -> Callable[[], object]:
    """Ours without path rows: forward, backward, orthogonality, optimizer, scores, allocation, at the budget of the last step."""
    assert isinstance(method, Igulora)
    bank, scores, config = method.controller.bank, method.controller.importance, method.config
    optimizer = _optimizer(method)
    groups, regions = list(bank.layout.groups), list(bank.layout.regions)
    budget = torch.tensor(method.controller.budget, device=bank.device)
    bank.bind_grads()
    # The guard against a forgotten step counts passes on the host: replays are none.
    bank.context.allowed_unstepped = 1 << 60

    def run() -> None:
        method.model(**batch).loss.backward()
        orthogonality_grad_(bank.weight, bank.grad, groups, config.orthogonality, table=bank.matrix_table)
        optimizer.step()
        stats, _ = importance_update(
            bank.weight,
            bank.grad,
            scores.mean,
            scores.deviation,
            regions,
            combine=config.combine,
            table=bank.score_table,
        )
        terms = stats.view(4, 3, bank.triplets)[0]
        live = allocate_triplets(bank.lambdas.abs() + terms[1] + terms[2], budget, bank.layer_index)
        bank.lambdas.mul_(live)
        bank.grad.zero_()

    return run


def items(setting: Setting) -> Iterator[tuple[str, Callable[[Deadline], dict[str, Any]]]]:
    """Building and memory; eager, captured and compiled steps."""
    steps = Steps(setting)
    yield "methods", steps.build
    yield "eager", steps.eager
    yield "graphs", steps.graphs
    yield "compiled", steps.compiled
