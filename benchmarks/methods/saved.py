"""Adapters that somebody trained, read from their folder: igulora's and PEFT's, stepped as their own options say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import igulora
from igulora.adapter_file import CONFIG_FILE
from igulora.files import read_json
from igulora.folders import place

from ..cases import Case
from .method import Batch, Method
from .ours import Igulora

PEFT_FILE = "adapter_config.json"
RUN_FILE = "run.json"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return place(folder, CONFIG_FILE).is_file() or (folder / PEFT_FILE).is_file()


def base_of(folder: Path) -> str | None:
    """The base model that an adapter's folder names, or None."""
    if (folder / PEFT_FILE).is_file():
        return read_json(folder / PEFT_FILE).get("base_model_name_or_path") or None
    return read_json(folder / RUN_FILE).get("model") if (folder / RUN_FILE).is_file() else None


def open_adapter(folder: Path, model: nn.Module, case: Case) -> Method:
    """The adapter of a folder on its base model.

    Raises:
        ValueError, FileNotFoundError: the folder holds none, or one of another model.
    """
    if place(folder, CONFIG_FILE).is_file():
        return SavedIgulora(folder, model, case)
    if (folder / PEFT_FILE).is_file():
        return SavedPeft(folder, model, case)
    raise ValueError(f"expected {CONFIG_FILE} or {PEFT_FILE} in an adapter's folder, found neither in {folder}")


class SavedIgulora(Igulora):
    """An adapter of ours with the method, ranks and estimator it was trained with, from its first step on."""

    name = "saved"

    def __init__(self, folder: Path, model: nn.Module, case: Case) -> None:
        Method.__init__(self, igulora.load_adapter(model, folder), case)
        self.config = self.model.igulora_config
        self.title = f"{folder.name} ({self.config.method})"
        self._optimize(igulora.param_groups(self.model, lr=1e-4))
        self.controller = igulora.Controller(self.model)
        self._sampled = []

    def prepare(self, small: Batch) -> None:
        if self.config.scored:
            super().prepare(small)

    def kinds(self) -> dict[str, float]:
        return super().kinds() if self.config.scored else {"step": 1.0}

    def seek(self, kind: str, small: Batch) -> None:
        if self.config.scored:
            super().seek(kind, small)


class SavedPeft(Method):
    """A LoRA or AdaLoRA adapter of PEFT's, trained on; AdaLoRA in the middle of its pruning phase.

    Of AdaLoRA's steps every ``deltaT``-th allocates, so that there are two kinds where ``deltaT`` is more than 1. PEFT loads live
    triplets only, but plans with those that there were: here it goes on pruning from what it loaded, to half of that at least.
    """

    name = "saved"

    def __init__(self, folder: Path, model: nn.Module, case: Case) -> None:
        import peft

        super().__init__(peft.PeftModel.from_pretrained(model, folder, is_trainable=True), case)
        config = self.model.peft_config["default"]
        self.title = f"{folder.name} (PEFT {config.peft_type.value})"
        self.adaptive = config.peft_type == peft.PeftType.ADALORA
        self._steps: dict[str, list[int]] = {"step": [0]}
        if self.adaptive:
            allocator = self.model.base_model.rankallocator
            self._steps = _steps_by_kind(config, allocator)
            loaded = sum(p.numel() for name, p in self.model.named_parameters() if ".lora_E." in name)
            allocator.init_bgt, allocator.target_bgt = loaded, min(allocator.target_bgt, loaded // 2)
        self._optimize([p for p in self.model.parameters() if p.requires_grad])
        self.global_step = 0

    def book(self) -> None:
        if self.adaptive:
            self.model.base_model.update_and_allocate(self.global_step)

    def prepare(self, small: Batch) -> None:
        self.seek(self.dearest(), small)
        super().prepare(small)

    def kinds(self) -> dict[str, float]:
        count = sum(map(len, self._steps.values()))
        return {kind: len(steps) / count for kind, steps in self._steps.items()}

    def seek(self, kind: str, small: Batch) -> None:
        """Sets the number of the step, which nothing but the schedule reads."""
        super().seek(kind, small)
        steps = self._steps[kind]
        self.global_step = steps[len(steps) // 2]


def _steps_by_kind(config: Any, allocator: Any) -> dict[str, list[int]]:
    """The numbers of the steps of the pruning phase that allocate (``mask``), and of those that only score (``plain``)."""
    kinds: dict[str, list[int]] = {}
    for step in range(config.tinit + 1, config.total_step - config.tfinal) or [config.tinit]:
        _, allocates = allocator.budget_schedule(step)
        kinds.setdefault("mask" if allocates else "plain", []).append(step)
    return kinds
