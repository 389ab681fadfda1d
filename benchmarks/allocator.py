"""The C library's allocator keeps what is freed, so that steps on the CPU do not wait for the system's memory.

As it is, glibc returns large blocks to the system when they are freed: a training step gets its activations back as pages that have to be
cleared, a hundred thousand page faults each time, at a price that changes from process to process with the machine's other work. Timing
that would time neither method. The same for all methods; a user gets it by starting Python with ``MALLOC_TRIM_THRESHOLD_`` and
``MALLOC_MMAP_THRESHOLD_`` set high, or with another allocator.

Where sizes change from step to step, as a language model's logits do with the padding, a heap that holds all blocks can fall to pieces and
grow without end. A run that is not timed keeps only the blocks of up to :data:`SMALL`; PyTorch makes large ones cheap to get anew with
huge pages, if ``THP_MEM_ALLOC_ENABLE=1`` is set when Python starts.
"""

from __future__ import annotations

import ctypes
import os

SMALL = 32 << 20  # bytes; the most that glibc takes as a threshold
KEEPS, KEEPS_SMALL, AS_IT_IS = (
    "glibc, keeps what is freed",
    f"glibc, keeps blocks of up to {SMALL >> 20} MiB",
    "as it is",
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h

_state = AS_IT_IS


def keep_freed_memory(large: bool = True) -> None:
    """Make it so for the rest of this process, where the C library is glibc.

    Args:
        large: False lets blocks above :data:`SMALL` go back to the system.
    """
    global _state
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # The heap's end stays, and a block of its own is for no request, or for large ones.
    own = mallopt(_M_MMAP_MAX, 0) if large else mallopt(_M_MMAP_THRESHOLD, SMALL)
    if own and mallopt(_M_TRIM_THRESHOLD, -1):
        _state = KEEPS if large else KEEPS_SMALL


def state() -> str:
    """:data:`KEEPS`, :data:`KEEPS_SMALL` or :data:`AS_IT_IS`, and whether PyTorch asks for huge pages: for a record."""
    return f"{_state}, huge pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else _state
