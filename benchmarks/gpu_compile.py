"""Compiles what the later parts time, in several processes at once, into Triton's cache on disk: one process would need minutes.

Each worker runs its share of the operators and product forms; kernels do not depend on the number of rows, nor on sizes beyond their
alignment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu_kernels import candidates, fused_modules, operator_launches, shared_launches
from gpu_machine import Deadline, Setting, shapes

_ROWS = 320


def tasks(setting: Setting) -> list[tuple[str, Callable[[], object]]]:
    """What is to be compiled, in small pieces, those of the first rank first."""
    features, rows, ranks = shapes(setting)
    K, N = features[0]
    M = 32 if setting.tiny else _ROWS
    found: list[tuple[str, Callable[[], object]]] = []
    for r in ranks:
        for count in dict.fromkeys((M, rows[0])):  # many rows take other passes than few
            call = partial(operator_launches, setting, count, N, K, r, mixed=False)
            found.append((f"layer of {count} rows r{r}", call))
        for transposed in (True, False):
            direction = "forward" if transposed else "backward"
            products = candidates(setting, transposed=transposed, M=M, N=N, K=K, r=r)
            for product in products[:1] if setting.tiny else products:
                call = partial(_product, setting, M, N, K, r, transposed, product)
                found.append((f"{direction} {product} r{r}", call))
        if setting.tiny:
            continue
        found.append((f"three layers r{r}", partial(shared_launches, setting, M, K, r)))
        found.append((f"mixed batch r{r}", partial(operator_launches, setting, M, N, K, r, mixed=True)))
    return found


def _product(setting: Setting, M: int, N: int, K: int, r: int, transposed: bool, product: Any) -> None:
    launches = operator_launches(setting, M, N, K, r, mixed=False)
    (launch,) = (a for a in launches if a.name == "base_product" and a["transposed"] == transposed)
    with fused_modules()["choice"].use_product(product):
        launch.run()


def worker(turn: int, workers: int, *, tiny: bool, quick: bool) -> int:
    """Every ``workers``-th task; a form that does not compile is the later parts' to report."""
    for name, call in tasks(Setting.here(tiny=tiny, quick=quick))[turn::workers]:
        start = time.perf_counter()
        try:
            call()
        except Exception:
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    return 0


def run(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """All workers, one for each pair of cores, up to eight."""
    workers = 1 if setting.tiny else min(max((os.cpu_count() or 1) // 2, 1), 8)
    flags = [flag for flag, on in (("--tiny", setting.tiny), ("--quick", setting.quick)) if on]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{turn}.txt" for turn in range(workers)]
        processes = []
        for turn, file in enumerate(outputs):
            command = [sys.executable, __file__, str(turn), str(workers), *flags]
            with file.open("wb") as out:
                processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
        while any(process.poll() is None for process in processes) and not deadline.passed:
            time.sleep(0.1)
        cut = sum(process.poll() is None for process in processes)
        for process in processes:
            process.kill()
            process.wait()
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in outputs]
    lines = [line for text in texts for line in text.splitlines() if line.endswith(" s")]
    result: dict[str, Any] = {"workers": workers, "compiled": lines, "tasks": len(tasks(setting))}
    lost = [text[-2000:] for text, process in zip(texts, processes, strict=True) if process.returncode not in (0, -9)]
    return (
        result | ({"cut": f"{cut} workers were not done in time"} if cut else {}) | ({"error": lost[0]} if lost else {})
    )


def items(setting: Setting) -> Iterator[tuple[str, Callable[[Deadline], dict[str, Any]]]]:
    """One item: all workers."""
    yield "workers", lambda deadline: run(setting, deadline)


if __name__ == "__main__":
    sys.exit(worker(int(sys.argv[1]), int(sys.argv[2]), tiny="--tiny" in sys.argv, quick="--quick" in sys.argv))
