"""Layers that read one input: S of all of them comes from one pass over it, and so do their dQ (the q, k, v and gate, up of a block)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .kernels import svd_project
from .kernels.checks import under_autocast

if TYPE_CHECKING:
    from .adapter import SVDAdapter
    from .recompute import Recipe

# Last parts of the names of sibling modules that models call with one tensor.
SHARED_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


class Taken(NamedTuple):
    """What a member is given for its input.

    Attributes:
        x: the input, in autocast's dtype.
        S: (M, r), or None when the layer is to compute it itself; then there is no seed either.
        seed: of dropout.
        recipe: how to make x again, shared by the group, or None.
    """

    x: Tensor
    S: Tensor | None = None
    seed: Tensor | None = None
    recipe: Recipe | None = None


def _in_subgraph() -> bool:
    """While Dynamo traces: whether that is the inside of a checkpoint, or of another function that becomes a graph of its own."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.current_tracer.parent is not None
    except (ImportError, AttributeError):  # another tracer, or another PyTorch: every layer reads its input by itself
        return True


# What torch.compiler.assume_constant_result sets: called while a graph is traced, and not traced itself. That decorator would import the
# whole compiler with igulora.
_in_subgraph._dynamo_marked_constant = True  # type: ignore[attr-defined]


class SharedInput:
    """Adapted layers of one parent that are called with one tensor, one after the other.

    The first to be called computes S for all; each takes its own. Which tensor it was is checked by identity at every call. Members found
    to be called with different tensors part, but only when the next forward begins: a recomputation has to repeat what its forward did.
    """

    def __init__(self, layers: list[SVDAdapter]) -> None:
        self.layers = layers
        self._x: Tensor | None = None
        self._cast: Tensor | None = None  # in autocast's dtype: one copy for all members
        self._version = 0  # raised by every change in place
        self._seed: Tensor | None = None
        self._recipe: Recipe | None = None
        self._ready: dict[int, Tensor] = {}
        # Slots that took their S, input by input, since the member that opens a forward was last called.
        self._opener: int | None = None
        self._rounds: list[list[int]] = []
        for layer in layers:
            layer.shared = self

    def take(self, layer: SVDAdapter, x: Tensor) -> Taken:
        """What a layer needs for x."""
        watching = not torch.compiler.is_compiling()  # what a compiled graph was traced with stays
        if not watching and torch.is_grad_enabled() and _in_subgraph():
            return Taken(x)  # inside a checkpoint the compiler lets nothing be kept from one layer to the next
        if layer.training is not self.layers[0].training or all(member is not layer for member in self.layers):
            return Taken(x)  # a mode of its own, or a replica of a member
        version = x._version if watching and not x.is_inference() else 0
        if self._x is not x or self._version != version or layer.slot not in self._ready:
            if watching and self._opens(layer):
                if self._part():
                    return Taken(x) if layer.shared is None else layer.shared.take(layer, x)
                self._opener, self._rounds = layer.slot, []
            self._start(x)
            self._version = version
            if watching:
                self._rounds.append([])
        if watching and self._rounds:
            self._rounds[-1].append(layer.slot)
        assert self._cast is not None
        taken = Taken(self._cast, self._ready.pop(layer.slot), self._seed, self._recipe)
        if not self._ready:
            self._forget()
        return taken

    def _forget(self) -> None:
        self._x = self._cast = self._seed = self._recipe = None
        self._ready = {}

    def _opens(self, layer: SVDAdapter) -> bool:
        return self._opener is None or self._opener == layer.slot

    def _part(self) -> bool:
        """Split the group by what the last forward showed; not inside a backward, where recomputation runs."""
        if len(self._rounds) < 2 or torch._C._current_graph_task_id() != -1:
            return False
        first: dict[int, int] = {}
        for i, slots in enumerate(self._rounds):
            for slot in slots:
                first.setdefault(slot, i)
        if len(set(first.values())) < 2:
            return False
        parts: dict[int, list[SVDAdapter]] = {}
        for layer in self.layers:
            parts.setdefault(first.get(layer.slot, 0), []).append(layer)
            layer.shared = None
        self._forget()
        for part in parts.values():
            if len(part) > 1:
                SharedInput(part)
        return True

    def _start(self, x: Tensor) -> None:
        first = self.layers[0]
        context = first.context
        self._seed = first.dropout_seed(x)
        layers = [layer for layer in self.layers if not layer.merged]
        if context.train_groups == 0:  # a pure path pass: no parameter in the graph, yet a backward
            Qs = [context.stand_ins[layer.slot][2] for layer in layers]
        else:
            Qs = [layer.lora_Q for layer in layers]
        sampled = context.path_start is not None
        (cast,) = under_autocast(x)
        recipe = None if first.recompute is None else first.recompute.of(cast)
        S = svd_project(
            cast,
            Qs,
            context.alpha,
            dropout_p=first.dropout,
            seed=self._seed,
            train_groups=context.train_groups,
            path_start=context.path_start,
            path_weight=context.path_weight,
            path_Qs=[context.accumulators[layer.slot][2] for layer in layers] if sampled else None,
            again=None if recipe is None else recipe.hold(),
        )
        self._x, self._cast, self._recipe = x, cast, recipe
        self._ready = {layer.slot: part for layer, part in zip(layers, S, strict=True)}


def share_inputs(names: list[str], layers: list[SVDAdapter]) -> None:
    """Group the layers whose siblings read the same input, by the names of :data:`SHARED_NAMES` and their shapes.

    Args:
        names: full module names of the layers.
    """
    siblings: dict[str, dict[str, SVDAdapter]] = {}
    for name, layer in zip(names, layers, strict=True):
        layer.shared = None
        parent, _, last = name.rpartition(".")
        siblings.setdefault(parent, {})[last] = layer
    for children in siblings.values():
        for group in SHARED_NAMES:
            found = [children[name] for name in group if name in children and children[name].r]
            found = [layer for layer in found if layer.reads_features and layer.blocks == 1]
            kinds = {(layer.in_features, layer.lora_Q.dtype, layer.dropout) for layer in found}
            if len(found) > 1 and len(kinds) == 1:
                SharedInput(found)
