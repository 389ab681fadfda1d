"""Whole steps on a CUDA device. Tests without the mark ``gpu`` run everywhere: on a CPU, Triton's interpreter checks their logic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from igulora.kernels.backend import use_backend


@pytest.fixture(autouse=True)
def _needs_device(request: pytest.FixtureRequest) -> None:
    """Tests marked ``gpu`` are skipped without one, for one reason."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _triton(_needs_device: None) -> Iterator[None]:
    """Every operator of these tests runs as a Triton kernel, or raises."""
    with use_backend("triton"):
        yield
