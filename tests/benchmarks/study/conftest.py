"""The small study as a file and as it is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from igulora.benchmarks.study.plan import Study


@pytest.fixture
def file(tmp_path: Path) -> Path:
    from .small import FILE

    path = tmp_path / "small.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
def study(file: Path) -> Study:
    from igulora.benchmarks.study.reading import read_study

    return read_study(file)
