"""Modules trained whole beside the adapters (``modules_to_save``), as PEFT wraps them, with path rows that do not train them."""

from __future__ import annotations

from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..context import PathContext
from ..saved import TrainedWhole, call_by_rows


class SavedWrapper(ModulesToSaveWrapper, TrainedWhole):
    """PEFT's wrapper; in a path pass the active copy runs path rows with its weights detached (:func:`igulora.saved.call_by_rows`)."""

    igu_contexts: dict[str, PathContext]

    @classmethod
    def adopt(cls, model: nn.Module) -> None:
        """Turn the wrappers that PEFT has put into a model into these: it makes them itself and takes no class of ours."""
        for module in model.modules():
            if type(module) is ModulesToSaveWrapper:
                module.__class__ = cls
                module.__dict__["igu_contexts"] = {}

    def _get_name(self) -> str:
        """PEFT's messages print what they know."""
        return ModulesToSaveWrapper.__name__

    @property
    def trained(self) -> Any:
        """The active adapter's copy, or None."""
        names = self.active_adapters
        return self.modules_to_save[names[0]] if names and names[0] in self.modules_to_save else None

    def copies(self) -> list[nn.Module]:
        """All adapters' copies."""
        return list(self.modules_to_save.values())

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        names = self.active_adapters
        context = self.igu_contexts.get(names[0]) if names else None
        if context is None:
            return super()._forward_wrapped(*args, **kwargs)
        return call_by_rows(self.modules_to_save[names[0]], context, args, kwargs)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """PEFT's, and the adapter's context with it."""
        super().delete_adapter(adapter_name, new_active_adapters)
        self.igu_contexts.pop(adapter_name, None)
