"""The methods that are compared, each a plug-in with a file of its own. All of them train with fused AdamW."""

from __future__ import annotations

from .layer_libraries import LoraFusion, PeftLiger, PeftUnsloth
from .method import Adapted, Batch, Floor, FloorTwice, Method, Sampled
from .ours import AsAdaLora, FlexLora, IguFlex, Igulora, Instantaneous, Lean, OnPath, Ralora
from .peft_methods import PeftAdaLora, PeftDora, PeftLora, PeftLoraNarrow, quiet_peft
from .release import Release, ReleaseFinal

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        Floor,
        Instantaneous,
        Igulora,
        Lean,
        OnPath,
        AsAdaLora,
        FlexLora,
        IguFlex,
        Ralora,
        PeftLora,
        PeftLoraNarrow,
        PeftDora,
        PeftAdaLora,
        Release,
        ReleaseFinal,
        PeftLiger,
        PeftUnsloth,
        LoraFusion,
        FloorTwice,
    )
}
DEFAULT_METHODS = (
    "floor",
    "instantaneous",
    "default",
    "lean",
    "peft-lora",
    "peft-lora-16bit",
    "peft-dora",
    "peft-adalora",
    "release",
)

__all__ = [
    "DEFAULT_METHODS",
    "METHODS",
    "Adapted",
    "AsAdaLora",
    "Batch",
    "FlexLora",
    "Floor",
    "FloorTwice",
    "IguFlex",
    "Igulora",
    "Instantaneous",
    "Lean",
    "LoraFusion",
    "Method",
    "OnPath",
    "PeftAdaLora",
    "PeftDora",
    "PeftLiger",
    "PeftLora",
    "PeftLoraNarrow",
    "PeftUnsloth",
    "Ralora",
    "Release",
    "ReleaseFinal",
    "Sampled",
    "quiet_peft",
]
