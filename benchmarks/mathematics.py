"""Questions of school mathematics with their answers, from a package that generates them (mathematics_dataset, which pip downloads).

python -m igulora.benchmarks.mathematics 10 0     # ten questions of seed 0, as JSON
"""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
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

    They are made in a process of their own: the package draws from Python's and NumPy's own generators, and from sets of letters, whose
    order is that of Python's hashes, another one in every process unless it is told.

    Raises:
        MissingExtra: the package or what it imports is not installed.
    """
    command = [sys.executable, "-m", "igulora.benchmarks.mathematics", str(count), str(seed)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONHASHSEED": "0"}
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise MissingExtra(
            f"expected the package mathematics_dataset, which generates questions, got: {said[-1]}; install it with: "
            "pip install --no-deps mathematics_dataset six absl-py"
        )
    return [Example(question, answer) for question, answer in json.loads(done.stdout)]


def _generate(count: int, seed: int) -> list[tuple[str, str]]:
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
    print(json.dumps(_generate(int(sys.argv[1]), int(sys.argv[2]))))
