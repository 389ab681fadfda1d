"""The methods that are compared, each a plug-in with a file of its own. All of them train with fused AdamW."""

from __future__ import annotations

from .method import Adapted, Batch, Floor, Method
from .ours import AsAdaLora, Igulora, Instantaneous, OnPath
from .peft_methods import PeftAdaLora, PeftLora
from .release import Release, ReleaseFinal

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Floor, Instantaneous, Igulora, OnPath, AsAdaLora, PeftLora, PeftAdaLora, Release, ReleaseFinal)
}
DEFAULT_METHODS = ("floor", "instantaneous", "default", "on-path", "peft-lora", "peft-adalora", "release")

__all__ = [
    "DEFAULT_METHODS",
    "METHODS",
    "Adapted",
    "AsAdaLora",
    "Batch",
    "Floor",
    "Igulora",
    "Instantaneous",
    "Method",
    "OnPath",
    "PeftAdaLora",
    "PeftLora",
    "Release",
    "ReleaseFinal",
]
