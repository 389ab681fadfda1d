"""OptimizerWatch: notices a loop whose optimizer never changes the adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .bank import Bank

# Steps in a row that may change nothing: a loss scaler that starts too high leaves out several.
_PATIENCE = 8


class OptimizerWatch:
    """Whether the optimizer writes to the adapters between two steps of the controller.

    PyTorch counts the writes to every parameter, so that a step is seen without asking the device. Some optimizers write past that count
    (fused ones, kernels of other libraries, ``p.data``): when it has stood still for several steps the weights themselves are compared,
    once in a run.

    Args:
        model: whose gradients tell a step that a loss scaler left out.
        bank: the adapters.
    """

    def __init__(self, model: nn.Module, bank: Bank) -> None:
        self._model, self._bank = model, bank
        self._counts = self._count()
        self._idle = 0
        self._kept: Tensor | None = None
        self._settled = False  # found to step, though past the count

    def _count(self) -> list[int]:
        return [p._version for p in self._bank.watched]

    def check(self) -> None:
        """Call at each step that training passes preceded, before the adapters are written to.

        Raises:
            ValueError: no adapter was written to in several steps that had finite gradients, or none any more.
        """
        counts = [] if self._settled or self._bank.weight.is_meta else self._count()
        if counts != self._counts or not counts:
            self._counts, self._idle, self._kept = counts, 0, None
            return
        self._idle += 1
        if self._idle < _PATIENCE or self._kept is None or _capturing(self._kept):
            return
        kept, vectors = self._kept, self._vectors()
        moved = (kept.shape, kept.device) != (vectors.shape, vectors.device)
        if moved or not torch.equal(kept, vectors):
            self._settled = not moved
            self._idle, self._kept = 0, None
            return
        if overflowed(self._model):
            return
        if self._bank.has_grads:
            self._settled = not bool(self._bank.grad.any())
            if self._settled:
                return  # data without a gradient change nothing: it cannot be told
            found = (
                "none, though there are gradients. Call it before ctl.step(), with an optimizer that holds the adapters' parameters "
                "(igulora.param_groups(model)) and has a learning rate above 0"
            )
        else:
            found = (
                "none, and no gradients for it: call optimizer.zero_grad() last, after optimizer.step() and ctl.step()"
            )
        raise ValueError(
            f"expected optimizer.step() to change adapters in {_PATIENCE} steps of the controller, got {found}"
        )

    def keep(self) -> None:
        """Call at the end of each step, when the adapters are what the next training pass will find."""
        if self._idle and self._kept is None:
            self._kept = self._vectors().clone()

    def _vectors(self) -> Tensor:
        """P and Q; an allocation writes to lambda, too."""
        return self._bank.weight[: self._bank.layout.lambda_offset]


def _capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def overflowed(model: nn.Module) -> bool:
    """Whether a loss scaler leaves out the step of these gradients (waits for the device)."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return not all(bool(torch.isfinite(grad).all()) for grad in grads)
