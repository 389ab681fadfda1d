"""What a study compares, and the runs that follow from it; reading.py makes it of a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from igulora.config import METHODS

DATA = (
    "movie-polarity", "movie-rating", "product-rating", "tweet-rating", "bbc-news", "bbc-instructions", "school-mathematics",
)  # fmt: skip
VARIES = ("everything", "order", "start")
DTYPES = ("bfloat16", "float16", "float32")
JUDGES = ("test", "validation")
SEEDS_APART = 100  # between a budget's seeds and the next one's
LIBRARIES = {"igulora": tuple(METHODS), "peft": ("lora", "adalora", "dora")}


class Budget(NamedTuple):
    """Triplets per matrix: stored at the start by methods that prune, and live at the end of all."""

    r: int
    target: int

    def __str__(self) -> str:
        return f"{self.r}-{self.target}"


Group = tuple[str, str, Budget]  # task, method, budget


def row_name(task: str, method: str, budget: Budget) -> str:
    """What the command line calls a row of the tables, the runs of a group that count."""
    return f"{task}/{method}/{budget}"


@dataclass(frozen=True)
class MethodSpec:
    """One method by the name a study gives it.

    Attributes:
        options: of :class:`igulora.IGUConfig`, or of PEFT's config. optimizer: further options of its parameter groups.
        training: fields of :class:`Training` in which it differs from its study.
        rate_of: the method whose learning rate it takes, instead of a search of its own.
        budgets: of its study, those that it runs at; empty for all.
        against: the methods that it is compared with; None for those of its study.
    """

    name: str
    library: str
    method: str
    options: dict[str, Any]
    optimizer: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    rate_of: str | None = None
    budgets: tuple[Budget, ...] = ()
    against: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TaskSpec:
    """One task: ``data`` (one of :data:`DATA`) and how many rows each part has."""

    name: str
    data: str
    train: int = 2000
    validation: int = 500
    test: int = 1000
    length: int = 64


@dataclass(frozen=True)
class Training:
    """What all methods train with.

    Attributes:
        rows: of a batch. stretch: batches whose rows are sorted by length together, so that little is padded; 1 leaves rows as drawn.
        warmup: fraction of the steps in which the learning rate rises, before it falls to zero.
        window: micro-batches per score update, for methods that have no shorter one.
        t_init, t_final, delta_t: the schedule of all methods whose ranks change; None for what IGU-LoRA has by default.
        budget_unit: what budgets count in methods that prune: "rank", or "parameters", so that all end with as many as a fixed rank.
        dtype: of the frozen weights; adapters and heads train in float32. dropout: of the frozen model.
        varies: what the seed draws: "everything", only the "order" of rows, or only the "start" (adapters, head and nodes).
        watch: matrices whose score series are kept. remove: validation rows on which the trained model is judged without each matrix.
    """

    steps: int = 240
    rows: int = 16
    stretch: int = 8
    warmup: float = 0.06
    weight_decay: float = 0.0
    window: int = 16
    t_init: int | None = None
    t_final: int | None = None
    delta_t: int | None = None
    budget_unit: str = "rank"
    dtype: str = "bfloat16"
    dropout: float = 0.0
    varies: str = "everything"
    watch: int = 0
    remove: int = 0


@dataclass(frozen=True)
class Run:
    """One training: everything that tells it from the others of its study."""

    task: str
    method: str
    budget: Budget
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        """Its name in the study's records."""
        return f"{row_name(self.task, self.method, self.budget)}/lr{self.learning_rate:g}/seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """A whole file.

    Attributes:
        seeds: of the first budget; the others have seeds of their own, so that runs at two budgets have nothing in common.
        pick_at: the budget at which learning rates are picked for all budgets; None lets each pick its own.
        tolerance: the lowest learning rate whose metric is at most so much below the best is picked.
        judged_by: the part of the rows ("test", "validation") that tables are made of.
        against: the methods that all are compared with that do not say with which; none for each with each.
        maps: the methods whose ranks are drawn by layer and module.
    """

    name: str
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    budgets: tuple[Budget, ...]
    tasks: dict[str, TaskSpec]
    methods: dict[str, MethodSpec]
    training: Training = field(default_factory=Training)
    pick_at: Budget | None = None
    tolerance: float = 0.0
    judged_by: str = "test"
    against: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()

    @property
    def judged_seeds(self) -> tuple[int, ...]:
        """The seeds whose runs count: without the first, which picks the learning rates, where there are several."""
        return self.seeds[1:] if len(self.learning_rates) > 1 else self.seeds

    def groups(self) -> list[Group]:
        """(task, method, budget) in the order in which they run: those that pick rates first, then budgets and tasks outside, so that
        methods are compared early."""
        budgets = sorted(self.budgets, key=lambda budget: budget != self.pick_at)
        methods = sorted(self.methods, key=lambda method: self.methods[method].rate_of is not None)
        return [
            (task, method, budget)
            for budget in budgets
            for task in self.tasks
            for method in methods
            if budget in self.budgets_of(method)
        ]

    def against_of(self, method: str) -> tuple[str, ...]:
        """Those that a method is compared with."""
        own = self.methods[method].against
        return own if own is not None else self.against or tuple(self.methods)

    def budgets_of(self, method: str) -> tuple[Budget, ...]:
        """Those that a method runs at."""
        return self.methods[method].budgets or self.budgets

    def searches(self, task: str, method: str, budget: Budget) -> list[Run]:
        """The runs whose validation rows pick the learning rate: the whole grid with the first seed."""
        owner, at = self.methods[method].rate_of or method, self.pick_at or budget
        return [Run(task, owner, at, rate, self._seed(self.seeds[0], at)) for rate in self.learning_rates]

    def repeats(self, task: str, method: str, budget: Budget, rate: float) -> list[Run]:
        """The runs that count, with the learning rate that was picked."""
        return [Run(task, method, budget, rate, self._seed(seed, budget)) for seed in self.judged_seeds]

    def _seed(self, seed: int, budget: Budget) -> int:
        return seed + SEEDS_APART * self.budgets.index(budget)

    def possible(self) -> dict[str, Run]:
        """By key, every run that it may ask for, whichever learning rates are picked."""
        repeats = (run for group in self.groups() for rate in self.learning_rates for run in self.repeats(*group, rate))
        return {run.key: run for run in (*self._searched(), *repeats)}

    def _searched(self) -> set[Run]:
        return {run for group in self.groups() for run in self.searches(*group)}

    def training_of(self, method: str) -> Training:
        """What a method trains with."""
        return dataclasses.replace(self.training, **self.methods[method].training)

    @property
    def count(self) -> int:
        """Trainings in all."""
        repeated = {run for group in self.groups() for run in self.repeats(*group, self.learning_rates[0])}
        return len(self._searched() - repeated) + len(repeated)
