"""What ``save_pretrained`` says of a model with adapters in it: that ``from_pretrained`` will not know the names it writes."""

from __future__ import annotations

import warnings
from types import MethodType
from typing import Any

from torch import nn


def save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's own ``save_pretrained``, after a warning. (Pickles look for it on the model by this name.)"""
    warnings.warn(
        "save_pretrained of an adapted model writes layers and adapters under names that from_pretrained does not know: it would start "
        "those layers anew. Use igulora.save_adapter(model, folder) and igulora.load_adapter(base_model, folder), or igulora.merge(model) "
        "and igulora.remove(model) before save_pretrained",
        stacklevel=2,
    )
    return type(model).save_pretrained(model, *args, **kwargs)  # type: ignore[attr-defined]


def warn_when_saved(model: nn.Module) -> None:
    """Have ``model.save_pretrained``, where there is one, say so from now on."""
    if callable(getattr(type(model), "save_pretrained", None)):
        model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]


def save_as_before(model: nn.Module) -> bool:
    """Undo :func:`warn_when_saved`; returns whether there was anything to undo."""
    return vars(model).pop("save_pretrained", None) is not None
