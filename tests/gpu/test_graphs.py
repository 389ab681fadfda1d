"""One CUDA graph holds forward, backward, path pass, orthogonality, scores and allocation, and replays them with other inputs.

Each test has a twin that runs everywhere and checks that what the replay is compared with means what it says.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .steps import DTYPES, Inputs, StaticStep, assert_same_bits, captured

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs_of(device: torch.device, dtype: torch.dtype, count: int) -> list[Inputs]:
    return [Inputs.draw(device, dtype, seed) for seed in range(1, count + 1)]


def test_a_step_depends_on_its_inputs_and_state_alone(device, dtype) -> None:
    step = StaticStep(device, dtype)
    before = step.results()
    first, second = inputs_of(device, dtype, 2)
    expected = [step.after(first), step.after(second)]
    assert not torch.equal(expected[0]["grad"], expected[1]["grad"])
    assert expected[0]["path"].count_nonzero() > 0
    for result, inputs in zip(expected, (first, second), strict=True):
        assert result["live"].sum() == inputs.budget
        assert result["finite"].item()
    step.restore(before)
    for inputs, result in zip((first, second), expected, strict=True):
        assert_same_bits(step.after(inputs), result)


@pytest.mark.gpu
def test_replays_equal_eager_steps(device, dtype) -> None:
    eager, graphed = StaticStep(device, dtype), StaticStep(device, dtype)
    replay = captured(graphed)
    for inputs in inputs_of(device, dtype, 5):
        assert_same_bits(graphed.after(inputs, replay), eager.after(inputs))


@pytest.mark.gpu
def test_replays_with_dropout_equal_eager_steps(device, dtype) -> None:
    eager, graphed = (StaticStep(device, dtype, dropout=0.3) for _ in range(2))
    replay = captured(graphed)
    for seed, inputs in enumerate(inputs_of(device, dtype, 3)):
        assert_same_bits(graphed.after(inputs, replay, seed), eager.after(inputs, seed=seed))


def test_dropout_draws_anew_in_each_step(device, dtype) -> None:
    step = StaticStep(device, dtype, dropout=0.3)
    before = step.results()
    (inputs,) = inputs_of(device, dtype, 1)
    first = step.after(inputs, seed=1)
    step.restore(before)
    second = step.after(inputs, seed=2)
    step.restore(before)
    assert not torch.equal(first["grad"], second["grad"])
    assert_same_bits(step.after(inputs, seed=1), first)


def odd_inputs(device: torch.device, dtype: torch.dtype) -> list[Inputs]:
    """Inputs that would show in memory if anything were allocated by value: nothing lives, all live, alpha 0, nothing finite."""
    few, most, start, spoilt = inputs_of(device, dtype, 4)
    few.budget.fill_(0)
    most.budget.fill_(1 << 20)
    start.alpha.zero_()
    start.weight.zero_()
    spoilt.target.fill_(torch.nan)
    return [few, most, start, spoilt]


def test_odd_inputs_take_their_step(device, dtype) -> None:
    step = StaticStep(device, dtype)
    few, most, start, spoilt = odd_inputs(device, dtype)
    assert step.after(few)["live"].sum() == 0
    assert step.after(most)["live"].all()
    assert not step.after(start)["path"].any()
    before = step.results()
    after = step.after(spoilt)
    assert not after["finite"].item()
    assert_same_bits({k: after[k] for k in ("mean", "deviation")}, {k: before[k] for k in ("mean", "deviation")})


def allocated(step: StaticStep, inputs: Inputs) -> tuple[int, int]:
    """Bytes and blocks that an eager step asks the allocator for."""
    step.inputs.take(inputs)
    torch.cuda.synchronize()
    keys = ("allocated_bytes.all.allocated", "allocation.all.allocated")
    before = torch.cuda.memory_stats()
    step.run()
    after = torch.cuda.memory_stats()
    return tuple(after[key] - before[key] for key in keys)  # type: ignore[return-value]


@pytest.mark.gpu
def test_no_allocation_depends_on_data(device, dtype) -> None:
    step = StaticStep(device, dtype)
    step.run()
    step.run()
    found = [allocated(step, inputs) for inputs in [*inputs_of(device, dtype, 2), *odd_inputs(device, dtype)]]
    assert len(set(found)) == 1, found


@pytest.mark.gpu
def test_replays_allocate_nothing(device, dtype) -> None:
    step = StaticStep(device, dtype)
    replay = captured(step)
    cases = [*inputs_of(device, dtype, 2), *odd_inputs(device, dtype)]
    replay()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    count = torch.cuda.memory_stats()["allocation.all.allocated"]
    for inputs in cases:
        step.inputs.take(inputs)
        replay()
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == held
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == count


def test_same_inputs_give_the_same_bits(device, dtype) -> None:
    results: list[dict[str, Tensor]] = []
    (inputs,) = inputs_of(device, dtype, 1)
    for _ in range(2):
        step = StaticStep(device, dtype)
        step.after(inputs)
        results.append(step.after(inputs))
    assert_same_bits(*results)
