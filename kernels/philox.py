"""Counter-based dropout: Philox-4x32-10 from a device seed, so that a mask is recomputed and never stored.

Contract. Column k of row m is kept when 32-bit word ``k % 4`` of ``philox(seed, counter = m * ceil(K/4) + k // 4)`` is at least
``floor(p * 2**32)``. The words equal those of ``triton.language.randint4x(seed, counter)``: a kernel draws the same mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
# Counters per chunk on CPU: the ten int64 temporaries of a round then stay inside the second-level cache.
_CHUNK = 1 << 14


def _philox_words(seed: Tensor, counter: Tensor) -> Tensor:
    """Four 32-bit words per counter, as int64. ``seed`` int64 (), ``counter`` int64 (n,); returns int64 (n, 4)."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # The product of two 32-bit words wraps in int64 to the right 64 bits; masks undo the sign extension of the shift.
        prod_a, prod_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = ((prod_b >> 32) & _LOW) ^ c1 ^ k0, ((prod_a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = prod_b & _LOW, prod_a & _LOW
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def dropout_keep_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """Which entries of a (rows, cols) matrix dropout keeps: bool (rows, cols), on the device of ``seed``.

    Args:
        seed: int64 tensor of one element; stays on its device, no synchronisation.
        p: probability of dropping an entry, in [0, 1).
    """
    seed = seed.reshape(())
    threshold = int(p * 2**32)
    groups = (cols + 3) // 4
    total = rows * groups
    step = _CHUNK if seed.device.type == "cpu" else max(total, 1)
    chunks = []
    for start in range(0, total, step):
        counter = torch.arange(start, min(start + step, total), dtype=torch.int64, device=seed.device)
        chunks.append(_philox_words(seed, counter) >= threshold)
    if not chunks:
        return torch.empty((rows, cols), dtype=torch.bool, device=seed.device)
    return torch.cat(chunks).view(rows, groups * 4)[:, :cols]
