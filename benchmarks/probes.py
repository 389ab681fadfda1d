"""Three ways to make a step cheaper that were tried on the CPU path, each against what the library does; medians of paired ratios.

    python benchmarks/probes.py                 # about a minute; writes results/probes/<date>.json

grouped: one product for the layers that share an input (q/k/v; gate/up) against one per layer, for S = x Q^T and dQ = dS^T x.
low-precision buffer: one cast of the flat master buffer per step against casts of P and Q in every forward and backward.
chunked scoring: the score update over cache-sized chunks against whole regions.
"""

from __future__ import annotations

import datetime
import importlib
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from igulora.benchmarks.machine import RESULTS, machine, versions
from igulora.kernels import importance_update

ROWS, RANK, LAYERS, REPEATS = (512, 2048), 32, 30, 15
# SmolLM2-135M: (features in, layers that share that input)
SHARED = (("q/k/v", 576, 3), ("gate/up", 576, 2))


def paired(one: Callable[[], object], other: Callable[[], object]) -> dict[str, object]:
    """Median and quartiles of time(one) / time(other), run in turns after a warm-up; and the other's median in ms."""
    one(), other()
    ratios, base = [], []
    for _ in range(REPEATS):
        marks = [time.perf_counter()]
        for run in (one, other):
            run()
            marks.append(time.perf_counter())
        ratios.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
        base.append((marks[2] - marks[1]) * 1e3)
    low, median, high = np.percentile(ratios, (25, 50, 75)).tolist()
    return {"ratio": median, "quartiles": [low, high], "reference_ms": float(np.median(base))}


def grouped(rows: int, features: int, layers: int) -> dict[str, object]:
    """One product for ``layers`` layers of ``RANK`` against one product each, for S and for dQ."""
    x = torch.randn(rows, features).bfloat16()
    Q = [torch.randn(RANK, features).bfloat16() for _ in range(layers)]
    dS = [torch.randn(rows, RANK).bfloat16() for _ in range(layers)]
    all_Q, all_dS = torch.cat(Q), torch.cat(dS, 1)

    def separate() -> None:
        for q, d in zip(Q, dS, strict=True):
            _ = x @ q.t(), d.t() @ x

    def together() -> None:
        _ = x @ all_Q.t(), all_dS.t() @ x

    return paired(together, separate)


def low_precision_buffer() -> dict[str, object]:
    """One cast of all masters of the model against two casts of every P and Q."""
    # (in, out) of a layer's seven linears
    shapes = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))
    widths = [width for shape in shapes for width in shape]
    flat = torch.randn(LAYERS * RANK * sum(widths))
    views = flat.split([RANK * width for _ in range(LAYERS) for width in widths])

    def twice() -> None:
        for _ in range(2):
            for view in views:
                view.to(torch.bfloat16)

    return paired(lambda: flat.to(torch.bfloat16), twice)


def chunked_scoring() -> dict[str, object]:
    """The shipped chunk size against whole regions, over buffers of the model's size."""
    kernel = importlib.import_module("igulora.kernels.importance")
    rows, length = 17_000, 576
    buffers: list[Tensor] = [torch.rand(rows * length) for _ in range(4)]
    shipped = kernel._CHUNK

    def update(chunk: int) -> None:
        kernel._CHUNK = chunk
        importance_update(*buffers, [0, rows, length])

    try:
        return paired(lambda: update(shipped), lambda: update(rows * length))
    finally:
        kernel._CHUNK = shipped


def main() -> None:
    """Run all probes, print them, write them."""
    results: dict[str, dict[str, object]] = {}
    for rows in ROWS:
        for name, features, layers in SHARED:
            results[f"grouped {name}, {rows} rows"] = grouped(rows, features, layers)
    results["one low-precision buffer per step"] = low_precision_buffer()
    results["chunked scoring"] = chunked_scoring()
    for name, found in results.items():
        print(f"{name}: {found['ratio']:.2f} of {found['reference_ms']:.2f} ms, quartiles {found['quartiles']}")
    date = datetime.date.today().isoformat()
    head = {"date": date, "machine": machine(), "versions": versions(), "threads": torch.get_num_threads()}
    path = RESULTS / "probes" / f"{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "probes": results}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
