"""Effective rank of a gradient two ways: exactly from the smaller Gram matrix, and sampled; how long, and how far apart.

    python -m igulora.benchmarks.spectra             # minutes; results/spectra/<date>-<machine>.json, README.md

Matrices are products of Gaussians around known decays, so that their spectra fall as fast as those decays and nothing else about them is
special; ``null`` leaves three quarters of the directions out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igulora.spectra import exact_erank, sampled_erank

from .machine import RESULTS, circumstances
from .pages import keep, place, table

FOLDER = RESULTS / "spectra"
SIDES = (1024, 2048, 4096)
REPEATS = 3
DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": torch.ones_like,
    "1/k": lambda k: 1 / k,
    "k^-1/2": lambda k: k**-0.5,
    "1/k, null": lambda k: torch.where(k <= len(k) / 4, 1 / k, torch.zeros_like(k)),
}


def drawn(decay: str, side: int, seed: int = 0) -> Tensor:
    """(side, side) float32, like a gradient that ``align`` measures."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(side, side, generator=g) / side**0.5 for _ in range(2))
    return (left * DECAYS[decay](torch.arange(1.0, side + 1))) @ right


def compared(decay: str, side: int) -> dict[str, Any]:
    """Both ways in turn: seconds of each, the exact value, and the samples' distances from it."""
    matrix, seconds = drawn(decay, side), {"exact": [], "sampled": []}
    exact, samples = 0.0, []
    for seed in range(REPEATS):
        begin = time.perf_counter()
        exact = exact_erank(matrix)
        middle = time.perf_counter()
        samples.append(sampled_erank(matrix, generator=torch.Generator().manual_seed(seed)))
        seconds["exact"].append(middle - begin)
        seconds["sampled"].append(time.perf_counter() - middle)
    return {
        "decay": decay,
        "side": side,
        "erank": exact,
        "off": [sample / exact - 1 for sample in samples],
        "seconds": seconds,
        "over_exact": [b / a for a, b in zip(seconds["exact"], seconds["sampled"], strict=True)],
    }


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = []
    for found in record["matrices"]:
        exact, sampled = (statistics.median(found["seconds"][way]) for way in ("exact", "sampled"))
        rows.append(
            [f"{found['decay']}, {found['side']}", f"{found['erank']:.1f}", f"{100 * max(map(abs, found['off'])):.1f}%",
             f"{exact:.2f}", f"{sampled:.2f}", f"{statistics.median(found['over_exact']):.2f}"]
        )  # fmt: skip
    header = ["decay, side", "effective rank", "sampled: largest error", "exact, s", "sampled, s", "sampled over exact"]
    return "\n".join(
        [
            "# Effective rank: exact and sampled",
            "",
            f"Made by `python -m igulora.benchmarks.spectra`; medians of {REPEATS} in turn, each sample with a seed of its own. A square "
            "matrix of float32; the exact value from the eigenvalues of its Gram matrix.",
            "",
            place(record),
            "",
            table(header, rows),
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help=f"of the matrices (default {SIDES})")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the record and its page")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        **circumstances(),  # first: what is committed while it runs is not what ran
        "matrices": [compared(decay, side) for side in options.sides for decay in DECAYS],
    }
    keep(record, page(record), options.output)
    print(page(record))


if __name__ == "__main__":
    main()
