"""Where the parts of a step begin and end: layers by their structure, bookkeeping by the methods that do it."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._profiler import _RecordFunctionFast
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .. import kernels
from ..bank import Bank
from ..context import PathContext
from ..controller import Controller
from ..kernels import backend
from ..path_pass import PathPasses
from .parts import ADAPTER, ALLOCATION, BASE, OPTIMIZER, ORTHOGONALITY, PATH, REST, SCORES

if TYPE_CHECKING:
    from .parts import PartTracker

# Of igulora: a method of a class, and the part that it is. What it calls may be another's: the loss inside of a path pass is not.
_OWN: tuple[tuple[type, str, str], ...] = (
    (Bank, "bind_grads", OPTIMIZER),  # zeroes the flat gradient
    (Controller, "regularise", ORTHOGONALITY),
    (Controller, "step", ALLOCATION),
    (Controller, "_update_scores", SCORES),
    (PathPasses, "sample_training_gradient", SCORES),
    (PathPasses, "_open_accumulator", PATH),
    (PathPasses, "_fold", PATH),
    (PathPasses, "_mixed", PATH),
    (PathPasses, "_separate", PATH),
    (PathPasses, "_on_path", PATH),
    (PathPasses, "train", REST),
)
# Of PEFT's AdaLoRA: the allocator's methods, beside ``update_and_allocate`` of the model that holds it.
_ALLOCATOR = {"update_ipt": SCORES, "mask_to_budget": ALLOCATION, "mask_using_rank_pattern": ALLOCATION}

# igulora's operators that eager calls run without PyTorch's dispatcher.
_LAYER_OPERATORS = ("svd_linear", "svd_project", "svd_update")

_ABSENT = object()


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer with a low-rank adapter: igulora's, a LoRA or AdaLoRA layer of PEFT's, or one built so.

    That is: parameters or modules named ``lora_...`` beside a ``base_layer``, or beside a frozen weight of its own.
    """
    children = itertools.chain(module.named_parameters(recurse=False), module.named_children())
    if not any(name.startswith("lora_") for name, _ in children):
        return False
    return isinstance(getattr(module, "base_layer", None), nn.Module) or _is_frozen(module)


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """All of them, in the model's order."""
    return [module for module in model.modules() if is_adapted(module)]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapted layers named ``lora_...``."""
    return [p for layer in adapted_layers(model) for name, p in layer.named_parameters() if name.startswith("lora_")]


def _is_frozen(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.requires_grad


def _is_base(module: nn.Module) -> bool:
    """A frozen linear layer, quantised ones and GPT-2's transposed one included."""
    return (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and _is_frozen(module)


def check_eager(model: nn.Module) -> None:
    """Raise ValueError where parts of the model are compiled: graphs do not say which layer an operator came from."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"expected an eager model to tell the parts of its step apart, got a compiled one ({name or 'the whole model'}); "
                "profile it before torch.compile"
            )


def install(tracker: PartTracker, stack: ExitStack) -> None:
    """Hook the tracker's model, igulora's classes and all optimizers; ``stack`` undoes it.

    Raises:
        ValueError: the model is compiled.
    """
    check_eager(tracker.model)
    for module in tracker.model.modules():
        if is_adapted(module):
            _hook(tracker, stack, module, ADAPTER)
            base = getattr(module, "base_layer", None)
            if isinstance(base, nn.Module):
                _hook(tracker, stack, base, BASE)
        elif _is_base(module):
            _hook(tracker, stack, module, BASE)
        elif "rankallocator" in vars(module):  # not getattr: wrappers answer for what they wrap
            _hook_adalora(tracker, stack, module)
    for owner, name, part in _OWN:
        _wrap(tracker, stack, owner, name, part)
    _replace(stack, F, "linear", lambda linear: _frozen_linear(tracker, linear))
    _replace(stack, PathContext, "at", lambda at: _rows_of(tracker, at))
    _hook_optimizers(tracker, stack)
    if tracker.mark and all(p.device.type == "cpu" for p in tracker.model.parameters()):
        for name in _LAYER_OPERATORS:
            operators = importlib.import_module(f"{kernels.__name__}.{name}")
            _replace(stack, operators, "past_dispatcher", lambda _: _past_dispatcher)


def _hook(tracker: PartTracker, stack: ExitStack, module: nn.Module, part: str) -> None:
    """The whole call of a module is one part."""

    def begin(called: nn.Module, _args: Any) -> None:
        tracker.open(part, called)

    def end(called: nn.Module, _args: Any, _output: Any) -> None:
        tracker.close(called)

    stack.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
    # Also when the call raises: a checkpointed forward is stopped so when it has recomputed enough.
    stack.callback(module.register_forward_hook(end, always_call=True).remove)


def _hook_adalora(tracker: PartTracker, stack: ExitStack, module: nn.Module) -> None:
    """PEFT's AdaLoRA: its forward is the model's forward and the regulariser; ``update_and_allocate`` scores and allocates."""
    _hook(tracker, stack, module, ORTHOGONALITY)
    _wrap(tracker, stack, module.model, "forward", REST)
    _wrap(tracker, stack, module, "update_and_allocate", ALLOCATION)
    for name, part in _ALLOCATOR.items():
        if hasattr(module.rankallocator, name):
            _wrap(tracker, stack, module.rankallocator, name, part)


def _hook_optimizers(tracker: PartTracker, stack: ExitStack) -> None:
    def begin(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        tracker.open(OPTIMIZER, optimizer)

    def end(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        tracker.close(optimizer)

    stack.callback(register_optimizer_step_pre_hook(begin).remove)
    stack.callback(register_optimizer_step_post_hook(end).remove)
    _wrap(tracker, stack, torch.optim.Optimizer, "zero_grad", OPTIMIZER)
    other = tracker.optimizer
    if other is not None and not isinstance(other, torch.optim.Optimizer):
        for name in ("step", "zero_grad"):
            if hasattr(other, name):
                _wrap(tracker, stack, other, name, OPTIMIZER)


def _frozen_linear(tracker: PartTracker, linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``F.linear``: an adapted layer that holds its frozen weight itself multiplies by it so."""

    @functools.wraps(linear)
    def wrapped(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if tracker.current() != ADAPTER or weight.requires_grad or not isinstance(weight, nn.Parameter):
            return linear(x, weight, bias)
        with tracker.scope(BASE):
            return linear(x, weight, bias)

    return wrapped


def _rows_of(tracker: PartTracker, at: Callable[..., AbstractContextManager[None]]) -> Callable[..., Any]:
    """``PathContext.at``: the passes inside are a path pass by as much as they have rows that train nothing."""

    @contextmanager
    def wrapped(
        context: PathContext, alpha: Tensor, train_groups: int | None = None, *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        groups = alpha.numel()
        share = 0.0 if train_groups is None or not groups else max(groups - train_groups, 0) / groups
        with at(context, alpha, train_groups, *args, **kwargs), tracker.scope(REST, share):
            yield

    return wrapped


def _past_dispatcher(like: Tensor, operator: Any, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """``backend.past_dispatcher`` under the profiler: a range of the operator's name and shapes instead of the operator.

    Through the dispatcher, where they go for the profiler's sake alone, the calls would take several times as long as they do.
    """
    if not backend.eager(like):
        return operator

    def ranged(*args: Any) -> Any:
        with _RecordFunctionFast(operator._qualname, args, {}):
            return implementation(*args)

    return ranged


def _wrap(tracker: PartTracker, stack: ExitStack, owner: Any, name: str, part: str) -> None:
    """Every call of a method is one part; of a class, that of all its instances."""

    def make(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with tracker.scope(part):
                return method(*args, **kwargs)

        return wrapped

    _replace(stack, owner, name, make)


def _replace(stack: ExitStack, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    own = vars(owner).get(name, _ABSENT)
    setattr(owner, name, make(getattr(owner, name)))
    if own is _ABSENT:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, own)
