"""No kernel is compiled again for another rank of a bucket, number of tokens, alpha, or place of a vector in its buffer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

Keys = dict[str, dict[str, list[str]]]


@pytest.fixture(scope="module")
def found() -> Keys:
    """{question: {value asked about: keys of the launches}}, from a process that does not interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "IGULORA_BACKEND")}
    program = Path(__file__).parent / "launch_keys.py"
    result = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def differences(keys: dict[str, list[str]]) -> dict[str, set[str]]:
    """Per kernel, the arguments by which its keys differ."""
    seen: dict[str, dict[str, set[str]]] = {}
    for name, arguments in (json.loads(key) for value in keys.values() for key in value):
        for argument, kind in arguments.items():
            seen.setdefault(name, {}).setdefault(argument, set()).add(kind)
    return {name: {a for a, kinds in arguments.items() if len(kinds) > 1} for name, arguments in seen.items()}


@pytest.mark.parametrize("asked", ["ranks", "tokens", "alphas", "offsets", "sequences", "dropouts"])
def test_one_set_of_kernels(found: Keys, asked: str) -> None:
    answers = {question: keys for question, keys in found.items() if question.startswith(asked)}
    assert answers
    for question, keys in answers.items():
        assert len(keys) > 1
        assert all(keys.values())
        assert len(set(map(tuple, keys.values()))) == 1, f"{question}: {differences(keys)}"


def test_few_rows_of_many_columns_are_split_by_a_kernel_of_their_own(found: Keys) -> None:
    """Where K is split, S is left in float32 parts: two kernels in all, however many tokens there are."""
    keys = list(found["split, tokens"].values())
    assert len(set(map(tuple, keys))) == 2
    assert len([key for key in set().union(*keys) if json.loads(key)[0] == "_project_kernel"]) == 2


def test_every_kernel_was_asked_about(found: Keys) -> None:
    names = {json.loads(key)[0] for keys in found.values() for value in keys.values() for key in value}
    assert names >= {
        "_project_kernel",
        "_sum_splits_kernel",
        "_gemm_rank_kernel",
        "_gemm_rank_descriptor_kernel",
        "_rank_term_kernel",
        "_dy_pass_kernel",
        "_ds_sum_kernel",
        "_dq_pass_kernel",
        "_sum_partials_kernel",
    }
