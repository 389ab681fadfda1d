"""The adapted layers of a PEFT model: one base layer, and triplets per adapter name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..adapter import SVDAdapter
from ..bases import Base, describe, is_plain_product
from ..bases.linear import Conv1DBase
from ..layers import LinearAdapter
from ..recompute import Recompute

BASE = "__base__"  # PEFT's name for "no adapter" in a batch of several


class IGULoraLayer(nn.Module, BaseTunerLayer):
    """A layer of the base model and, by adapter name, the triplets that may be added to it.

    Args:
        base_layer: the layer to adapt; its tensors are used as they are, frozen by PEFT.

    Raises:
        ValueError: no adapter exists for layers of this kind.
    """

    adapter_layer_names: tuple[str, ...] = ("igu_adapters",)
    other_param_names: tuple[str, ...] = ()
    igu_adapters: Any
    # Of PEFT's class.
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    active_adapters: Any
    _active_adapter: Any
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.igu_adapters = nn.ModuleDict()
        self.merged_adapters = []
        self._disable_adapters = False
        base = self.base
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def base(self) -> Base:
        """The innermost base layer as a matrix."""
        layer = self.get_base_layer()
        found = describe(layer)
        if found is None:
            raise ValueError(
                f"expected target_modules to match linear layers only, got {type(layer).__name__}; "
                "name linear layers or exclude it with exclude_modules"
            )
        return found

    def _new_adapter(self, r: int, **options: Any) -> SVDAdapter:
        raise NotImplementedError

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        scale: float,
        *,
        trained: bool,
        nonzero: bool = False,
        recompute_inputs: bool = False,
        **options: Any,
    ) -> None:
        """Add an adapter, or put a fresh one in the place of that name.

        Args:
            r, options: of :class:`igulora.adapter.SVDAdapter`.
            scale: factor of the update.
            trained: whether the adapter is to be trained when it is active.
            nonzero: draw lambda from N(0, 1).
            recompute_inputs: as in :class:`igulora.IGUConfig`.
        """
        adapter: Any = self._new_adapter(r, **options)
        adapter.scale = scale
        adapter.recompute = Recompute() if recompute_inputs else None
        adapter.train(self.base_layer.training)
        if nonzero and adapter.lora_E.device.type != "meta":
            with torch.no_grad():
                adapter.lora_E.copy_(torch.randn(r))
        self.igu_adapters[adapter_name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=not trained)

    # -- what PEFT asks of a layer ----------------------------------------------------------------------------------------

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """The lambdas that stay 1 (``init="lora"``); called after PEFT made whole adapters trainable."""
        for adapter in self.igu_adapters.values():
            if adapter.fixed_lambda:
                adapter.lora_E.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base's device, masters in their own dtype; not while they wait for their values on the meta device."""
        if adapter_name not in self.igu_adapters:
            return
        adapter = self.igu_adapters[adapter_name]
        if any(p.device.type == "meta" for p in adapter.parameters()):
            return
        adapter.to(self.base.device if device is None else device)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the base weight, laid out as that is, in the masters' dtype."""
        base, delta = self.base, self.igu_adapters[adapter].delta_weight()
        return delta.t() if isinstance(base, Conv1DBase) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is a matrix added to the weight."""
        return True

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the adapters (the active ones by default) to the base weight, each rounded once to its dtype.

        Raises:
            ValueError: with ``safe_merge``, a sum is not finite (the base weight is what it was), or the weight cannot be written.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.igu_adapters:
                continue
            adapter, base = self.igu_adapters[name], self.base
            merged = base.dense().to(adapter.lora_P.dtype) + adapter.delta_weight()
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(
                    f"expected finite merged weights, got others: NaNs detected in the merged weights. The adapter {name} seems to be "
                    "broken; nothing was merged into this layer"
                )
            base.assign(merged)
            adapter.merged = True
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged updates out of the base weight again (exact up to rounding of its dtype)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.igu_adapters:
                adapter, base = self.igu_adapters[name], self.base
                base.assign(base.dense().to(adapter.lora_P.dtype) - adapter.delta_weight())
                adapter.merged = False

    def active(self) -> list[Any]:
        """The active adapters that this layer has, in the order in which they are added."""
        return [self.igu_adapters[name] for name in self.active_adapters if name in self.igu_adapters]

    def __repr__(self) -> str:
        return "igulora." + super().__repr__()


class IGULoraLinear(IGULoraLayer):
    """A linear layer with adapters; the first active one is computed with the base's product in one operator call."""

    def _new_adapter(self, r: int, **options: Any) -> SVDAdapter:
        base = self.base
        return LinearAdapter(
            base.in_features, base.out_features, r, device=base.device, dtype=base.master_dtype, **options
        )

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out); with ``adapter_names`` each row of x goes through the adapter named for it."""
        if adapter_names is not None:
            return self._by_row(x, adapter_names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [] if self.disable_adapters or self.merged else self.active()
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        first, *others = adapters
        if not args and not kwargs:
            y = first.call(self.base_layer, x, fused=is_plain_product(self.base_layer))
        else:
            y = self.base_layer(x, *args, **kwargs)
            others = adapters
        for adapter in others:
            if adapter.context.enabled:
                y = adapter.add_to(y.clone(), x)  # what another operator returned is not written to
        return y

    def _by_row(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim == 2 and len(x) % len(names) == 0:  # some models hand (batch * length, in) to their layers
            names = [name for name in names for _ in range(len(x) // len(names))]
        if len(names) != len(x):
            raise ValueError(
                f"expected one of adapter_names per row, got {len(names)} names for {len(x)} rows; repeat or cut the list"
            )
        if self.merged:
            raise ValueError(
                "expected an unmerged model for a batch of several adapters, got a merged one; call unmerge_adapter() first"
            )
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in dict.fromkeys(names):
            if name == BASE or name not in self.igu_adapters:
                continue
            rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
            with _alone(self.igu_adapters[name]) as adapter:
                y = y.index_copy(0, rows, adapter.add_to(y.index_select(0, rows), x.index_select(0, rows)))
        return y


@contextmanager
def _alone(adapter: Any) -> Iterator[Any]:
    """The adapter apart from those that read its input elsewhere: rows picked out of it are a tensor of their own in each layer."""
    shared, adapter.shared = adapter.shared, None
    try:
        yield adapter
    finally:
        adapter.shared = shared
