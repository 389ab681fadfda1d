"""Many processes: what they average, and FSDP2 with the base sharded and the adapters replicated.

With DistributedDataParallel nothing here has to be called: it averages the gradients, the controller the path samples. FSDP2 leaves
replicated parameters alone, so :func:`shard` (or :func:`replicate`, after your own ``fully_shard``) has their gradients averaged: one
all-reduce of the flat gradient after each backward pass.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .bank import find_bank
from .unwrap import keeper, unwrap

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Processes:
    """The data-parallel processes of a run: all that are initialised, or those of ``group``; one where there is no process group."""

    group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """Number of this one.

        Raises:
            ValueError: this process is not in the group.
        """
        rank = dist.get_rank(self.group) if dist.is_available() and dist.is_initialized() else 0
        if rank < 0:
            raise ValueError(
                "expected a process group that this process is in, got another; pass the group of its data-parallel replicas"
            )
        return rank

    @property
    def members(self) -> list[int]:
        """Their numbers among all processes."""
        return dist.get_process_group_ranks(self.group) if dist.is_available() and dist.is_initialized() else [0]

    def __deepcopy__(self, _memo: dict[int, Any]) -> Processes:
        return self  # a process group cannot be copied

    def mean_(self, flat: Tensor) -> Tensor:
        """The mean over the processes, in place: one all-reduce, none where there is one process."""
        if self.count > 1:
            dist.all_reduce(flat, group=self.group)
            flat /= self.count
        return flat

    def share(self, terms: Tensor) -> Tensor:
        """() ``terms`` of this process over their mean over the processes: 1 where all have as many."""
        return terms / self.mean_(terms.clone()).clamp_(min=torch.finfo(terms.dtype).tiny)

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first_only(self, write: Callable[[], object], what: str = "write its files") -> None:
        """Run ``write`` in the first process while the others wait; where it fails, all raise.

        Raises:
            Exception: what ``write`` raised; in the other processes a ValueError that quotes it and says ``what`` it was to do.
        """
        error: Exception | None = None
        if self.rank == 0:
            try:
                write()
            except Exception as caught:  # the others must hear of it before it goes on
                error = caught
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if told[0] is not None:
            raise ValueError(f"expected the first process to {what}, got {told[0]}")


class _Averaging:
    """Averages the gradients of replicated parameters over the processes at the end of each backward pass of a model.

    The end is asked for by the gradient of the model's output, which every process has whatever its rows need; and by gradients of trained
    parameters, which also come where a part of the model was called or the output could not be looked into. There every process has to
    reach a trained parameter in each backward pass: one that reaches none leaves the others waiting. A model of one process has nothing to
    average: only its process group is kept then.
    """

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        self.processes = processes
        self.alone = processes.count == 1
        self.enabled = True
        self.pending = False  # a backward pass whose gradients were not averaged since
        self.averaged = False  # any, since the last step
        self._queued: Callable[[], Any] = _nothing
        self._hooks: list[RemovableHandle] = []
        if self.alone:
            return
        self._model = model
        # PEFT's model calls the forward of the one inside without its hooks.
        for module in model.modules():
            self._hooks.append(module.register_forward_hook(self._watch))
            if module is keeper(model):
                break
        self._hooks += [p.register_post_accumulate_grad_hook(self._due) for p in find_bank(model).others(model)]
        self.follow()

    def follow(self) -> None:
        """Watch the adapter that is trained now."""
        if not self.alone:
            self._bank = find_bank(self._model)
            self._bank.on_gradient(self._due)

    def stop(self) -> None:
        """From now on gradients stay as they are."""
        for hook in self._hooks:
            hook.remove()
        if not self.alone:
            banks = vars(keeper(self._model))
            for bank in [banks["igulora_bank"]] if "igulora_bank" in banks else banks["igulora_banks"].values():
                bank.on_gradient(None)

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Averaging:
        if not self.alone:
            self.__getstate__()
        copied = _Averaging.__new__(_Averaging)
        vars(copied).update(vars(self))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        if self.alone and self.processes.group is None:
            return {**vars(self), "_queued": _nothing}
        raise TypeError(
            "expected a model of one process to copy or pickle, got one sharded over several; save its adapter instead"
        )

    def _watch(self, _model: nn.Module, _args: Any, output: Any) -> None:
        if (
            not torch.is_grad_enabled() or self._bank.context.train_groups == 0
        ):  # a pass of path rows alone trains nothing
            return
        for tensor in _differentiable(output):
            tensor.register_hook(self._due)

    def _due(self, _tensor: Tensor) -> None:
        self.pending = True
        # Hooks fire many times in one backward pass; and inside of it passes of their own run where reentrant checkpoints recompute.
        if self.enabled and self._queued() is None:
            average = functools.partial(self._average)
            # A backward pass that fails drops what it queued, and only it holds that.
            self._queued = weakref.ref(average)
            torch.autograd.Variable._execution_engine.queue_callback(average)

    def _average(self) -> None:
        self._queued = _nothing
        average_gradients(self._model, self.processes)


def _nothing() -> None:
    """A reference to what is gone."""


def _differentiable(output: Any, depth: int = 3) -> list[Tensor]:
    """The tensors of a model's output that have a gradient; of objects that PyTorch does not know their attributes are looked at."""
    leaves = torch.utils._pytree.tree_leaves(output)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not found and depth:
        inside = [vars(leaf) for leaf in leaves if hasattr(leaf, "__dict__") and not isinstance(leaf, _CLOSED)]
        found = [tensor for values in inside for tensor in _differentiable(list(values.values()), depth - 1)]
    return found


_CLOSED = (Tensor, nn.Module, type)


def find_averaging(model: nn.Module) -> _Averaging | None:
    """What averages a model's gradients, if igulora does."""
    averaging = vars(keeper(model)).get("igulora_averaging")
    # A pickle of one process's model, opened by several.
    return None if averaging is None or (averaging.alone and averaging.processes.count > 1) else averaging


def find_processes(model: nn.Module, group: dist.ProcessGroup | None) -> Processes:
    """Those of ``group``; by default those that the model's gradients are averaged over, or all.

    Raises:
        ValueError: the gradients are averaged over others.
    """
    averaging, asked = find_averaging(model), Processes(group)
    if averaging is None:
        return asked
    if group is not None and asked.members != averaging.processes.members:
        raise ValueError(
            f"expected the process group that gradients are averaged over, processes {averaging.processes.members}, got one of processes "
            f"{asked.members}; leave process_group out, or give it to igulora.distributed.replicate(model, group) too"
        )
    return averaging.processes


def stop_averaging(model: nn.Module) -> None:
    """Leave the gradients of a model alone from now on."""
    averaging = vars(keeper(model)).pop("igulora_averaging", None)
    if averaging is not None:
        averaging.stop()


@torch.no_grad()
def average_gradients(model: nn.Module, processes: Processes) -> None:
    """Average the flat gradient of the adapters, and as one buffer the gradients of whatever else is trained: a collective."""
    bank = find_bank(model)
    bank.bind_grads()
    processes.mean_(bank.grad)
    others = bank.others(model)
    for dtype in dict.fromkeys(p.dtype for p in others):
        params = [p for p in others if p.dtype == dtype]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = processes.mean_(torch.cat([g.flatten() for g in grads]))
        parts = flat.split([g.numel() for g in grads])
        for param, grad, part in zip(params, grads, parts, strict=True):
            param.grad = grad.copy_(part.view_as(grad))
    averaging = find_averaging(model)
    if averaging is not None:
        averaging.pending, averaging.averaged = False, True


def replicated_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What every process holds whole: the adapters' parameters and whatever else is trained; for ``fully_shard(ignored_params=...)``.

    Raises:
        ValueError: the model is not adapted.
    """
    bank = find_bank(model)
    return {*bank.parameters(), *bank.others(model)}


def shard(
    model: nn.Module, blocks: list[nn.Module] | None = None, *, mesh: DeviceMesh | None = None, **options: Any
) -> nn.Module:
    """FSDP2: shard the frozen base over the processes, keep the adapters whole in each; returns the same model.

    Call it after :func:`igulora.adapt` and before the optimizer and the Controller are made.

    Args:
        model: adapted.
        blocks: modules that are gathered for their own forward and backward; by default the members of the model's outermost
            ``nn.ModuleList``s (a transformer's layers). What is outside of them is gathered with the root.
        mesh, options: of ``torch.distributed.fsdp.fully_shard`` (``reshard_after_forward``, ``mp_policy``, ...).

    Raises:
        ValueError: the model is not adapted, is sharded already, or no process group is initialised.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    keep = replicated_parameters(model)
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "expected an initialised process group, got none; call torch.distributed.init_process_group() and start with torchrun"
        )
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        raise ValueError(
            "expected a model that is not sharded, got one with FSDP2 modules; after fully_shard of your own call replicate(model)"
        )
    for block in _blocks(model) if blocks is None else blocks:
        fully_shard(block, mesh=mesh, ignored_params=keep, **options)
    fully_shard(model, mesh=mesh, ignored_params=keep, **options)
    return replicate(model, None if mesh is None or mesh.ndim > 1 else mesh.get_group())


def _blocks(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return found


@torch.no_grad()
def replicate(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Start the trained parameters equal in all processes and have their gradients averaged from now on; returns the model.

    For models that you sharded yourself, with :func:`replicated_parameters` ignored; :func:`shard` does it. Not beside
    DistributedDataParallel, which does both.

    Raises:
        ValueError: the model is not adapted.
    """
    model = unwrap(model)
    bank, processes = find_bank(model), Processes(group)
    if find_averaging(model) is None:
        if processes.count > 1:
            first = dist.get_global_rank(group, 0) if group is not None else 0
            for tensor in (bank.weight, bank.mask, *bank.others(model)):
                dist.broadcast(tensor, first, group=group)
        keeper(model).igulora_averaging = _Averaging(model, processes)  # type: ignore[assignment]
    return model


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Leave gradients as they are in the backward passes inside: for all micro-batches of an optimizer step but its last.

    Raises:
        ValueError: the gradients of this model are not averaged by igulora (:func:`shard`, :func:`replicate`).
    """
    averaging = find_averaging(model)
    if averaging is None:
        raise ValueError(
            "expected a model of igulora.distributed.shard, got another; DistributedDataParallel has a no_sync() of its own"
        )
    averaging.enabled = False
    try:
        yield
    finally:
        averaging.enabled = True


def check_averaged(model: nn.Module) -> None:
    """Raise where FSDP2 sharded the base and nobody averages the adapters' gradients.

    Raises:
        ValueError: says what to call.
    """
    inner = unwrap(model)
    sharded = any("FSDPModule" in (cls.__name__ for cls in type(m).__mro__) for m in inner.modules())
    averaging = find_averaging(model)
    if averaging is not None:
        averaging.follow()
    elif sharded:
        raise ValueError(
            "expected a model whose adapters' gradients are averaged over the processes, got one sharded by fully_shard: it leaves "
            "replicated parameters alone; call igulora.distributed.replicate(model), or igulora.distributed.shard(model) instead of it"
        )


def check_synced(model: nn.Module, passes: int) -> None:
    """Raise where the step that ends was made of gradients that were not averaged: called once at the end of every step.

    Args:
        model: adapted.
        passes: backward passes of this step.

    Raises:
        ValueError: the processes' weights have parted.
    """
    averaging = find_averaging(model)
    if averaging is None or averaging.alone:
        return
    missed = averaging.pending or (passes > 0 and not averaging.averaged)
    averaging.averaged = False
    if missed:
        raise ValueError(
            "expected the last micro-batch of a step outside of igulora.distributed.no_sync(), got a step of gradients that were not "
            "averaged: the processes' weights have parted. Leave the last micro-batch out of it, and train the model that was given to "
            "igulora.distributed.replicate or shard"
        )
