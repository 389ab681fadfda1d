"""The adapted layers of a PEFT model: one base layer, and triplets per adapter name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..bases import Base, Conv2dBase, EmbeddingBase, describe, is_plain_product
from ..kinds import LinearAdapter, adapter_of
from ..recompute import Recompute

BASE = "__base__"  # PEFT's name for "no adapter" in a batch of several


class IGULoraLayer(nn.Module, BaseTunerLayer):
    """A layer of the base model and, by adapter name, the triplets that may be added to it.

    Args:
        base_layer: the layer to adapt; its tensors are used as they are, frozen by PEFT.

    Attributes:
        merge_error: as of :class:`igulora.layers.AdaptedLayer`.

    Raises:
        ValueError: no adapter exists for layers of this kind.
    """

    merge_error: float = 0.0
    _before: Any = None  # what was in the weight, while merged into a quantised one

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
                f"expected a linear layer, an embedding or a convolution, got {type(layer).__name__}; name such layers in target_modules "
                "or exclude it with exclude_modules"
            )
        return found

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
            r, options: of :class:`igulora.kinds.LayerAdapter`.
            scale: factor of the update.
            trained: whether the adapter is to be trained when it is active.
            nonzero: draw lambda from N(0, 1), and rows of P of about unit length where they start at zero.
            recompute_inputs: as in :class:`igulora.IGUConfig`.
        """
        adapter: Any = adapter_of(self.base, r, **options)
        adapter.scale = scale
        adapter.recompute = Recompute() if recompute_inputs else None
        adapter.train(self.base_layer.training)
        if nonzero and adapter.lora_E.device.type != "meta":
            with torch.no_grad():
                adapter.lora_E.copy_(torch.randn(r))
                if not adapter.lora_P.any():
                    adapter.lora_P.copy_(torch.randn(adapter.lora_P.shape) * adapter.p_length**-0.5)
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
        return self.base.laid_out(self.igu_adapters[adapter].delta_weight())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is a matrix added to the weight."""
        return True

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the adapters (the active ones by default) to the base weight.

        The sum is rounded once to the weight's dtype; a quantised weight is quantised anew from the original one and all that is merged by
        then, and the original is kept beside it until :meth:`unmerge`.

        Raises:
            ValueError: with ``safe_merge``, a sum is not finite (the base weight is what it was), or the weight cannot be written.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.igu_adapters]
        if not names:
            return
        base = self.base
        base.check_writable()
        now = base.snapshot()
        before = now if self._before is None else self._before
        again = [] if now is None else [name for name in self.merged_adapters if name in self.igu_adapters]
        updates = {name: self.igu_adapters[name].delta_weight() for name in (*again, *names)}
        total = sum(updates.values())
        assert isinstance(total, Tensor)
        if self._before is not None:
            base.restore(before)
        merged = base.plus(total)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            if self._before is not None:
                base.restore(now)
            broken = [name for name, update in updates.items() if not bool(torch.isfinite(update).all())] or names
            raise ValueError(
                "expected finite merged weights, got others: NaNs detected in the merged weights. The adapter "
                f"{', '.join(broken)} seems to be broken; nothing was merged into this layer"
            )
        self.merge_error, self._before = base.write(merged, total), before
        for name in names:
            self.igu_adapters[name].merged = True
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged updates out of the base weight again: bit by bit in quantised weights, else up to rounding of its dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.base
        adapters = [self.igu_adapters[name] for name in self.merged_adapters if name in self.igu_adapters]
        if self._before is not None:
            base.restore(self._before)
        elif adapters:
            base.assign(base.plus(-self.delta_weight()))
        for adapter in adapters:
            adapter.merged = False
        self.merged_adapters.clear()
        self.merge_error, self._before = 0.0, None

    def delta_weight(self) -> Tensor:
        """The sum of the merged updates (out, in)."""
        return sum(self.igu_adapters[name].delta_weight() for name in self.merged_adapters if name in self.igu_adapters)

    def active(self) -> list[Any]:
        """The active adapters that this layer has, in the order in which they are added."""
        return [self.igu_adapters[name] for name in self.active_adapters if name in self.igu_adapters]

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output and the active updates; with ``adapter_names`` each row of x goes through the adapter named for it."""
        if adapter_names is not None:
            return self._by_row(x, adapter_names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [] if self.disable_adapters or self.merged else [a for a in self.active() if a.context.enabled]
        if not adapters:
            return self._run(x, *args, **kwargs)
        first, *others = adapters
        if isinstance(first, LinearAdapter) and not args and not kwargs and is_plain_product(self.base_layer):
            y = first.call(self.base_layer, x, fused=True)
        else:
            y = first.add_to(self._run(x, *args, **kwargs), x)
        for adapter in others:
            y = adapter.add_to(y.clone(), x)  # what another operator returned is not written to
        return y

    def _run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's own forward, with a gradient for x."""
        if args or kwargs or self.base_layer is not self.get_base_layer():
            return self.base_layer(x, *args, **kwargs)
        return self.base.run(x)

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
        y = self._run(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in dict.fromkeys(names):
            if name == BASE or name not in self.igu_adapters:
                continue
            rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
            with _alone(self.igu_adapters[name]) as adapter:
                y = y.index_copy(0, rows, adapter.add_to(y.index_select(0, rows), x.index_select(0, rows)))
        return y

    def __repr__(self) -> str:
        return "igulora." + super().__repr__()


class IGULoraLinear(IGULoraLayer):
    """A linear layer with adapters, (..., in) -> (..., out); the first active one is computed with a plain base's product in one call."""


class IGULoraEmbedding(IGULoraLayer):
    """An embedding with adapters, ids (...) -> (..., dimension)."""


class IGULoraConv2d(IGULoraLayer):
    """A convolution with adapters, (images, in channels, height, width) -> (images, out channels, height, width)."""


_LAYERS: dict[type[Base], type[IGULoraLayer]] = {EmbeddingBase: IGULoraEmbedding, Conv2dBase: IGULoraConv2d}


def layer_of(module: nn.Module, name: str) -> IGULoraLayer:
    """The layer for adapters of ``module``, by its kind.

    Args:
        name: of the module in the model, for messages.

    Raises:
        ValueError: no adapter exists for its kind, or this one cannot be adapted (says why).
    """
    found = describe(module)
    if found is None:
        raise ValueError(
            "expected target_modules to match linear layers, embeddings and convolutions only, got "
            f"{name!r} ({type(module).__name__}); name such layers or exclude it with exclude_modules"
        )
    obstacle = found.obstacle()
    if obstacle is not None:
        raise ValueError(f"expected layers that can be adapted, got {name!r} ({found.kind}): {obstacle}")
    return _LAYERS.get(type(found), IGULoraLinear)(module)


@contextmanager
def _alone(adapter: Any) -> Iterator[Any]:
    """The adapter apart from those that read its input elsewhere: rows picked out of it are a tensor of their own in each layer."""
    shared, adapter.shared = adapter.shared, None
    try:
        yield adapter
    finally:
        adapter.shared = shared
