"""Objective: what the loss of a micro-batch is, and how a training loop sends it backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[Any], Tensor]
TrainFn = Callable[[Any, Tensor | None], Tensor]


@dataclass(frozen=True)
class Objective:
    """What the loss of a micro-batch is, and how it is sent backward.

    Attributes:
        loss_fn: ``batch -> loss``.
        scale: what the training gradient carries: a number, or a () tensor where only the device knows it (a loss scaler's).
        items: None where the loss is a mean over its own terms; else the loss is the sum of its terms over this number.
        train: forward and backward of a training batch in the loop's own code, ``(batch, factor) -> loss``, detached: the loss is
            multiplied by the () tensor ``factor`` (None for 1) and goes backward with ``scale``. By default ``loss_fn`` and a plain
            backward.
        share: () what this process's batch weighs among those of the others, or None where all weigh the same; samples of the path keep it.
    """

    loss_fn: LossFn
    scale: float | Tensor = 1.0
    items: Tensor | float | None = None
    train: TrainFn | None = None
    share: Tensor | None = None

    def train_on(self, batch: Any, factor: Tensor | None = None) -> Tensor:
        """Forward and backward; returns the detached loss."""
        if self.share is not None:
            factor = self.share if factor is None else factor * self.share
        if self.train is not None:
            return self.train(batch, factor)
        loss = checked(self.loss_fn(batch))
        if factor is not None:
            loss.backward((self.scale * factor).to(loss.dtype))
        else:
            self._scaled(loss).backward()
        return loss.detach()

    def sample_on(self, batch: Any) -> None:
        """Forward and backward of path rows alone. They carry the scale too: a loss scaler keeps 16-bit gradients from vanishing."""
        loss = self._scaled(checked(self.loss_fn(batch)))
        (loss if self.share is None else loss * self.share).backward()

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if _is_one(self.scale) else loss * self.scale

    def unscaled(self, weight: Tensor) -> Tensor:
        """``weight`` for gradients that carry the scale."""
        return weight if _is_one(self.scale) else weight / self.scale


def checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"expected loss_fn to return a scalar loss tensor, got {got}; return a mean over the batch's loss terms"
        )
    return loss.reshape(())


def _is_one(scale: float | Tensor) -> bool:
    return not isinstance(scale, Tensor) and scale == 1.0  # a tensor is not read: that would wait for the device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and what is drawn inside undrawn: for a look at the loss that changes nothing."""
    training = [m for m in model.modules() if m.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module in training:
            module.training = True
