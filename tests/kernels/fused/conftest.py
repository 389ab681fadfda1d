"""The Triton kernels run here compiled on a CUDA device where there is one, and under Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from igulora.kernels.backend import use_backend


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    """Every operator of these tests runs as a Triton kernel, or raises."""
    with use_backend("triton"):
        yield
