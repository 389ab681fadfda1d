"""Data-parallel processes end where one process ends that trains on all their rows: DistributedDataParallel, FSDP2, accelerate."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import igulora

pytestmark = pytest.mark.slow  # starting six processes

ESTIMATORS: dict[str, dict[str, Any]] = {
    "gauss, mixed": {"estimator": "gauss"},
    "gauss, separate": {"estimator": "gauss", "path_pass": "separate"},
    "stratified, mixed": {"estimator": "stratified"},
    "trapezoid, mixed": {"estimator": "trapezoid", "nodes": 5},
    "trapezoid with f(0), separate": {
        "estimator": "trapezoid", "nodes": 5, "include_f0": True, "path_pass": "separate"
    },
    "on-path": {"estimator": "on-path", "normalize": "none"},
    "on-path-stratified": {"estimator": "on-path-stratified", "normalize": "none"},
    "instantaneous": {"estimator": "instantaneous"},
    "adalora": {"method": "adalora"},
}  # fmt: skip
PASSES = ("gauss, mixed", "gauss, separate")
WRAPS: dict[str, dict[str, Any]] = {
    "static graph": {"static_graph": True},
    "bucket views": {"gradient_as_bucket_view": True},
    "find unused": {"find_unused_parameters": True},
}
# What DistributedDataParallel's options, checkpointing and FSDP2 must not change, so the same run of one process is its reference.
_FREE = {"wrap", "recompute", "inner", "no_sync", "fully_sharded"}

TWO: dict[str, dict[str, Any]] = {f"ddp: {name}": {"config": config} for name, config in ESTIMATORS.items()}
MOVES = {"moves": 2, "target_rank": 4}
TWO |= {
    f"ddp: {name}": {"config": {**config, **MOVES}}
    for name, config in {
        "flexlora by entropy": {"method": "flexlora", "estimator": "instantaneous"},
        "flexlora by sensitivity": {"method": "flexlora", "estimator": "instantaneous", "importance": "sensitivity"},
        "igu-flex": {"method": "igu-flex", "estimator": "gauss"},
    }.items()
}
BLOCKS = {"blocks": 3}  # divides the head's three outputs, too
TWO |= {
    "ddp: blocks": {"config": {**BLOCKS, "estimator": "gauss"}},
    "ddp: blocks, separate, checkpoints": {
        "config": {**BLOCKS, **ESTIMATORS["gauss, separate"]}, "recompute": "non-reentrant"
    },
    "ddp: ralora": {"config": {"method": "ralora", "blocks": 3, "r": 4, "init": "lora"}},
    "fsdp2: blocks": {"config": {**BLOCKS, "estimator": "gauss"}, "fully_sharded": True},
}  # fmt: skip
TWO |= {
    f"fsdp2: {name}": {"config": ESTIMATORS[name], "fully_sharded": True}
    for name in ("gauss, mixed", "gauss, separate", "on-path", "adalora")
}
for passes, kinds in zip(PASSES, (("non-reentrant", "reentrant"), ("reentrant", "non-reentrant")), strict=True):
    config = ESTIMATORS[passes]
    TWO |= {f"{passes}, {name}": {"config": config, "wrap": wrap} for name, wrap in WRAPS.items()}
    # Each passes through each kind of checkpointing; each kind meets each of DistributedDataParallel's options once.
    first, second = ({"config": config, "recompute": kind} for kind in kinds)
    TWO |= {
        f"{passes}, {kinds[0]} checkpoints": first,
        f"{passes}, {kinds[0]} checkpoints, bucket views": {**first, "wrap": WRAPS["bucket views"]},
        f"{passes}, {kinds[1]} checkpoints, static graph": {**second, "wrap": WRAPS["static graph"], "inner": True},
        f"fsdp2: {passes}, {kinds[1]} checkpoints": {**second, "fully_sharded": True},
    }
    TWO |= {
        f"{passes}, controller of the inner model": {"config": config, "inner": True},
        f"{passes}, two micro-batches": {"config": config, "accumulation": 2},
        f"{passes}, two micro-batches, no_sync": {"config": config, "accumulation": 2, "no_sync": True},
        f"fsdp2: {passes}, two micro-batches, no_sync": {
            "config": config, "accumulation": 2, "no_sync": True, "fully_sharded": True
        },
    }  # fmt: skip
UNEVEN = ("trapezoid, mixed", "trapezoid with f(0), separate", "on-path", "instantaneous")
TWO |= {f"uneven: {name}": {"config": ESTIMATORS[name], "uneven": [3, 1]} for name in UNEVEN}
FOUR: dict[str, dict[str, Any]] = {
    f"four, ddp: {name}": {"config": ESTIMATORS[name]} for name in ("gauss, mixed", "adalora")
} | {
    "four, stratified, bucket views": {"config": ESTIMATORS["stratified, mixed"], "wrap": WRAPS["bucket views"]},
    "four, fsdp2: gauss, mixed": {"config": ESTIMATORS["gauss, mixed"], "fully_sharded": True},
    "four, uneven: trapezoid, mixed": {"config": ESTIMATORS["trapezoid, mixed"], "uneven": [2, 2, 2, 1]},
}  # fmt: skip
# Equal in all processes, though not what one process gets: other sequences, or absolute values of each process's own samples.
AGREE: dict[str, dict[str, Any]] = {
    "half of the rows": {"config": {"estimator": "gauss", "ig_fraction": 0.5}},
    "half of the rows, stratified": {
        "config": {"estimator": "stratified", "ig_fraction": 0.5, "path_pass": "separate"}
    },
    "absolute": {"config": {"estimator": "gauss", "aggregate": "absolute"}},
    "absolute, instantaneous": {"config": {"estimator": "instantaneous", "aggregate": "absolute"}},
    "uneven, by process": {"config": {"estimator": "gauss"}, "uneven": [3, 1], "joint_mean": False},
    "dropout": {"config": {"estimator": "gauss", "dropout": 0.2}},
}
# A run that is saved in the middle of a window, and goes on from there.
MIDDLE, STOP = 14, 30
SCHEDULE = {"total_steps": STOP, "t_init": 13, "t_final": 6, "window": 4}
SAVED: dict[str, dict[str, Any]] = {
    "gauss": {"estimator": "gauss"},
    "trapezoid": {"estimator": "trapezoid", "nodes": 5, "path_pass": "separate"},
    "stratified": {"estimator": "stratified"},
    "on-path": {"estimator": "on-path", "normalize": "none"},
}
DROPOUT = {"estimator": "gauss", "dropout": 0.3}
LANGUAGE: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2, checkpoints": {"fully_sharded": True, "recompute": True},
    "each process alike": {"joint_mean": False},
}
Launch = Callable[..., dict[str, list[dict[str, Tensor]]]]
Results = dict[str, list[dict[str, Tensor]]]


def resumable(folder: Path, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"folder": str(folder), "config": {**SCHEDULE, **config}, "stop": STOP, **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def results(launcher: Launch, folder: Path) -> Results:
    """All runs of four and of two processes, by name and rank: one launch each, since starting a process costs seconds."""
    four: dict[str, Any] = {name: ("ddp", options) for name, options in FOUR.items()}
    two: dict[str, Any] = {name: ("ddp", options) for name, options in (TWO | AGREE).items()}
    for name, config in SAVED.items():
        options = resumable(folder / name, config)
        four[f"saved {name}"] = "resumed", {**options, "save_at": MIDDLE}
        two[f"on with two: {name}"] = "resumed", {**options, "load": True}
    for runs, name in ((four, "dropout, four"), (two, "dropout, two")):
        options = resumable(folder / name, DROPOUT)
        runs[name] = "resumed", {**options, "save_at": MIDDLE}
        runs[f"{name}, again"] = "resumed", {**options, "load": True}
    two |= {
        "refusals": ("refusals", {}),
        "aligned": ("aligned", {}),
        **{f"language: {name}": ("language", options) for name, options in LANGUAGE.items()},
        "fsdp2 whole": ("fsdp_whole", {"folder": str(folder / "adapter")}),
        "accelerate": ("accelerated", {}),
        "accelerate, two micro-batches": ("accelerated", {"accumulation": 2}),
        "accelerate, uneven": ("accelerated", {"rows_in_all": 8 * 20 - 3}),
    }
    return launcher(folder / "four", 4, four) | launcher(folder / "two", 2, two)


@pytest.fixture(scope="module")
def alone(worker: ModuleType) -> Callable[..., dict[str, Tensor]]:
    """``alone(options)``: the same run in one process, on the joint batches."""

    @cache
    def run(options: str) -> dict[str, Tensor]:
        return worker.ddp(0, 1, **json.loads(options))

    return lambda options: run(json.dumps({k: v for k, v in options.items() if k not in _FREE}, sort_keys=True))


def assert_processes_equal(ranks: list[dict[str, Tensor]]) -> None:
    """Weights, masks and score states bit by bit."""
    for other in ranks[1:]:
        for name in ("weight", "live", "mask", "mean", "deviation"):
            assert torch.equal(ranks[0][name], other[name]), name


def assert_near(
    some: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-12, scored: bool = True
) -> None:
    """Masks exactly; weights and score states to the rounding of float64 over a run."""
    if scored:
        assert 0 < other["live"].sum() < other["live"].numel()
    assert bool(other["mean"].abs().max() > 1e-4) == scored
    assert torch.equal(some["live"], other["live"])
    assert torch.equal(some["mask"], other["mask"])
    for name in ("weight", "mean", "deviation"):
        torch.testing.assert_close(some[name].detach(), other[name].detach(), rtol=rtol, atol=atol, msg=name)


def assert_equals_one_process(ranks: list[dict[str, Tensor]], one: dict[str, Tensor], scored: bool = True) -> None:
    """States as :func:`assert_near` says; the mean of the processes' losses, too."""
    assert_near(ranks[0], one, scored=scored)
    losses = torch.stack([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(losses, one["losses"], rtol=1e-9, atol=1e-12)
    assert one["losses"][-5:].mean() < 0.95 * one["losses"][:5].mean()


@pytest.mark.parametrize("name", TWO | FOUR)
def test_processes_equal_one_that_has_all_rows(name: str, results: Results, alone: Callable[..., Any]) -> None:
    """Also peft#663 and #1745: with find_unused_parameters=False, checkpointing and passes of path rows alone nothing is ready twice."""
    assert_processes_equal(results[name])
    assert_equals_one_process(
        results[name], alone((TWO | FOUR)[name]), scored="by entropy" not in name and "ralora" not in name
    )


@pytest.mark.parametrize("name", AGREE)
def test_processes_agree_bit_by_bit(name: str, results: Results) -> None:
    ranks = results[name]
    assert_processes_equal(ranks)
    assert 0 < ranks[0]["live"].sum() < ranks[0]["live"].numel()
    assert not torch.equal(ranks[0]["losses"], ranks[1]["losses"])


@pytest.mark.parametrize("name", [n for n in TWO | FOUR if "fsdp2" not in n and "uneven" not in n])
def test_a_window_costs_one_reduction_of_the_flat_path_gradient(name: str, results: Results) -> None:
    options = (TWO | FOUR)[name]
    sizes = results[name][0]["reduced"].tolist()
    numbers = results[name][0]["weight"].numel()
    config = options["config"]
    if config.get("method") in ("adalora", "ralora") or config.get("estimator") == "instantaneous":
        assert sizes == [0]  # DistributedDataParallel has averaged what is scored
    else:
        # Scoring ends with the last allocation, at step 15: 14 steps are scored, two micro-batches make a window.
        assert sizes == [numbers] * (14 * options.get("accumulation", 1) // 2)


@pytest.mark.parametrize("name", [n for n in TWO | FOUR if "fsdp2" in n])
def test_fsdp2_costs_one_reduction_of_the_flat_gradient_per_step_more(name: str, results: Results) -> None:
    options = (TWO | FOUR)[name]
    sizes = results[name][0]["reduced"].tolist()
    sampled = "adalora" not in name and "instantaneous" not in name
    windows = 14 * options.get("accumulation", 1) // 2 if sampled else 0
    assert sizes == [results[name][0]["weight"].numel()] * (20 + windows)


@pytest.mark.parametrize("name", [n for n in TWO | FOUR if "uneven" in n])
def test_joint_mean_costs_one_number_per_micro_batch(name: str, results: Results) -> None:
    sizes = results[name][0]["reduced"].tolist()
    assert sizes.count(1) == 20
    assert set(sizes) <= {1, results[name][0]["weight"].numel()}


def test_unequal_numbers_of_tokens_weigh_what_they_are(results: Results, worker: ModuleType) -> None:
    """To float32, in which transformers computes the loss; without ``joint_mean`` far from it."""
    one = worker.language(0, 1)
    for name in LANGUAGE:
        ranks = results[f"language: {name}"]
        assert_processes_equal(ranks)
        if name == "each process alike":
            assert (ranks[0]["weight"] - one["weight"]).abs().max() > 1e-3
        else:
            assert_near(ranks[0], one, rtol=1e-4, atol=1e-8)
            losses = torch.stack([rank["losses"] for rank in ranks]).mean(0)
            torch.testing.assert_close(losses, one["losses"], rtol=1e-5, atol=1e-6)


def test_what_cannot_work_is_refused_in_every_process(results: Results) -> None:
    """FSDP1, adapters sharded with the base, gradients nobody averages, join(): the scenario checks the messages."""
    assert all(rank["done"].item() == 1 for rank in results["refusals"])


def test_align_has_one_answer(results: Results, worker: ModuleType) -> None:
    first, second = results["aligned"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    model, batches = worker.Model(), [worker.own(worker.rows(step), 0, 2) for step in range(3)]
    alone = igulora.align(model, batches, lambda b: (model(b[0]) - b[1]).square().mean(), r=1)
    for name, layer in alone.layers.items():
        assert first[name].tolist() == pytest.approx([layer.dimensionality, layer.sensitivity])


def test_fsdp2_merges_saves_and_trains_a_whole_head(results: Results, worker: ModuleType, folder: Path) -> None:
    ranks = results["fsdp2 whole"]
    one = worker.fsdp_whole(0, 1, folder=str(folder / "alone"))
    assert_processes_equal(ranks)
    assert_equals_one_process(ranks, one)
    for name in ("head", "trained", "merged", "unmerged", "plain"):
        for rank in ranks:
            torch.testing.assert_close(rank[name], one[name].detach(), rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(one["merged"], one["trained"], rtol=1e-9, atol=1e-12)
    assert (one["plain"] - one["trained"]).abs().max() > 0.1
    model = igulora.load_adapter(worker.Model(), folder / "adapter").eval()
    torch.testing.assert_close(model(worker.rows(0)[0]), one["trained"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["accelerate", "accelerate, two micro-batches"])
def test_accelerate_equals_one_process(name: str, results: Results, alone: Callable[..., Any]) -> None:
    ranks = results[name]
    accumulation = 2 if "two" in name else 1
    assert_processes_equal(ranks)
    one = dict(alone({"config": {"estimator": "gauss"}, "accumulation": accumulation}))
    for rank in ranks:
        rank["losses"] = rank["losses"].view(-1, accumulation).mean(1)
    assert_equals_one_process(ranks, one)
    assert ranks[0]["steps"].item() == 20


def test_accelerate_keeps_uneven_data_in_step(results: Results) -> None:
    """It fills the last batches up (even_batches): as many micro-batches in every process."""
    ranks = results["accelerate, uneven"]
    assert_processes_equal(ranks)
    assert [rank["steps"].item() for rank in ranks] == [20, 20]


@pytest.mark.parametrize("name", ["dropout, two", "dropout, four"])
def test_a_run_goes_on_with_as_many_processes(name: str, results: Results) -> None:
    """From the middle of a window, each with its own generator for dropout.

    Two repeat the bits. Four may add up in another order: DistributedDataParallel sorts its buckets anew after its first step.
    """
    for whole, again in zip(results[name], results[f"{name}, again"], strict=True):
        assert again["first"].item() == MIDDLE
        assert_near(again, whole)
        torch.testing.assert_close(whole["losses"][MIDDLE:], again["losses"], rtol=1e-9, atol=1e-12)
        if name == "dropout, two":
            assert_processes_equal([whole, again])
            assert torch.equal(whole["losses"][MIDDLE:], again["losses"])
    assert (results["dropout, four"][0]["weight"] - results["saved gauss"][0]["weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", SAVED)
def test_a_run_goes_on_with_fewer_processes(name: str, results: Results, worker: ModuleType, folder: Path) -> None:
    """4 -> 2 and 4 -> 1 from the middle of a window, and 1 without a stop."""
    options = resumable(folder / name, SAVED[name])
    whole = worker.resumed(0, 1, **{**options, "folder": ""})
    assert_near(results[f"saved {name}"][0], whole)
    for rank in results[f"on with two: {name}"]:
        assert rank["first"].item() == MIDDLE
        assert_near(rank, whole)
    assert_near(worker.resumed(0, 1, **options, load=True), whole)
