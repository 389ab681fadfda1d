"""One bank per adapter name, kept on the base model where PEFT keeps the adapters' configurations."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..bank import Bank, base_model
from ..config import IGUConfig
from ..context import PathContext
from .layer import IGULoraLayer
from .saved import SavedWrapper


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers of a model by their names in the base model."""
    return {name: module for name, module in base_model(model).named_modules() if isinstance(module, IGULoraLayer)}


class Banks(dict[str, Bank]):
    """Adapter name -> bank. An adapter whose values are not there yet (on the meta device), or lie on several devices and are not trained,
    has none: its layers compute all the same, each by itself."""

    # Found once, until adapters come or go: a model has hundreds of layers among thousands of modules.
    _layers: list[tuple[Any, nn.ModuleDict]] | None = None
    _settled: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """A copy finds its own layers."""
        return {}

    def forget_layers(self) -> None:
        """Find the adapted layers anew: some came or went."""
        self._layers, self._settled = None, frozenset()

    def layers(self, model: nn.Module) -> list[tuple[Any, nn.ModuleDict]]:
        """The adapted layers in model order, each with its adapters."""
        if self._layers is None:
            self._layers = [(layer, layer.igu_adapters) for layer in peft_layers(model).values()]
        return self._layers

    def make(self, model: nn.Module, adapter_name: str, config: IGUConfig, trained: bool) -> None:
        """The bank of an adapter, over its layers in model order, unless it has one of exactly these."""
        found = {
            n: layer.igu_adapters[adapter_name]
            for n, layer in peft_layers(model).items()
            if adapter_name in layer.igu_adapters
        }
        adapters = list(found.values())
        known = self.get(adapter_name)
        if (
            known is not None
            and len(known.layers) == len(adapters)
            and all(mine is theirs for mine, theirs in zip(known.layers, adapters, strict=True))
        ):
            known.refresh()
            self._settled |= {adapter_name}
            return
        self.pop(adapter_name, None)
        devices = {p.device for adapter in adapters for p in adapter.parameters()}
        if any(device.type == "meta" for device in devices) or (len(devices) > 1 and not trained):
            return
        bank = Bank(list(found), adapters, PathContext(needs_controller=config.adaptive))
        self[adapter_name] = bank
        self._settled |= {adapter_name}
        for module in model.modules():
            if isinstance(module, SavedWrapper):
                module.igu_contexts[adapter_name] = bank.context

    def follow_trainable(self) -> None:
        """Let every bank learn which of its parameters are trained by now."""
        for bank in self.values():
            bank.follow_trainable()

    def active_name(self, model: nn.Module) -> str:
        """The adapter that a controller steps: the active one, or of several active ones the one that is trained.

        Raises:
            ValueError: there is none, or there are several.
        """
        layers = self.layers(model)
        names = list(dict.fromkeys(n for layer, own in layers for n in layer.active_adapters if n in own))
        if len(names) > 1:
            names = [n for n in names if self._trained(model, n)]
        if len(names) != 1:
            raise ValueError(
                f"expected one active (or, of several, one trained) adapter, got {', '.join(names) or 'none'}; "
                "choose it with model.set_adapter(name), freeze others with model.set_requires_grad(name, False)"
            )
        return names[0]

    def named(self, model: nn.Module, name: str) -> Bank:
        """The bank of an adapter, made where it is missing or has become another's.

        Raises:
            ValueError: the adapter has no values yet, or has them on several devices.
        """
        if name not in self._settled or name not in self:
            config = model.peft_config[name].plain()  # type: ignore[index, union-attr]
            self.make(model, name, config, trained=self._trained(model, name))
        if name not in self:
            raise ValueError(
                f"expected an adapter with values on one device, got {name!r} on the meta device or on several; load its weights first"
            )
        return self[name]

    def active(self, model: nn.Module) -> Bank:
        """The bank of :meth:`active_name`.

        Raises:
            ValueError: there is no such adapter, or it has no values yet.
        """
        bank = self.named(model, self.active_name(model))
        bank.follow_trainable()
        return bank

    def config(self, model: nn.Module) -> IGUConfig:
        """The options of the adapter of :meth:`active_name`."""
        return model.peft_config[self.active_name(model)].plain()  # type: ignore[index, union-attr]

    def _trained(self, model: nn.Module, name: str) -> bool:
        return any(p.requires_grad for _, own in self.layers(model) if name in own for p in own[name].parameters())
