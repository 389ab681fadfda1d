"""Measured choices from outside: measure the products of some layers, look at what is kept, drop it.

What is measured is the base product with its rank term, forward (``x W^T``) and backward (``dy W``): cuBLAS with a kernel for the rank
term against kernels that compute both. A choice holds for one device, driver and set of versions, for one dtype and layer, for ranks up to
the next power of two and row counts up to the next power of two; it is used wherever such a product comes up, in any later process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import choice_file
from .backend import MAX_RANK, obstacle

if TYPE_CHECKING:
    from .fused.tuning import Measurement

_MOST_INTERPRETED = 1 << 22  # multiply-adds: seconds


def tune(
    layers: Sequence[tuple[int, int]],
    rows: Sequence[int],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    dropout: bool = False,
) -> Iterator[Measurement]:
    """Measure the forward and backward product of linear layers; each choice is kept as soon as it is made.

    Args:
        layers: (out, in) of each. rows: tokens of a batch, a product for each. rank: of the adapters.
        dropout: with dropout on the adapters' inputs, which concerns the backward product only.

    Raises:
        ValueError: a number is out of range, or no kernel can run on this device and dtype.
        torch.OutOfMemoryError: a product does not fit into the device's memory.
    """
    for name, sizes in (("sizes of layers", [n for layer in layers for n in layer]), ("rows", rows)):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"expected {name} of at least 1, got {list(sizes)}")
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"expected a rank from 1 to {MAX_RANK}, got {rank}")
    reason = obstacle(torch.empty(0, dtype=dtype, device=device), rank)
    if reason is not None:
        raise ValueError(
            f"expected a device and dtype that Triton kernels can run on, got a case they cannot: {reason}"
        )
    most = max(out * inner * count for out, inner in layers for count in rows)
    if device.type == "cpu" and most > _MOST_INTERPRETED:
        raise ValueError(
            f"expected products of at most {_MOST_INTERPRETED:,} multiply-adds under Triton's interpreter, got {most:,}; "
            "it is for trying things out only, so take a small layer and few rows"
        )
    return _tune(layers, rows, rank, dtype, device, dropout)


def _tune(
    layers: Sequence[tuple[int, int]],
    rows: Sequence[int],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    dropout: bool,
) -> Iterator[Measurement]:
    from .fused import choice, tuning  # Triton takes half a second to import

    for out, inner in layers:
        for count in rows:
            for transposed in (True, False):
                columns, summed = (out, inner) if transposed else (inner, out)
                size = (choice.bucket(count), columns, summed, choice.block_rank(rank))
                problem = choice.Problem(transposed, dtype, *size, dropout=dropout and not transposed)
                yield tuning.tune(problem, count, rank, device)


def file() -> Path:
    """Where choices are kept."""
    return choice_file.path()


def kept() -> dict[str, dict[str, dict[str, Any]]]:
    """All choices on disk: by environment (device and versions), then by problem. No device is needed to look."""
    return choice_file.read()


def clear() -> int:
    """Drop all choices, on disk and in this process; returns how many there were on disk.

    Raises:
        OSError: the file cannot be removed.
    """
    count = choice_file.clear()
    choice = sys.modules.get(f"{__package__}.fused.choice")
    if choice is not None:  # else nothing was looked up yet, and Triton need not be imported for this
        choice.forget()
    return count
