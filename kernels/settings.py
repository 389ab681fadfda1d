"""What the environment says to the kernels' tuning, read here and nowhere else (``IGULORA_BACKEND`` is read in ``backend.py``).

``IGULORA_TUNE=1`` measures the forms of a product the first time that its shape is seen. Measured choices are kept in
``IGULORA_CACHE_DIR``, else in ``$XDG_CACHE_HOME/igulora``, else in ``~/.cache/igulora``.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path


@cache
def search_asked() -> bool:
    """Whether shapes without a measured choice are to be measured.

    Raises:
        ValueError: IGULORA_TUNE is neither 0 nor 1.
    """
    value = os.environ.get("IGULORA_TUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"expected IGULORA_TUNE to be 0, 1 or unset, got {value!r}")
    return value == "1"


def cache_folder() -> Path:
    """The folder of measured choices; it need not exist."""
    own = os.environ.get("IGULORA_CACHE_DIR")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # relative ones are to be ignored, says the XDG specification
        return Path(shared) / "igulora"
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        return Path(home) / ".cache" / "igulora"
    return Path(tempfile.gettempdir()) / "igulora"  # a container's user without a home
