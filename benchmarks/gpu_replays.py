"""Training steps replayed as CUDA graphs, which leaves the device's work alone; of methods whose step never waits for the host."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from gpu_machine import Deadline

from igulora.benchmarks.methods import Batch, Igulora, Method
from igulora.benchmarks.ratios import paired_ratios, quartiles
from igulora.kernels import allocate_triplets, importance_update, orthogonality_grad_

if TYPE_CHECKING:
    from gpu_steps import Steps


class Replay:
    """A captured step together with what it was captured from: a graph keeps no tensor that was there before it alive.

    Args:
        graph: the capture. run: the step, whose closure holds the inputs and states that the graph reads and writes.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, run: Callable[[], object]) -> None:
        self._graph, self._run = graph, run

    def __call__(self) -> None:
        self._graph.replay()


def captured(steps: Steps, deadline: Deadline) -> dict[str, Any]:
    """Steps replayed as CUDA graphs, for methods whose step never waits for the host."""
    replays: dict[str, Callable[[], object]] = {}
    result: dict[str, Any] = {}
    for name, step in (("floor", _floor), ("instantaneous", _ours), ("peft-lora", _plain)):
        if name not in steps.methods:
            result[name] = {"skipped": "it did not run eagerly"}
            continue
        try:
            run = step(steps.methods[name], steps.batch)
            replays[name] = capture(run) if steps.clock.cuda else run
        except Exception:
            result[name] = {"error": traceback.format_exc()}
            steps.clock.synchronize()
    result["peft-adalora"] = {"skipped": "its step reads from the device (masks are chosen on the host)"}
    times, failed = steps.clock.interleaved(replays, seconds=max(deadline.left - 2, 1), rounds=(5, 30))
    result |= {name: {"error": text} for name, text in failed.items()}
    return {
        "methods": result,
        "captured": steps.clock.cuda,
        "step": {name: quartiles([t / 1e3 for t in series]) for name, series in times.items()},
        "ratios": paired_ratios(times),
    }


def capture(run: Callable[[], object]) -> Replay:
    """Record what a step launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and gives autograd, cuBLAS and the optimizer what they keep
            run()
    torch.cuda.synchronize()
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
