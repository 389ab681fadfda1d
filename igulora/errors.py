"""What a message needs beyond its own words: the nearest name to a misspelt one, what another error said; the package's warnings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MergeWarning(UserWarning):
    """Merged weights are stored with less precision than the update asks for."""


def nearest(name: object, options: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` (with a leading space) when an option is close to ``name`` or begins with it, else an empty string."""
    options = list(options)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    close = close or [option for option in options if name and option.startswith(str(name))][:1]
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(field: str, value: object, options: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``options``; the message lists them and the nearest name."""
    options = tuple(options)
    if value not in options:
        raise ValueError(f"expected {field} to be one of {', '.join(options)}; got {value!r}.{nearest(value, options)}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
