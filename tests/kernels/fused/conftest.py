"""The Triton kernels run here compiled on a CUDA device where there is one, and under Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from igulora.kernels.backend import use_backend


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    """Every operator of these tests runs as a Triton kernel, or raises."""
    with use_backend("triton"):
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
