"""Nested Python values as JSON and tensors, and back without a difference: tuples, NaN, keys that are numbers, tensors.

What JSON has no word for becomes an object with one key: ``{"$tuple": [...]}``, ``{"$float": "nan"}``, ``{"$dict": [[key, value], ...]}``,
``{"$tensor": name}``. Unlike pickle this names data only: reading it runs nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def pack(value: Any, where: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """``value`` in JSON's terms.

    Args:
        value: None, bool, int, float, str, tensors, and lists, tuples and dicts of them.
        where: what it is, for messages and for the names of its tensors.
        tensors: takes the tensors in it; None allows none.

    Raises:
        TypeError: there is something else in it; says where.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: pack(item, f"{where}.{key}", tensors) for key, item in value.items()}
        return {"$dict": [[pack(k, where), pack(item, f"{where}.{k}", tensors)] for k, item in value.items()]}
    if isinstance(value, Tensor) and tensors is not None:
        name = where
        while name in tensors:  # the keys 1 and "1" of one dict
            name += "'"
        tensors[name] = value
        return {"$tensor": name}
    kinds = "None, numbers, strings, lists, tuples and dicts" + (", tensors" if tensors is not None else "")
    raise TypeError(
        f"expected {where} to hold {kinds}, got {type(value).__name__}: it cannot be saved exactly; save it yourself"
    )


def unpack(value: Any, where: str, tensors: dict[str, Any]) -> Any:
    """The value that :func:`pack` was given; what it takes from ``tensors`` is removed there.

    Raises:
        ValueError: ``value`` is not of :func:`pack`'s making, or a tensor is missing.
    """
    if isinstance(value, list):
        return [unpack(item, where, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: unpack(item, where, tensors) for key, item in value.items()}
    (kind, inner), *more = value.items()
    if not more:
        if kind == "$tuple" and isinstance(inner, list):
            return tuple(unpack(item, where, tensors) for item in inner)
        if kind == "$float" and isinstance(inner, str) and inner in _FLOATS:
            return _FLOATS[inner]
        if kind == "$tensor" and isinstance(inner, str) and inner in tensors:
            return tensors.pop(inner)
        if kind == "$dict" and isinstance(inner, list) and all(isinstance(p, list) and len(p) == 2 for p in inner):
            try:
                return {unpack(k, where, tensors): unpack(item, where, tensors) for k, item in inner}
            except TypeError as error:  # a key that cannot be one
                raise ValueError(f"expected keys in {where}, got {error}; the file is damaged") from error
    raise ValueError(f"expected saved values in {where}, got {value!r:.200}; the file is damaged")
