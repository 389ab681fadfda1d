"""A study's TOML file, read and checked as a whole before anything runs.

name = "main"
seeds = [0, 1, 2, 3, 4, 5]               # the first picks the learning rates and does not count; further budgets have their own, 100 later
learning_rates = [1e-3, 2e-3, 4e-3]      # one grid for all methods, on validation rows; with a single rate all seeds count
budgets = [[8, 4], [16, 8]]              # r at the start and rank at the end; fixed ranks are those at the end
pick_at = [16, 8]                        # the budget at which learning rates are picked for all; without it each picks its own
tolerance = 0.01                         # the lowest rate whose metric is at most so much below the best is picked; 0 unless given
judged_by = "test"                       # "validation" where the outcome chooses something
against = ["fixed"]                      # whom all methods are compared with; without it each with each
maps = ["igu-hard"]                      # methods whose ranks are drawn by layer and module

[training]
steps = 240
rows = 16

[tasks.polarity]
data = "movie-polarity"

[methods.fixed]                          # a control
method = "lora"
init = "zero"
[methods.igu-hard]
method = "igu"
prune = "hard"
rate_of = "igu"                          # no search of its own
optimizer = { lambda_lr_ratio = 10 }     # of igulora.param_groups
training = { rows = 8 }                  # in the place of [training]'s
[methods.igu]
against = ["peft-adalora"]               # whom this one is compared with, in the place of the study's
[methods.flexlora]
budgets = [[16, 8]]                      # of the study's, those it runs at
[methods.peft-adalora]
library = "peft"
method = "adalora"
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tomllib

from igulora.config import CHOICES
from igulora.errors import check_choice, nearest

from .plan import DATA, DTYPES, JUDGES, LIBRARIES, VARIES, Budget, MethodSpec, Study, TaskSpec, Training

_AT_LEAST_ONE = ("steps", "rows", "stretch", "window", "train", "validation", "test", "length")


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
        learning_rates=_rates(given, path),
        budgets=tuple(_budget(pair, path) for pair in _listed(given, "budgets", path)),
        tasks={
            name: _filled(TaskSpec, {"name": name, **table}, f"[tasks.{name}]")
            for name, table in given["tasks"].items()
        },
        methods={name: _method(name, table, path) for name, table in given["methods"].items()},
        training=_filled(Training, given.get("training", {}), "[training]"),
        pick_at=_budget(given["pick_at"], path) if "pick_at" in given else None,
        tolerance=float(_number(given.get("tolerance", 0.0), "tolerance", (int, float), 0, path)),
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
    if not study.judged_seeds:
        raise ValueError(
            f"expected at least 2 seeds in {path}, the first of which picks learning rates and does not count, got {list(study.seeds)}"
        )
    if study.pick_at is not None and study.pick_at not in study.budgets:
        raise ValueError(f"expected pick_at in {path} to be one of its budgets, got {list(study.pick_at)}")
    for entry, names in (("against", study.against), ("maps", study.maps)):
        for name in names:
            check_choice(f"{entry} in {path}", name, study.methods)
    for name, method in study.methods.items():
        _filled(Training, method.training, f"training of [methods.{name}]")
        for field, choices in (("dtype", DTYPES), ("budget_unit", CHOICES["budget_unit"]), ("varies", VARIES)):
            check_choice(f"{field} of [methods.{name}]", getattr(study.training_of(name), field), choices)
        for task in study.tasks.values():
            if study.training_of(name).remove > task.validation:
                raise ValueError(
                    f"expected remove of at most {task.validation} for [methods.{name}], the validation rows of [tasks.{task.name}], got "
                    f"{study.training_of(name).remove}"
                )
        for other in method.against or ():
            check_choice(f"against of [methods.{name}]", other, study.methods)
        if not set(method.budgets) <= set(study.budgets) or study.pick_at not in {None, *study.budgets_of(name)}:
            raise ValueError(
                f"expected budgets of [methods.{name}] among those of the study, with pick_at, got "
                f"{[list(budget) for budget in method.budgets]}"
            )
        if method.rate_of is None:
            continue
        check_choice(f"rate_of of [methods.{name}]", method.rate_of, study.methods)
        if not set(study.budgets_of(name)) <= {*study.budgets_of(method.rate_of), study.pick_at}:
            raise ValueError(
                f"expected budgets of [methods.{name}] among those of {method.rate_of!r}, whose rates it takes"
            )
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
        _number(value, name, kind, least, path)
    if len(set(values)) < len(values):
        raise ValueError(f"expected {name} in {path} to differ, got {values}")
    return values


def _number(value: Any, name: str, kind: Any, least: float, path: Path) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind) or value < least:
        raise ValueError(f"expected {name} in {path} to be of at least {least}, got {value!r}")
    return value


def _rates(given: dict[str, Any], path: Path) -> tuple[float, ...]:
    rates = tuple(float(rate) for rate in _numbers(given, "learning_rates", (int, float), 0, path))
    if 0.0 in rates:
        raise ValueError(f"expected learning_rates above 0 in {path}, got {list(rates)}")
    return rates


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
        wanted = {"int": int, "int | None": int, "float": (int, float), "str": str}[str(fields[name].type)]
        if isinstance(value, bool) or not isinstance(value, wanted) or (wanted is not str and value < 0):
            raise ValueError(f"expected {name} in {where} to be a number >= 0 or a name, as its default, got {value!r}")
        if name in _AT_LEAST_ONE and value < 1:
            raise ValueError(f"expected {name} in {where} to be at least 1, got {value}")
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in table]
    if missing:
        raise ValueError(f"expected {', '.join(missing)} in {where}, got none")
    return kind(**table)


def _method(name: str, table: Any, path: Path) -> MethodSpec:
    if not isinstance(table, dict):
        raise ValueError(f"expected a table [methods.{name}], got {table!r}")
    options = dict(table)
    library, method = options.pop("library", "igulora"), options.pop("method", name.removeprefix("peft-"))
    check_choice(f"library of [methods.{name}]", library, LIBRARIES)
    check_choice(f"method of [methods.{name}]", method, LIBRARIES[library])
    optimizer, training = options.pop("optimizer", {}), options.pop("training", {})
    if not isinstance(optimizer, dict):
        raise ValueError(f"expected a table of optimizer options of [methods.{name}], got {optimizer!r}")
    budgets = tuple(_budget(pair, path) for pair in (_listed(options, "budgets", path) if "budgets" in options else ()))
    options.pop("budgets", None)
    against = _names(options, "against", path) if "against" in options else None
    options.pop("against", None)
    return MethodSpec(
        name, library, method, options, optimizer, training, options.pop("rate_of", None), budgets, against
    )
