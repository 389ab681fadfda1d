"""The C library's allocator keeps what is freed, so that steps on the CPU do not wait for the system's memory.

As it is, glibc returns large blocks to the system when they are freed: a training step gets its activations back as pages that have to be
cleared, a hundred thousand page faults each time, at a price that changes from process to process with the machine's other work. Timing
that would time neither method. The same for all methods; a user gets it by starting Python with ``MALLOC_TRIM_THRESHOLD_`` and
``MALLOC_MMAP_THRESHOLD_`` set high, or with another allocator.
"""

from __future__ import annotations

import ctypes

KEEPS, AS_IT_IS = "glibc, keeps what is freed", "as it is"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h

_state = AS_IT_IS


def keep_freed_memory() -> None:
    """Make it so for the rest of this process, where the C library is glibc."""
    global _state
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # No block of its own for a large request, and the heap's end stays.
    if mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1):
        _state = KEEPS


def state() -> str:
    """:data:`KEEPS` or :data:`AS_IT_IS`: for a record."""
    return _state
