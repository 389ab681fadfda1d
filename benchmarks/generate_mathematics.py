"""Prints questions of school mathematics with their answers as JSON; imports nothing of igulora, so that it starts quickly.

python benchmarks/generate_mathematics.py 10 0     # ten questions of seed 0
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

# Kinds that run with today's NumPy, whose answers are short: "area/kind" of the package.
KINDS = (
    "arithmetic/add_sub_multiple", "arithmetic/mul_div_multiple", "algebra/linear_1d", "comparison/pair", "comparison/kth_biggest",
    "comparison/closest", "comparison/sort", "measurement/time", "numbers/gcd", "numbers/is_factor", "numbers/place_value",
    "numbers/round_number",
)  # fmt: skip


def generate(count: int, seed: int) -> list[tuple[str, str]]:
    warnings.simplefilter("ignore")  # the package is of 2019
    kinds = _kinds()
    random.seed(seed)
    np.random.seed(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        for make in kinds:
            problem = make()
            found.setdefault(str(problem.question), str(problem.answer))
    return list(found.items())[:count]


def _kinds() -> list[Callable[[], Any]]:
    # A function moved in SymPy 1.6, two years after the package's last release.
    diophantine: Any = importlib.import_module("sympy.solvers.diophantine")
    diophantine.base_solution_linear = importlib.import_module(
        "sympy.solvers.diophantine.diophantine"
    ).base_solution_linear
    modules = importlib.import_module("mathematics_dataset.modules.modules")
    areas = modules.train(
        lambda entropy: (entropy[0], entropy[0] + (entropy[1] - entropy[0]) / 3)
    )  # the package's "train-easy"
    return [areas[area][kind] for area, kind in (name.split("/") for name in KINDS)]


if __name__ == "__main__":
    print(json.dumps(generate(int(sys.argv[1]), int(sys.argv[2]))))
