"""What a kernel must move and compute: the numbers that projections, the benchmark suite and the tests share.

Beside every launcher of ``fused/`` stands a function that returns the :class:`Traffic` of one launch, from shapes alone. Tests hold it
against the loads and stores that Triton's interpreter makes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes and FLOPs of one or several launches.

    Attributes:
        read, written: distinct bytes: what must come from and go to memory at least once per launch.
        loaded, stored: bytes that all programs ask for; what exceeds ``read`` is read again, by rule from the L2 cache.
        flops: of matrix products, a multiply-add counting 2, tiles cut at the matrices' edges.
    """

    read: int = 0
    written: int = 0
    loaded: int = 0
    stored: int = 0
    flops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.read + other.read,
            self.written + other.written,
            self.loaded + other.loaded,
            self.stored + other.stored,
            self.flops + other.flops,
        )

    def in_windows(self, windows: int, shared: int = 0) -> Traffic:
        """Of one launch that does this in each of a block-diagonal adapter's windows; ``shared`` bytes of ``read`` are the same in all."""
        if windows == 1:
            return self
        rest = (self.written, self.loaded, self.stored, self.flops)
        return Traffic(self.read * windows - shared * (windows - 1), *(part * windows for part in rest))

    @property
    def moved(self) -> int:
        """Distinct bytes read and written."""
        return self.read + self.written
