"""The device of the GPU suite: what it is, how calls are timed on it, and the two floors that figures are a fraction of.

Times of kernels and layers are those of the device alone: before each call the L2 cache is filled with other data, read and not written,
since a call would else be charged with writing that back; and the device is made to wait until the host has launched everything, so that
no launch is waited for. Times of the host come from calls one after the other.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import platform
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igulora.benchmarks.ratios import quartiles
from igulora.kernels.backend import ReferenceWarning, interpreting, runs_fused

HERE = Path(__file__).resolve().parent
Call = Callable[[], object]
Times = dict[str, list[float]]
PACKAGES = ("igulora", "torch", "triton", "transformers", "peft", "unsloth", "lorafusion", "numpy")


@dataclass(frozen=True)
class Setting:
    """What a run of the suite measures on.

    Attributes:
        dtype: of activations and base weights: bfloat16, and float32 where Triton's interpreter stands in for a device.
        tiny: shapes that take milliseconds to interpret; their times mean nothing.
        quick: fewer shapes and repetitions.
    """

    device: torch.device
    dtype: torch.dtype
    tiny: bool = False
    quick: bool = False

    @classmethod
    def here(cls, *, tiny: bool, quick: bool) -> Setting:
        """The first CUDA device, or the CPU without one."""
        cuda = torch.cuda.is_available()
        return cls(
            torch.device("cuda", 0) if cuda else torch.device("cpu"),
            torch.bfloat16 if cuda else torch.float32,
            tiny,
            quick,
        )


class Deadline:
    """A point in time after which no further item of a part is started.

    Args:
        at: in seconds of ``time.time()``.
    """

    def __init__(self, at: float) -> None:
        self.at = at

    @property
    def left(self) -> float:
        """Seconds left, negative behind it."""
        return self.at - time.time()

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self.left <= 0

    def within(self, share: float) -> Deadline:
        """A deadline of its own for something that may take this share of what is left."""
        return Deadline(time.time() + share * max(self.left, 0))


def _output(*command: str) -> str:
    """Standard output of a command, empty where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def versions() -> dict[str, str]:
    """Versions of the packages that are installed, and the commit of this repository."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed" if name != "igulora" else "from the checkout"
    commit = _output("git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10")
    return found | {"commit": commit or "unknown"}


def _driver() -> dict[str, str]:
    """Driver, clocks and power of the first device as nvidia-smi reports them; empty without it."""
    fields = (
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "clocks.max.mem",
        "power.draw",
        "power.limit",
        "temperature.gpu",
    )
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None) if torch.cuda.is_available() else None
    device = f"GPU-{uuid}" if uuid else "0"
    values = _output("nvidia-smi", f"--id={device}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    found = values.split(", ")
    return dict(zip(fields, found, strict=True)) if len(found) == len(fields) else {}


def describe(device: torch.device) -> dict[str, Any]:
    """What the figures are measured on."""
    place: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "type": device.type}
    if device.type != "cuda":
        return place | {"name": platform.processor() or platform.machine(), "interpreted": interpreting()}
    properties = torch.cuda.get_device_properties(device)
    return place | {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "devices": torch.cuda.device_count(),
        "nvidia_smi": _driver(),
    }


def backend(setting: Setting) -> dict[str, str]:
    """Which implementation igulora's operators run with here, and why if it is not the kernels."""
    like = torch.empty(16, dtype=setting.dtype, device=setting.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ReferenceWarning)
        try:
            fused = runs_fused(like, 32)
        except ValueError as error:
            return {"runs": "nothing", "reason": str(error)}
    reasons = [str(w.message) for w in caught if issubclass(w.category, ReferenceWarning)]
    if fused:
        return {"runs": "triton", "reason": ""}
    return {"runs": "reference", "reason": "; ".join(reasons) or "the reference was asked for (IGULORA_BACKEND)"}


def environment(setting: Setting) -> dict[str, Any]:
    """Everything a reader needs to know beside the figures."""
    return {
        "date": datetime.date.today().isoformat(),
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": describe(setting.device),
        "versions": versions(),
        "backend": backend(setting),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "tiny": setting.tiny,
        "quick": setting.quick,
    }


# -- clocks -----------------------------------------------------------------------------------------------------------


class Clock:
    """Times calls on a device; on a CPU by the processor's own clock, without any of the care below.

    Args:
        device: where the calls run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if not self.cuda:
            return
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._other = torch.zeros(max(2 * cache, 64 << 20) // 4, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)
        self._cycles_per_ms = self._calibrated()

    def _calibrated(self) -> float:
        """Cycles that the device waits in a millisecond."""
        cycles = 10_000_000
        torch.cuda._sleep(cycles)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return cycles / max(start.elapsed_time(end), 1e-3)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def host_ms(self, call: Call) -> float:
        """Milliseconds the host needs to launch a call."""
        self.synchronize()
        start = time.perf_counter()
        call()
        elapsed = (time.perf_counter() - start) * 1e3
        self.synchronize()
        return elapsed

    def once(self, call: Call, head_ms: float) -> float:
        """Milliseconds of one call on the device with a cold L2 cache.

        Args:
            head_ms: how long the device waits first: at least what the host needs to launch the call.
        """
        if not self.cuda:
            return self.host_ms(call)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self._other, 0, out=self._sum)
        torch.cuda._sleep(int(head_ms * self._cycles_per_ms))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def interleaved(
        self, calls: dict[str, Call], seconds: float, rounds: tuple[int, int] = (5, 40)
    ) -> tuple[Times, dict[str, str]]:
        """Device times in milliseconds, one of each call per round, in alternating order.

        Args:
            seconds: about how long all rounds may take. rounds: least and most of them.

        Returns:
            Times per call, and the traceback of every call that raised while it warmed up.
        """
        failed: dict[str, str] = {}
        heads: dict[str, float] = {}
        for name, call in calls.items():
            try:
                for _ in range(2 if self.cuda else 0):
                    call()
                heads[name] = 2 * self.host_ms(call) + 0.1
            except Exception:
                failed[name] = traceback.format_exc()
                self.synchronize()  # a device that is lost raises here, which ends the part
        times: Times = {name: [] for name in heads}
        order = list(heads)
        least, most = rounds if self.cuda else (1, 1)
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter()
            for turn in range(most):
                if turn >= least and time.perf_counter() - start > seconds:
                    break
                for name in order if turn % 2 else reversed(order):
                    times[name].append(self.once(calls[name], heads[name]))
        finally:
            gc.enable()
        return times, failed

    def called(self, call: Call, count: int = 10) -> float:
        """Milliseconds per call as a program sees them that calls one after the other and waits at the end."""
        if not self.cuda:
            return self.host_ms(call)
        call()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self.synchronize()
        return (time.perf_counter() - start) * 1e3 / count


# -- floors -----------------------------------------------------------------------------------------------------------


def _random(setting: Setting, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=setting.dtype, device=setting.device)


def copy_bandwidth(setting: Setting, clock: Clock) -> dict[str, Any]:
    """Bytes read and written per second by a copy within the device's memory, far larger than any cache."""
    size = 1 << 20
    if setting.device.type == "cuda":
        size = min(1 << 30, torch.cuda.mem_get_info(setting.device)[0] // 8)
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    times, _ = clock.interleaved({"copy": lambda: target.copy_(source), "fill": lambda: target.zero_()}, seconds=1.0)
    result = {"bytes": size, "ms": quartiles(times["copy"]), "fill_ms": quartiles(times["fill"])}
    return result | {
        "bytes_per_s": 2 * size / result["ms"]["median"] * 1e3,
        "fill_bytes_per_s": size / result["fill_ms"]["median"] * 1e3,
    }


def gemm_rate(setting: Setting, clock: Clock, M: int, N: int, K: int) -> dict[str, Any]:
    """FLOPs per second of the library's products ``x W^T`` and ``dy W``, (M, K) by (N, K) and (M, N) by (N, K)."""
    x, dy, W = _random(setting, M, K), _random(setting, M, N), _random(setting, N, K)
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    times, _ = clock.interleaved(
        {"forward": lambda: torch.mm(x, W.t(), out=y), "backward": lambda: torch.mm(dy, W, out=dx)}, seconds=1.0
    )
    ms = {name: quartiles(series) for name, series in times.items()}
    flops = 2 * M * N * K
    return {
        "shape": [M, N, K],
        "ms": ms,
        "flops_per_s": {name: flops / value["median"] * 1e3 for name, value in ms.items()},
        "nvidia_smi": _driver() if M * N * K >= 4096**3 else {},  # clocks while they are still under load
    }


def shapes(setting: Setting) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """(in, out) of the layers, numbers of rows, and ranks; those that matter most come first."""
    if setting.tiny:
        return [(48, 40)], [32], [8]
    if setting.quick:
        return [(4096, 4096), (4096, 11008)], [8192, 2048], [32]
    return [(4096, 4096), (4096, 11008)], [8192, 2048, 512], [32, 16, 64]


def items(setting: Setting) -> Iterator[tuple[str, Callable[[Deadline], dict[str, Any]]]]:
    """The floors: bandwidth, then products, the large square one first."""
    clock = Clock(setting.device)
    yield "copy", lambda _: copy_bandwidth(setting, clock)
    features, rows, _ = shapes(setting)
    sizes = [(64, 64, 64) if setting.tiny else (8192, 8192, 8192)]
    sizes += [(M, N, K) for M in rows for K, N in features]
    for M, N, K in sizes:
        yield f"gemm {M}x{N}x{K}", lambda _, size=(M, N, K): gemm_rate(setting, clock, *size)
