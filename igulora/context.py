"""PathContext: what a pass through the model needs to know about the path, shared by all adapted layers of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Training passes a model may see before its first Controller exists: enough to probe it, too few to train it.
_FREE_PASSES = 8


@dataclass
class PathContext:
    """Position on the path of the pass that is under way, and the guard against training without a controller.

    Attributes:
        alpha: None for an ordinary pass (alpha = 1), else a device tensor () or (n,): one value per sequence.
        path_weight: (n,) weights of the path rows' gradients, or None.
        accumulators: per layer slot the views for P, E and Q of the path accumulator, which path rows' gradients are added to.
        stand_ins: per layer slot P, E and Q as leaves on the parameters' storage, which a pure path pass computes with. (Leaves: a compiled
            graph cannot make what asks for a backward.)
        epoch: raised whenever parameters may have left the bank's buffers (``.to``, ``load_state_dict``, copies).
    """

    alpha: Tensor | None = None
    path_weight: Tensor | None = None
    accumulators: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    stand_ins: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    epoch: int = 0
    enabled: bool = True
    needs_controller: bool = False
    controlled: bool = False
    allowed_unstepped: int = _FREE_PASSES
    _unstepped: int = 0
    _passes: list[int] | None = (
        None  # of every watched parameter, since the last step; None where none is watched (a copy, not packed yet)
    )
    # Numbers of sequences, as the sizes of tensors without elements: a compiled graph takes those as variables, but numbers that modules
    # hold as constants, and would be compiled again for each batch size.
    _trained: Tensor | None = None
    _before_path: Tensor | None = None

    @property
    def train_groups(self) -> int | None:
        """How many leading sequences train the adapters; None for all."""
        return None if self._trained is None else self._trained.shape[0]

    @property
    def path_start(self) -> int | None:
        """First sequence whose gradient goes to the path accumulator; None for none."""
        return None if self._before_path is None else self._before_path.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no pass in flight and no controller; the bank rebuilds the accumulators."""
        return {"epoch": self.epoch + 1, "enabled": self.enabled, "needs_controller": self.needs_controller}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @contextmanager
    def at(
        self,
        alpha: Tensor,
        train_groups: int | None = None,
        path_start: int | None = None,
        path_weight: Tensor | None = None,
    ) -> Iterator[None]:
        """Run the passes inside at ``alpha``: the first ``train_groups`` sequences train, those from ``path_start`` on are samples."""
        before = (self.alpha, self._trained, self._before_path, self.path_weight)
        self._trained, self._before_path = (
            None if n is None else alpha.new_empty((n, 0)) for n in (train_groups, path_start)
        )
        self.alpha, self.path_weight = alpha, path_weight
        try:
            yield
        finally:
            self.alpha, self._trained, self._before_path, self.path_weight = before

    @property
    def unstepped(self) -> int:
        """Training passes since the last step."""
        return self._unstepped

    @unstepped.setter
    def unstepped(self, passes: int) -> None:
        self._unstepped = passes
        self._passes = None if self._passes is None else [passes] * len(self._passes)

    def watch(self, parameters: int) -> list[Callable[[Tensor], None]]:
        """Gradient hooks, one for each of so many parameters: a pass that leaves some of them out is counted by the others."""
        self._passes = [self._unstepped] * parameters

        def counter(i: int) -> Callable[[Tensor], None]:
            def count(_param: Tensor) -> None:
                if self._passes is not None and i < len(self._passes):
                    self._passes[i] += 1
                    self._unstepped = max(self._unstepped, self._passes[i])

            return count

        return [counter(i) for i in range(parameters)]

    def check_stepped(self) -> None:
        """Raise when more training passes went by than one optimizer step can have.

        Raises:
            ValueError: ``Controller.step()`` was not called, or there is no controller.
        """
        if torch.compiler.is_compiling() or not self.needs_controller:
            return
        # Inside a backward pass activation checkpointing runs the forward again.
        if torch._C._current_graph_task_id() != -1:
            return
        if (
            self._passes is None
        ):  # a copy or a file that nobody packed yet has no gradient hooks: its forward passes count
            self._unstepped += 1
        if self._unstepped < self.allowed_unstepped:
            return
        if not self.controlled:
            raise ValueError(
                f"expected an igulora.Controller for this adaptive-rank model, got {self.unstepped} training passes without one: "
                "ranks would never be allocated. Make ctl = igulora.Controller(model) and call ctl.step() after optimizer.step(); with "
                "transformers' Trainer use igulora.trainer.IGUTrainer instead, or its IGUCallback for an estimator without path passes; "
                'for a fixed rank use IGUConfig(method="lora")'
            )
        raise ValueError(
            f"expected ctl.step() after each optimizer step, got {self.unstepped} training passes without it. Call ctl.step() after "
            "optimizer.step(), or say Controller(model, accumulation_steps=K) when K micro-batches make one step"
        )
