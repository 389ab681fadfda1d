"""Path gradient to triplet-row scores in one pass over the bank (ALGORITHMS 2.3; IGU-LoRA Eq. 7, 10-12).

Contract. All buffers are flat float32 of one length. For every element ``y = |w * T|`` (or ``|T|`` when the accumulator already
holds ``|w| * |gradient|`` means), then ``mean <- beta1 mean + (1 - beta1) y``, ``deviation <- beta2 deviation +
(1 - beta2) |y - mean|`` with the updated mean, and a score per element; what comes back is the mean over each row. Each state is read
and written once. If any element of T is not finite, no state changes (a skipped step of a GradScaler). Fixed-order sums.

``regions`` is a flat list of (offset, rows, length) triples: ``rows`` consecutive rows of ``length`` elements starting at ``offset``.
Rows of one length are stored together, so that a pass over a region is a pass over a matrix: that is how the reference walks. The kernels
of ``fused/importance.py`` walk the same rows by a table on the device, one (offset, length, column) per row, the column being where in the
result the row's means go (:func:`row_table`). A caller that keeps the table spares each update a copy to the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .backend import as_given, runs_fused

COMBINES = ("snr", "snr-release", "product", "mean")
# Elements per chunk on CPU: five float32 streams of a chunk stay in the last-level cache of one core.
_CHUNK = 1 << 17


def _chunks(regions: list[int], device: torch.device) -> Iterator[tuple[int, int, int, int]]:
    """(offset, rows, length, first row) of cache-sized pieces of every region."""
    row = 0
    for i in range(0, len(regions), 3):
        offset, rows, length = regions[i : i + 3]
        step = max(_CHUNK // max(length, 1), 1) if device.type == "cpu" else max(rows, 1)
        for start in range(0, rows, step):
            yield offset + start * length, min(step, rows - start), length, row + start
        row += rows


def _combined(mean: Tensor, deviation: Tensor, eps: float, combine: str) -> Tensor:
    if combine == "product":
        return mean * deviation
    if combine == "mean":
        return mean
    numerator = mean + eps if combine == "snr-release" else mean
    return numerator / (deviation + eps)


def row_table(regions: list[int], slots: Tensor | None = None) -> Tensor:
    """(rows, 3) int64: offset, length and result column of every row, in the order of the regions.

    Args:
        regions: (offset, rows, length) triples, flattened.
        slots: int64 (rows,), the column of each row; the rows' own order by default. The table lies on its device, or on the CPU.
    """
    device = torch.device("cpu") if slots is None else slots.device
    table = torch.tensor(
        [
            (o + i * length, length)
            for o, n, length in zip(*(regions[k::3] for k in range(3)), strict=True)
            for i in range(n)
        ],
        dtype=torch.int64,
    ).reshape(-1, 2)
    columns = torch.arange(len(table)) if slots is None else slots
    return torch.column_stack((table.to(device), columns))


def _reference(
    weight: Tensor,
    path: Tensor,
    mean: Tensor,
    deviation: Tensor,
    regions: list[int],
    beta1: float,
    beta2: float,
    eps: float,
    combine: str,
    absolute: bool,
    slots: Tensor | None,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns row statistics (4, rows) = row means of score, y, mean, deviation, and the () flag "T was finite"."""
    chunks = list(_chunks(regions, weight.device))
    total = sum(regions[1::3])
    # A sum is finite unless a term is not (or float32 overflows, which a gradient must not do either).
    sums = [path[o : o + n * length].sum() for o, n, length, _ in chunks]
    finite = torch.isfinite(torch.stack(sums)).all() if sums else torch.ones((), dtype=torch.bool, device=weight.device)
    step1, step2 = finite * (1.0 - beta1), finite * (1.0 - beta2)
    stats = weight.new_zeros((4, total))
    for offset, rows, length, row in chunks:
        part = slice(offset, offset + rows * length)
        y = path[part].abs() if absolute else torch.mul(weight[part], path[part]).abs_()
        y.nan_to_num_(0.0, 0.0, 0.0)  # 0 * NaN is NaN: without this the masked update would still poison the states
        m, u = mean[part], deviation[part]
        m.lerp_(y, step1.to(m.dtype))
        u.lerp_((y - m).abs_(), step2.to(u.dtype))
        columns = slice(row, row + rows)
        for k, values in enumerate((_combined(m, u, eps, combine), y, m, u)):
            torch.mean(values.view(rows, length), dim=1, out=stats[k, columns])
    if slots is not None:
        stats = torch.empty_like(stats).index_copy_(1, slots, stats)
    return stats, finite


_importance_update = torch.library.custom_op("igulora::importance_update", mutates_args=("mean", "deviation"))(
    _reference
)


@_importance_update.register_fake
def _(weight, path, mean, deviation, regions, beta1, beta2, eps, combine, absolute, slots, table=None):
    return weight.new_empty((4, sum(regions[1::3]))), torch.empty((), dtype=torch.bool, device=weight.device)


@_importance_update.register_kernel(("cpu", "cuda"))
def _dispatch(weight, path, mean, deviation, regions, beta1, beta2, eps, combine, absolute, slots, table=None):
    if not runs_fused(weight):
        return _reference(weight, path, mean, deviation, regions, beta1, beta2, eps, combine, absolute, slots)
    from .fused.importance import launch_importance  # Triton takes half a second to import

    if table is None:
        table = row_table(regions, slots).to(weight.device)
    with as_given(weight):
        return launch_importance(weight, path, mean, deviation, regions, beta1, beta2, eps, combine, absolute, table)


def importance_update(
    weight: Tensor,
    path: Tensor,
    mean: Tensor,
    deviation: Tensor,
    regions: list[int],
    *,
    beta1: float = 0.85,
    beta2: float = 0.85,
    eps: float = 1e-6,
    combine: str = "snr",
    absolute: bool = False,
    slots: Tensor | None = None,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Update mean and deviation in place from the path gradient and return what each row scores.

    Args:
        weight, path, mean, deviation: flat float32 (n,): w, T (Eq. 5-7), EMA of y (Eq. 10), EMA of |y - mean| (Eq. 11).
        regions: (offset, rows, length) triples, flattened.
        beta1, beta2, eps: smoothing constants of Eq. 10-12.
        combine: "snr" mean/(deviation + eps), "snr-release" (mean + eps)/(deviation + eps), "product" mean*deviation, "mean".
        absolute: the path buffer already holds means of |w| |gradient| (Eq. 7): y = |T|.
        slots: int64 (rows,), a permutation: the column of the result that each row writes to; the rows' own order by default.
        table: what :func:`row_table` makes of ``regions`` and ``slots``, on the device of the buffers; it says the slots, too. Without
            it kernels have to make it, which waits for a copy to the device.

    Returns:
        stats float32 (4, rows): row means of score, y, mean, deviation, rows numbered in the order of the regions or by ``slots``; and
        a () bool tensor, False when T held a non-finite value and nothing was updated.

    Raises:
        ValueError: unknown ``combine``, buffers of different lengths, a table of other rows, or slots beside a table.
    """
    if combine not in COMBINES:
        raise ValueError(f"expected combine in {COMBINES}, got {combine!r}")
    if not weight.shape == path.shape == mean.shape == deviation.shape or weight.ndim != 1:
        shapes = [tuple(t.shape) for t in (weight, path, mean, deviation)]
        raise ValueError(f"expected four flat buffers of one length, got shapes {shapes}")
    if table is not None:
        rows = sum(regions[1::3])
        if table.shape != (rows, 3) or table.dtype != torch.int64:
            raise ValueError(f"expected a table of shape ({rows}, 3), int64, got {tuple(table.shape)}, {table.dtype}")
        if slots is not None:
            raise ValueError("expected slots or a table, which names the slots in its last column; got both")
        slots = table[:, 2]
    return _importance_update(
        weight, path, mean, deviation, regions, beta1, beta2, eps, combine, absolute, slots, table
    )
