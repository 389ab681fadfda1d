"""The parts of a training step, and which of them the operator belongs to that runs right now, forward or backward.

A part begins and ends where the step's own code does: an adapted layer is called, a regulariser is added, the optimizer steps
(``seams.py`` knows these places). Backward needs no places of its own: autograd numbers its nodes in the order in which the forward makes
them, so the part that was open when a node was made is the part of everything that its evaluation runs.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import record_function

from ..errors import check_choice

BASE, ADAPTER, PATH, ORTHOGONALITY = "base products", "adapter products", "path pass", "orthogonality"
SCORES, ALLOCATION, OPTIMIZER, REST = "scores", "allocation", "optimizer", "rest"
PARTS = (BASE, ADAPTER, PATH, ORTHOGONALITY, SCORES, ALLOCATION, OPTIMIZER, REST)
# What grows with the rows of a batch, so that path rows appended to it have their share.
_OF_ROWS = (BASE, ADAPTER, REST)
_ACCUMULATE = 2**64 - 1  # the number of every node that adds to a parameter's gradient


class State(NamedTuple):
    """A part, and how much of it belongs to the path pass instead: the share of path rows in a mixed batch, 1 in a pass of their own."""

    part: str
    share: float = 0.0


_AT_REST = State(REST)


class _Frame(NamedTuple):
    """An open scope: whose it is, what runs in it, the backward pass it was opened in (-1: none), and its range in the profile."""

    owner: object
    state: State
    task: int
    marked: Any


class PartTracker:
    """Says, while its block is open, which part of the step an operator belongs to.

    Layers are recognised by their structure: a ``base_layer`` or a frozen weight beside parameters or modules named ``lora_...`` is an
    adapted layer (igulora's and PEFT's), any other frozen linear layer a base product. igulora's controller, PEFT's AdaLoRA and optimizers
    are recognised by class. Steps of another kind say it themselves, with :func:`part`. Inside the block model and classes are hooked; on
    leaving it they are as before.

    Args:
        model: the adapted (or frozen) model of the step.
        optimizer: needed only where it is no ``torch.optim.Optimizer``; those are all recognised.
        mark: open a range in torch's profiler for every scope.

    Attributes:
        names: the ranges' names, and what they stand for.

    Raises:
        ValueError: the model is compiled, so that its layers cannot be told apart.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None, *, mark: bool = False) -> None:
        self.model, self.optimizer = model, optimizer
        self.names: dict[str, State] = {}
        self.mark = mark
        self._stacks: dict[int, list[_Frame]] = {}
        # Nodes numbered from starts[i] on were made in states[i].
        self._starts: list[int] = []
        self._states: list[State] = []
        self._owner = 0
        self._adapters: set[int] = set()
        self._exit = ExitStack()

    def __enter__(self) -> PartTracker:
        from .seams import adapter_parameters, install  # knows this module

        self._owner = threading.get_ident()
        self._starts, self._states, self._stacks = [], [], {}
        self._adapters = {id(p) for p in adapter_parameters(self.model)}
        self._note(_AT_REST)
        with ExitStack() as stack:
            install(self, stack)
            _active.append(self)
            stack.callback(_active.remove, self)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()
        for stack in self._stacks.values():  # left open by an error
            while stack:
                self._close(stack)

    # -- scopes -------------------------------------------------------------------------------------------------------

    def open(self, part: str, owner: object, share: float | None = None) -> None:
        """Begin a part. ``share`` of path rows: by default that of the scope around it; 1 makes all of it path pass."""
        stack = self._stacks.setdefault(threading.get_ident(), [])
        around = stack[-1].state if stack else _AT_REST
        if around.share == 1.0 or share == 1.0:
            state = State(PATH, 1.0)
        else:
            state = State(part, (around.share if share is None else share) if part in _OF_ROWS else 0.0)
        marked = None
        if self.mark:
            name = f"igulora: {state.part}" + (f", {state.share:.1%} path rows" if 0 < state.share < 1 else "")
            self.names[name] = state
            marked = record_function(name)
            marked.__enter__()
        stack.append(_Frame(owner, state, torch._C._current_graph_task_id(), marked))
        self._note(state)

    def close(self, owner: object) -> None:
        """End the innermost part that ``owner`` began, and what was begun inside of it."""
        stack = self._stacks.get(threading.get_ident(), [])
        if not any(frame.owner is owner for frame in stack):
            return
        while self._close(stack) is not owner:
            pass
        self._note(stack[-1].state if stack else _AT_REST)

    @contextmanager
    def scope(self, part: str, share: float | None = None) -> Iterator[None]:
        """:meth:`open` and :meth:`close` around a block."""
        owner = object()
        self.open(part, owner, share)
        try:
            yield
        finally:
            self.close(owner)

    def _close(self, stack: list[_Frame]) -> object:
        frame = stack.pop()
        if frame.marked is not None:
            frame.marked.__exit__(None, None, None)
        return frame.owner

    def _note(self, state: State) -> None:
        """Nodes made from now on belong to ``state``. Numbers are a thread's own: other threads' are left out."""
        if threading.get_ident() != self._owner:
            return
        number = torch.autograd._get_sequence_nr()
        if self._starts and self._starts[-1] == number:
            self._states[-1] = state
        elif not self._states or self._states[-1] != state:
            self._starts.append(number)
            self._states.append(state)

    # -- answers ------------------------------------------------------------------------------------------------------

    def current(self) -> str:
        """The part of the operator that is being dispatched right now; of a mixed batch, the part that its training rows belong to."""
        return self.state().part

    def state(self) -> State:
        """The same with the share of path rows."""
        stack = self._stacks.get(threading.get_ident())
        frame = stack[-1] if stack else None
        node = torch._C._current_autograd_node()
        # A scope that was opened inside this backward pass: a recomputed forward, or an optimizer that steps in a hook.
        if frame is not None and (node is None or frame.task == torch._C._current_graph_task_id()):
            return frame.state
        if node is None:
            return _AT_REST
        number = node._sequence_nr()
        if number != _ACCUMULATE:
            return self.made_in(number) or _AT_REST
        if frame is not None and frame.state.share == 1.0:
            return frame.state
        return State(ADAPTER) if id(node.variable) in self._adapters else _AT_REST  # type: ignore[attr-defined]

    def made_in(self, number: int) -> State | None:
        """In which state the node of this sequence number was made; None for a node that was there before the block."""
        at = bisect.bisect_right(self._starts, number) - 1
        return self._states[at] if at >= 0 else None


_active: list[PartTracker] = []


@contextmanager
def part(name: str) -> Iterator[None]:
    """Say which part of the step the block is, where no tracker can know: a loop of your own, a regulariser, a score.

    Costs nothing to speak of outside of a measurement, so it may stay in the loop; also a decorator::

        with igulora.measure.parts.part("orthogonality"):
            loss = loss + gamma * penalty(model)

    Raises:
        ValueError: no such part; lists :data:`PARTS` and the nearest name.
    """
    check_choice("part", name, PARTS)
    with ExitStack() as stack:
        for tracker in _active:
            stack.enter_context(tracker.scope(name))
        yield


def split(amount: float, state: State) -> Iterator[tuple[str, float]]:
    """What of ``amount`` belongs to which part: that of the state, and by its share the path pass."""
    if state.share < 1.0:
        yield state.part, amount * (1.0 - state.share)
    if state.share > 0.0:
        yield PATH, amount * state.share
