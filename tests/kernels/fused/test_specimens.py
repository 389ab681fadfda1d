"""Whatever a launcher can launch, the compile report compiles: as a specimen, or as one that differs by nothing that matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from igulora.kernels.fused.common import SHARED_MEMORY


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What ``launched.py`` says of each family, from a process that does not interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "IGULORA_BACKEND")}
    program = Path(__file__).parent / "launched.py"
    result = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("family", SHARED_MEMORY)
def test_specimens_stand_for_all_launches(found: dict[str, Any], family: str) -> None:
    assert found[family]["launches"] > found[family]["specimens"]
    assert found[family]["unlike"] == []


@pytest.mark.parametrize("family", SHARED_MEMORY)
def test_every_specimen_is_launched(found: dict[str, Any], family: str) -> None:
    """As it is: a specimen that no scenario launches hides what the scenarios lack, or takes the report's time for nothing."""
    assert found[family]["idle"] == []


def test_what_no_specimen_stands_for_is_found(found: dict[str, Any]) -> None:
    assert len(found["strange"]["unlike"]) == found["strange"]["launches"] == 4
