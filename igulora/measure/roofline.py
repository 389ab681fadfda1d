"""Cards, and the time that a roofline projects for what was counted. A projection, not a measurement.

The rule. A call takes the longer of its bytes over the card's bandwidth and its FLOPs over the sustained part of its bf16 rate, and each of
its launches ``launch_s`` besides, in which the kernel before drains and it fills the card. The sum is the device's time. The host needs
``host_s`` for each launch, ahead of the device: a step takes the longer of the two, and ``sync_s`` for each wait.

What it leaves out: caches that keep a result for the next launch, memory that a host's allocator has to find, products of few rows that
fill a card badly, and Python that runs between launches. The floor shares most of it, so that ratios are worth more than times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import check_choice
from .costs import Cost
from .operators import Architecture

PROJECTION = "projection, not a measurement"

# Share of the dense peak that a library's large product is taken to sustain; bandwidth is taken at its peak.
SUSTAINED = 0.8
# Seconds. A launch behind another: NVIDIA's introduction of CUDA graphs (developer.nvidia.com/blog/cuda-graphs) shows kernels of 2.9 us
# that follow one another every 3.8 us.
LAUNCH_S = 1e-6
# What eager PyTorch's host needs for one operator of a training step: Python, autograd and the dispatcher, 5 to 10 us on current servers.
HOST_S = 6e-6
# A wait: the queue runs dry, a value is copied, and the host starts anew.
SYNC_S = 20e-6


@dataclass(frozen=True)
class Card:
    """Published figures of a card.

    Attributes:
        family: architecture family, by which the kernels choose their tiles. processors: multiprocessors.
        bandwidth: of the memory, TB/s. rate: dense bf16 with float32 accumulation, TFLOP/s. cache: L2, MB.
    """

    name: str
    family: str
    processors: int
    bandwidth: float
    rate: float
    cache: int

    @property
    def where(self) -> Architecture:
        """What igulora's launchers would see."""
        return Architecture(self.family, self.processors)


# From NVIDIA's data sheets; a family is named by its first compute capability, so that Ada (8.9) counts as 8.6.
CARDS = {
    card.name: card
    for card in (
        Card("A100 SXM 80 GB", "sm_80", 108, 2.039, 312.0, 40),
        Card("H100 SXM", "sm_90", 132, 3.35, 989.4, 50),
        Card("H200 SXM", "sm_90", 132, 4.8, 989.4, 50),
        Card("L40", "sm_86", 142, 0.864, 181.05, 96),
        Card("L40S", "sm_86", 142, 0.864, 362.05, 96),
        Card("RTX 4090", "sm_86", 128, 1.008, 165.2, 72),
    )
}
SHORT = {"A100": "A100 SXM 80 GB", "H100": "H100 SXM", "H200": "H200 SXM", "4090": "RTX 4090"}


def card(name: str) -> Card:
    """A card by its name or its short name, in any case.

    Raises:
        ValueError: unknown; names the nearest.
    """
    names = {key.lower(): value for key, value in (*SHORT.items(), *((n, n) for n in CARDS))}
    check_choice("card", name.lower(), names)
    return CARDS[names[name.lower()]]


@dataclass(frozen=True)
class Roofline:
    """A card with what its launches, its host and its waits are taken to cost.

    Attributes:
        sustained: share of the card's rate that products reach.
        launch_s, host_s, sync_s: seconds, see the head of this file.
    """

    card: Card = field(default_factory=lambda: CARDS["H100 SXM"])
    sustained: float = SUSTAINED
    launch_s: float = LAUNCH_S
    host_s: float = HOST_S
    sync_s: float = SYNC_S

    def __post_init__(self) -> None:
        figures = {"sustained": self.sustained, "bandwidth": self.card.bandwidth, "rate": self.card.rate}
        for name, value in figures.items():
            if not value > 0:
                raise ValueError(f"expected {name} > 0, got {value}")
        for name in ("launch_s", "host_s", "sync_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} >= 0 seconds, got {getattr(self, name)}")

    def with_figures(self, bandwidth: float | None, rate: float | None) -> Roofline:
        """The same with another bandwidth (TB/s) or rate (TFLOP/s) of the card, each where it is given."""
        if bandwidth is None and rate is None:
            return self
        own = self.card
        return replace(
            self,
            card=replace(
                own,
                bandwidth=own.bandwidth if bandwidth is None else bandwidth,
                rate=own.rate if rate is None else rate,
            ),
        )

    def device_seconds(self, cost: Cost) -> float:
        """Device's time for one call."""
        moved = cost.moved / (self.card.bandwidth * 1e12)
        return max(moved, cost.flops / (self.sustained * self.card.rate * 1e12)) + cost.launches * self.launch_s

    def device_time(self, calls: Mapping[Cost, int] | Iterable[tuple[Cost, int]]) -> float:
        """Of calls with how often each is made."""
        pairs = calls.items() if isinstance(calls, Mapping) else calls
        return sum(count * self.device_seconds(cost) for cost, count in pairs)

    def step_time(self, device: float, launches: float, syncs: float) -> float:
        """Of a step, from the device's time, launches and waits."""
        return max(device, launches * self.host_s) + syncs * self.sync_s

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)
