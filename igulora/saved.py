"""SavedModule: a module trained whole beside the adapters (a classification head)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .context import PathContext


class TrainedWhole:
    """A place of the model where a module is trained whole beside the adapters, by training rows only."""

    @property
    def trained(self) -> Any:
        """The copy that is trained and saved, or None."""
        raise NotImplementedError

    def copies(self) -> list[nn.Module]:
        """All copies there are, one per adapter."""
        return [] if self.trained is None else [self.trained]


def call_by_rows(module: nn.Module, context: PathContext, args: Any, kwargs: Any) -> Any:
    """The module's own forward; with path rows under way, training and path rows go through it apart.

    Path rows must not train it: they run through the same weights detached. Inputs and outputs are tensors with the batch first.

    Raises:
        TypeError: a mixed batch goes through a module that returns no tensor.
    """
    if context.train_groups is None or context.alpha is None:
        return module(*args, **kwargs)
    n, split = context.alpha.numel(), context.train_groups
    if split == n:
        return module(*args, **kwargs)
    rest = _detached_call(module, _rows(args, n, split, None), _rows(kwargs, n, split, None))
    if split == 0:
        return rest
    first = module(*_rows(args, n, 0, split), **_rows(kwargs, n, 0, split))
    if not isinstance(first, Tensor):
        raise TypeError(
            f"expected a module to save that returns a tensor, got {type(first).__name__} from "
            f'{type(module).__name__}; use path_pass="separate"'
        )
    return torch.cat((first, rest))


def _detached_call(module: nn.Module, args: Any, kwargs: Any) -> Any:
    frozen = {k: v.detach() for k, v in module.named_parameters()}
    return torch.func.functional_call(module, frozen, args, kwargs)


def _rows(values: Any, n: int, start: int, stop: int | None) -> Any:
    def cut(v: Any) -> Any:
        if not isinstance(v, Tensor) or v.ndim == 0 or n == 1 or v.shape[0] % n:
            return v
        per = v.shape[0] // n
        return v[start * per : None if stop is None else stop * per]

    if isinstance(values, dict):
        return {k: cut(v) for k, v in values.items()}
    return tuple(cut(v) for v in values)


class SavedModule(nn.Module, TrainedWhole):
    """A module of ``modules_to_save``: a trained copy beside the original. In a mixed batch only training rows reach its gradients."""

    def __init__(self, module: nn.Module, context: PathContext) -> None:
        super().__init__()
        self.original = module.requires_grad_(False)
        self.module = copy.deepcopy(module).requires_grad_(True)
        self.context = context

    @property
    def trained(self) -> nn.Module:
        """The trained copy."""
        return self.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward; path rows run with its weights detached (:func:`call_by_rows`)."""
        if not self.context.enabled:
            return self.original(*args, **kwargs)
        return call_by_rows(self.module, self.context, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)
