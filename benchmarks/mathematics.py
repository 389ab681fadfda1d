"""Questions of school mathematics with their answers, from a package that generates them (mathematics_dataset, which pip downloads)."""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from igulora.training.data import Example
from igulora.training.extras import MissingExtra

# Kinds that run with today's NumPy, whose answers are short: "area/kind" of the package.
KINDS = (
    "arithmetic/add_sub_multiple", "arithmetic/mul_div_multiple", "algebra/linear_1d", "comparison/pair", "comparison/kth_biggest",
    "comparison/closest", "comparison/sort", "measurement/time", "numbers/gcd", "numbers/is_factor", "numbers/place_value",
    "numbers/round_number",
)  # fmt: skip


def questions(count: int, seed: int = 0) -> list[Example]:
    """``count`` easy questions, kinds in turn, none twice; the same for one seed and version of the package.

    Raises:
        MissingExtra: the package or what it imports is not installed.
    """
    with _seeded(seed):
        kinds = _kinds()
        found: dict[str, Example] = {}
        while len(found) < count:
            for make in kinds:
                problem = make()
                found.setdefault(str(problem.question), Example(str(problem.question), str(problem.answer)))
    return list(found.values())[:count]


def _kinds() -> list[Callable[[], Any]]:
    try:
        # A function moved in SymPy 1.6, two years after the package's last release.
        diophantine = importlib.import_module("sympy.solvers.diophantine")
        diophantine.base_solution_linear = importlib.import_module(
            "sympy.solvers.diophantine.diophantine"
        ).base_solution_linear  # type: ignore[attr-defined]
        modules = importlib.import_module("mathematics_dataset.modules.modules")
    except ImportError as error:
        raise MissingExtra(
            f"expected the package mathematics_dataset, which generates questions, got: {error}; install it with: "
            "pip install --no-deps mathematics_dataset six absl-py"
        ) from error
    areas = modules.train(
        lambda entropy: (entropy[0], entropy[0] + (entropy[1] - entropy[0]) / 3)
    )  # the package's "train-easy"
    return [areas[area][kind] for area, kind in (name.split("/") for name in KINDS)]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generators that the package draws from, seeded inside the block and as they were after it."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package is of 2019
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
