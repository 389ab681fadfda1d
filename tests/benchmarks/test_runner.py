"""Running cases: what is slowed shows as slowed, what does not fit is reported, what is wrong stops the run."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from igulora.benchmarks import methods as plugins
from igulora.benchmarks import runner
from igulora.benchmarks.cases import CASES, MODELS
from igulora.benchmarks.methods import Floor, Igulora, Instantaneous
from igulora.benchmarks.models import load_model

CASE = CASES["tiny-4x16"]


class Silent:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ticks = self.expected = 0

    def say(self, text: str) -> None:
        self.lines.append(text)

    def total(self, ticks: int) -> None:
        self.expected += ticks

    def tick(self, text: str) -> None:
        self.ticks += 1


class Watch:
    """A clock that only methods move: what a step takes is then known exactly."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(names: tuple[str, ...], **options: Any) -> tuple[dict[str, Any], Silent]:
    reporter = Silent()
    asked = runner.Options(names, **{"rounds": 4, "memory": False, "counts": False, **options})
    return runner.Run(CASE, load_model(MODELS[CASE.model]), asked, reporter)(), reporter


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch):
    """Add methods to the registry for one test."""

    def add(*found: type) -> None:
        for method in found:
            monkeypatch.setitem(plugins.METHODS, method.name, method)

    return add


def test_a_slowed_method_shows_up_slowed_by_its_factor(plug) -> None:
    """The machine of this test slows down round by round and now and then stalls; the ratio of the methods stays 1.7."""
    watch = Watch()
    slowness = itertools.chain([1.0, 1.0], itertools.cycle([1.0, 1.0, 3.0, 3.0, 2.0, 2.0, 10.0, 10.0]))

    class Steady(Floor):
        name, factor = "steady", 1.0

        def step(self, batch):
            loss = super().step(batch)
            if batch["input_ids"].shape[1] == CASE.length:
                watch.now += self.factor * next(slowness)
            return loss

    class Slowed(Steady):
        name, factor = "slowed", 1.7

    plug(Steady, Slowed)
    result, _ = run(("steady", "slowed"), clock=watch)
    times = result["seconds"]
    assert len(times["steady"]) == len(times["slowed"]) == 4
    ratios = runner.quartiles([a / b for a, b in zip(times["slowed"], times["steady"], strict=True)])
    assert ratios == {"median": pytest.approx(1.7), "q1": pytest.approx(1.7), "q3": pytest.approx(1.7)}


def test_kinds_of_steps_are_weighted_by_their_share(plug) -> None:
    watch = Watch()

    class Uneven(Floor):
        name, kind = "uneven", "cheap"

        def kinds(self):
            return {"cheap": 0.75, "dear": 0.25}

        def seek(self, kind, small):
            self.kind = kind

        def step(self, batch):
            if batch["input_ids"].shape[1] == CASE.length:
                watch.now += {"cheap": 1.0, "dear": 5.0}[self.kind]
            return super().step(batch)

    plug(Uneven)
    result, _ = run(("uneven",), clock=watch)
    assert result["step"]["uneven"]["median"] == pytest.approx(2.0)
    assert result["step"]["uneven:dear"]["median"] == pytest.approx(5.0)


@pytest.mark.parametrize("where", ["build", "step", "memory"])
def test_a_method_that_runs_out_of_memory_is_reported_and_the_rest_goes_on(plug, where: str) -> None:
    class Greedy(Floor):
        name, title = "greedy", "greedy"

        def __init__(self, model, case):
            super().__init__(model, case)
            self.steps = 0
            if where == "build":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.\ndetails")

        def step(self, batch):
            self.steps += batch["input_ids"].shape[1] == CASE.length
            if where == "step" and self.steps == 3:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
            return super().step(batch)

        def backward(self, batch):
            if where == "memory" and batch["input_ids"].shape[1] == CASE.length and self.steps == 1:
                raise MemoryError("no more")
            return super().backward(batch)

    plug(Greedy)
    result, reporter = run(("greedy", "floor"), memory=where == "memory")
    assert "out of memory" in result["methods"]["greedy"]["error"]
    assert any("greedy" in line and "out of memory" in line for line in reporter.lines)
    assert len(result["seconds"]["floor"]) == 4
    if where != "memory":
        assert "greedy" not in result["seconds"]
    else:
        assert set(result["memory"]) == {"floor"}


def test_other_errors_are_not_taken_for_lack_of_memory(plug) -> None:
    class Broken(Floor):
        name = "broken"

        def step(self, batch):
            raise RuntimeError("expected something else")

    plug(Broken)
    with pytest.raises(RuntimeError, match="something else"):
        run(("broken",))


def test_a_method_that_changes_the_outputs_is_not_timed(plug) -> None:
    class Wrong(Floor):
        name = "wrong"

        def logits(self, batch):
            return super().logits(batch) * 1.1

    plug(Wrong)
    with pytest.raises(RuntimeError, match="leave the outputs of the base model"):
        run(("wrong",))


def test_a_method_whose_path_samples_are_wrong_is_not_timed(plug) -> None:
    class Wrong(Igulora):
        name = "wrong"

        def backward(self, batch):
            loss = super().backward(batch)
            self.controller.bank.path.mul_(1.1)
            return loss

    plug(Wrong)
    with pytest.raises(RuntimeError, match="expected the path accumulator of .* by wrong"):
        run(("wrong",))


def test_cases_of_a_run_share_what_was_checked(plug, monkeypatch) -> None:
    """What cannot be checked for lack of memory is tried anew, and reported, with every case."""
    built = []

    class Counted(Floor):
        name, title = "counted", "counted"

        def __init__(self, model, case):
            super().__init__(model, case)
            built.append(case.name)

    class Greedy(Floor):
        name, title = "greedy", "greedy"

        def adapted(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

    plug(Counted, Greedy)
    cases = [CASE, dataclasses.replace(CASE, name="other", length=8)]
    reporter = Silent()
    options = runner.Options(("counted", "greedy"), rounds=1, memory=False, counts=False)
    results = runner.run_cases(cases, options, reporter)
    assert [name for name in built if name not in (CASE.name, "other")] == ["gradients"] * 4
    assert [line.partition(":")[0].strip() for line in reporter.lines] == [CASE.name, "other"]
    for result in results:
        assert "out of memory" in result["methods"]["greedy"]["error"]
        assert result["methods"]["counted"]["gradient_error"] == {"bfloat16": None, "float32": None}
        assert len(result["seconds"]["counted"]) == 1


def test_a_method_that_never_prunes_is_not_believed(plug) -> None:
    class Lazy(Instantaneous):
        name = "lazy"

        def live(self):
            return CASE.rank * 14

    plug(Lazy)
    with pytest.raises(RuntimeError, match="expected lazy to have pruned"):
        run(("lazy",), rounds=1)


def test_methods_share_the_frozen_tensors_and_nothing_else() -> None:
    base = load_model(MODELS[CASE.model])
    one, other = (runner.build("instantaneous", base, CASE) for _ in range(2))
    frozen = {p.data_ptr() for p in base.parameters()}
    for method in (one, other):
        assert frozen <= {p.data_ptr() for p in method.model.parameters()}
    trained = [{p.data_ptr() for p in m.model.parameters() if p.requires_grad} for m in (one, other)]
    assert not trained[0] & trained[1]
    assert not any(p.requires_grad for p in base.parameters())


def test_the_bar_ends_when_the_work_does() -> None:
    _, reporter = run(("floor", "instantaneous"), rounds=1, memory=True)
    assert reporter.ticks == reporter.expected
