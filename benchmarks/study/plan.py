"""What a study compares: a TOML file, read and checked as a whole before anything runs, and the runs that follow from it.

name = "main"
seeds = [0, 1, 2, 3, 4]
learning_rates = [1e-3, 2e-3, 4e-3]      # one grid for all methods; picked on validation rows, with the first seed
budgets = [[8, 4], [16, 8]]              # r at the start and rank at the end; fixed ranks are those at the end
pick_at = [8, 4]                         # the budget at which learning rates are picked for all; without it each picks its own
judged_by = "test"                       # "validation" where the outcome chooses something
against = ["fixed"]                      # whom the page compares all methods with; without it each with each
maps = ["igu-hard"]                      # methods whose ranks are drawn by layer and module

[training]
steps = 240
rows = 16

[tasks.polarity]
data = "movie-polarity"

[methods.fixed]                          # a control
method = "lora"
init = "orthonormal"
[methods.igu-hard]
method = "igu"
prune = "hard"
rate_of = "igu"                          # no search of its own
optimizer = { lambda_lr_ratio = 10 }     # of igulora.param_groups
training = { rows = 8 }                  # in the place of [training]'s
[methods.igu]
[methods.peft-adalora]
library = "peft"
method = "adalora"
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tomllib

from igulora.config import METHODS
from igulora.errors import check_choice, nearest

DATA = (
    "movie-polarity",
    "movie-rating",
    "product-rating",
    "tweet-rating",
    "bbc-news",
    "bbc-instructions",
    "school-mathematics",
)  # fmt: skip; read in tasks.py
JUDGES = ("test", "validation")
LIBRARIES = {"igulora": tuple(METHODS), "peft": ("lora", "adalora", "dora")}


class Budget(NamedTuple):
    """Triplets per matrix: stored at the start by methods that prune, and live at the end of all."""

    r: int
    target: int

    def __str__(self) -> str:
        return f"{self.r}-{self.target}"


Group = tuple[str, str, Budget]  # task, method, budget


@dataclass(frozen=True)
class MethodSpec:
    """One method by the name a study gives it.

    Attributes:
        options: of :class:`igulora.IGUConfig`, or of PEFT's config. optimizer: further options of its parameter groups.
        training: fields of :class:`Training` in which it differs from its study.
        rate_of: the method whose learning rate it takes, instead of a search of its own.
    """

    name: str
    library: str
    method: str
    options: dict[str, Any]
    optimizer: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    rate_of: str | None = None


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
        dtype: of the frozen weights; adapters and heads train in float32. dropout: of the frozen model.
        watch: matrices whose score series are kept. remove: validation rows on which the trained model is judged without each matrix.
    """

    steps: int = 240
    rows: int = 16
    stretch: int = 8
    warmup: float = 0.06
    weight_decay: float = 0.0
    window: int = 8
    dtype: str = "bfloat16"
    dropout: float = 0.0
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
        return f"{self.task}/{self.method}/{self.budget}/lr{self.learning_rate:g}/seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """A whole file.

    Attributes:
        pick_at: the budget at which learning rates are picked for all budgets; None lets each pick its own.
        judged_by: the part of the rows ("test", "validation") that tables are made of.
        against: the methods that the page compares all others with. maps: those whose ranks it draws by layer and module.
    """

    name: str
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    budgets: tuple[Budget, ...]
    tasks: dict[str, TaskSpec]
    methods: dict[str, MethodSpec]
    training: Training = field(default_factory=Training)
    pick_at: Budget | None = None
    judged_by: str = "test"
    against: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()

    def groups(self) -> list[Group]:
        """(task, method, budget) in the order in which they run: those that pick rates first, then budgets and tasks outside, so that
        methods are compared early."""
        budgets = sorted(self.budgets, key=lambda budget: budget != self.pick_at)
        methods = sorted(self.methods, key=lambda method: self.methods[method].rate_of is not None)
        return [(task, method, budget) for budget in budgets for task in self.tasks for method in methods]

    def searches(self, task: str, method: str, budget: Budget) -> list[Run]:
        """The runs whose validation rows pick the learning rate: the whole grid with the first seed."""
        owner, at = self.methods[method].rate_of or method, self.pick_at or budget
        return [Run(task, owner, at, rate, self.seeds[0]) for rate in self.learning_rates]

    def repeats(self, task: str, method: str, budget: Budget, rate: float) -> list[Run]:
        """The runs of all seeds with the learning rate that was picked; that of the first seed may be one of the searches."""
        return [Run(task, method, budget, rate, seed) for seed in self.seeds]

    def training_of(self, method: str) -> Training:
        """What a method trains with."""
        return dataclasses.replace(self.training, **self.methods[method].training)

    @property
    def count(self) -> int:
        """Trainings in all."""
        searched = {run for group in self.groups() for run in self.searches(*group)}
        first = len(set(self.groups()) - {(run.task, run.method, run.budget) for run in searched})
        return len(searched) + first + len(self.groups()) * (len(self.seeds) - 1)


def read_study(path: Path) -> Study:
    """A study from its file.

    Raises:
        ValueError: the file is no TOML, lacks an entry, or an entry does not fit (names it).
        FileNotFoundError: there is no such file.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"expected a study in TOML, got {path}: {error}") from error
    _check_keys(given, tuple(f.name for f in dataclasses.fields(Study)), str(path))
    for name in ("tasks", "methods"):
        if not isinstance(given.get(name), dict) or not given[name]:
            raise ValueError(f"expected [{name}.NAME] tables in {path}, got {given.get(name)!r}")
    study = Study(
        name=str(given.get("name", path.stem)),
        seeds=tuple(_numbers(given, "seeds", int, 0, path)),
        learning_rates=tuple(float(rate) for rate in _numbers(given, "learning_rates", (int, float), 0, path)),
        budgets=tuple(_budget(pair, path) for pair in _listed(given, "budgets", path)),
        tasks={
            name: _filled(TaskSpec, {"name": name, **table}, f"[tasks.{name}]")
            for name, table in given["tasks"].items()
        },
        methods={name: _method(name, table) for name, table in given["methods"].items()},
        training=_filled(Training, given.get("training", {}), "[training]"),
        pick_at=_budget(given["pick_at"], path) if "pick_at" in given else None,
        judged_by=given.get("judged_by", "test"),
        against=_names(given, "against", path),
        maps=_names(given, "maps", path),
    )
    _check_study(study, path)
    return study


def _check_study(study: Study, path: Path) -> None:
    """What one entry says of another."""
    for task in study.tasks.values():
        check_choice(f"data of [tasks.{task.name}]", task.data, DATA)
    check_choice(f"judged_by in {path}", study.judged_by, JUDGES)
    if study.pick_at is not None and study.pick_at not in study.budgets:
        raise ValueError(f"expected pick_at in {path} to be one of its budgets, got {list(study.pick_at)}")
    for entry, names in (("against", study.against), ("maps", study.maps)):
        for name in names:
            check_choice(f"{entry} in {path}", name, study.methods)
    for name, method in study.methods.items():
        _filled(Training, method.training, f"training of [methods.{name}]")
        if method.rate_of is None:
            continue
        check_choice(f"rate_of of [methods.{name}]", method.rate_of, study.methods)
        if study.methods[method.rate_of].rate_of is not None:
            raise ValueError(
                f"expected rate_of of [methods.{name}] to name a method with a search of its own, got {method.rate_of!r}"
            )


def _check_keys(given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"expected entries of {where} among {', '.join(known)}, got {key!r}.{nearest(key, known)}")


def _listed(given: dict[str, Any], name: str, path: Path) -> list[Any]:
    value = given.get(name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list of {name} in {path}, got {value!r}")
    return value


def _names(given: dict[str, Any], name: str, path: Path) -> tuple[str, ...]:
    value = given.get(name, [])
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"expected {name} in {path} to be a list of methods, got {value!r}")
    return tuple(value)


def _numbers(given: dict[str, Any], name: str, kind: Any, least: float, path: Path) -> list[Any]:
    values = _listed(given, name, path)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kind) or value < least:
            raise ValueError(f"expected {name} in {path} to be numbers of at least {least}, got {value!r}")
    if len(set(values)) < len(values):
        raise ValueError(f"expected {name} in {path} to differ, got {values}")
    return values


def _budget(pair: Any, path: Path) -> Budget:
    if (
        not isinstance(pair, list)
        or len(pair) != 2
        or not all(type(n) is int for n in pair)
        or not 1 <= pair[1] <= pair[0]
    ):
        raise ValueError(f"expected budgets in {path} as [r, target] with 1 <= target <= r, got {pair!r}")
    return Budget(*pair)


def _filled(kind: type, table: Any, where: str) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"expected a table {where}, got {table!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _check_keys(table, tuple(fields), where)
    for name, value in table.items():
        wanted = {"int": int, "float": (int, float), "str": str}[str(fields[name].type)]
        if isinstance(value, bool) or not isinstance(value, wanted) or (wanted is not str and value < 0):
            raise ValueError(f"expected {name} in {where} to be a number >= 0 or a name, as its default, got {value!r}")
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in table]
    if missing:
        raise ValueError(f"expected {', '.join(missing)} in {where}, got none")
    return kind(**table)


def _method(name: str, table: Any) -> MethodSpec:
    if not isinstance(table, dict):
        raise ValueError(f"expected a table [methods.{name}], got {table!r}")
    options = dict(table)
    library, method = options.pop("library", "igulora"), options.pop("method", name.removeprefix("peft-"))
    check_choice(f"library of [methods.{name}]", library, LIBRARIES)
    check_choice(f"method of [methods.{name}]", method, LIBRARIES[library])
    optimizer, training = options.pop("optimizer", {}), options.pop("training", {})
    return MethodSpec(name, library, method, options, optimizer, training, options.pop("rate_of", None))
