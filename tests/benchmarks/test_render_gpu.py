"""The GPU tables of the documents are those of the newest record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def render_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import render_gpu

    yield render_gpu
    sys.modules.pop("render_gpu", None)


def between(page: Path, markers: tuple[str, str]) -> str:
    _, _, rest = page.read_text(encoding="utf-8").partition(f"{markers[0]}\n")
    return rest.partition(markers[1])[0]


def test_the_documents_are_up_to_date(render_gpu) -> None:
    newest = render_gpu.newest()
    for page, text in (
        (render_gpu.README, render_gpu.summary(newest)),
        (render_gpu.KERNELS, render_gpu.launches(newest)),
    ):
        assert between(page, render_gpu.MARKERS) == text, "run python benchmarks/render_gpu.py"


def test_without_a_record_nothing_is_claimed(render_gpu) -> None:
    assert render_gpu.summary(None) == render_gpu.launches(None) == render_gpu.NOTHING
