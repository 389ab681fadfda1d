"""Questions of school mathematics with their answers, from a package that generates them (mathematics_dataset, which pip downloads)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from igulora.training.data import Example
from igulora.training.extras import MissingExtra

_GENERATOR = Path(__file__).with_name("generate_mathematics.py")


def questions(count: int, seed: int = 0) -> list[Example]:
    """``count`` easy questions, kinds in turn, none twice; the same for one seed and version of the package.

    They are made in a process of their own: the package draws from Python's and NumPy's own generators, and from sets of letters, whose
    order is that of Python's hashes, another one in every process unless it is told.

    Raises:
        MissingExtra: the package or what it imports is not installed.
    """
    command = [sys.executable, str(_GENERATOR), str(count), str(seed)]
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
