"""Rows of a reduction over M in two segments, each split among programs: training rows and path rows end in different sums.

Every program of a reduction walks one split and leaves a partial sum; the partial sums of a segment are added in their order by
``sums.py``. No program touches rows of both segments, so that a mixed batch needs no second pass.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv


class Segments(NamedTuple):
    """Rows [0, end0) and [start1, end1), in ``splits0`` and ``splits1`` splits of ``per_split`` rows."""

    end0: int
    start1: int
    end1: int
    splits0: int
    splits1: int
    per_split: int

    @classmethod
    def of(cls, end0: int, start1: int, end1: int, block: int, wanted: int) -> Segments:
        """About ``wanted`` splits in all, in whole blocks of rows."""
        rows = end0 + end1 - start1
        per_split = max(cdiv(cdiv(rows, max(wanted, 1)), block), 1) * block
        return cls(end0, start1, end1, cdiv(end0, per_split), cdiv(end1 - start1, per_split), per_split)

    @property
    def splits(self) -> int:
        """Splits of both segments."""
        return self.splits0 + self.splits1

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        """What kernels take: end0, start1, end1, splits0, per_split."""
        return self.end0, self.start1, self.end1, self.splits0, self.per_split


FACTOR_ARGUMENTS = ("has_alpha", "has_weight")
SEGMENT_ARGUMENTS = ("end0", "start1", "end1", "splits0", "per_split")


@triton.jit
def split_rows(split, end0, start1, end1, splits0, per_split):
    """(first row, row behind the last) of a split."""
    in_first = split < splits0
    first = tl.where(in_first, split * per_split, start1 + (split - splits0) * per_split)
    return first, tl.minimum(first + per_split, tl.where(in_first, end0, end1))


@triton.jit
def row_factors(alpha_ptr, weight_ptr, has_alpha, has_weight, rows, end, rows_per_group, in_first):
    """(rows,) float32 factors of adapter gradients: alpha in the first segment, the path weight in the second; 1 without them."""
    given = tl.where(in_first, has_alpha, has_weight) != 0
    factor_ptr = tl.where(in_first, alpha_ptr, weight_ptr)
    # 0 elsewhere, as asynchronous copies fill it in: another number takes registers.
    factor = tl.load(factor_ptr + rows // rows_per_group, mask=rows < tl.where(given, end, 0), other=0.0)
    return tl.where(given, factor, 1.0)


def factor_pointers(
    scaled: bool, alpha: Tensor | None, path_weight: Tensor | None, other: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What kernels take for :func:`row_factors`, which serves either or both; ``other`` (float32, not read) where one is missing."""
    if not scaled:
        return None, None
    return alpha if alpha is not None else other, path_weight if path_weight is not None else other
