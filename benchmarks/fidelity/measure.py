"""The exact integral of the path gradient, an estimator's samples, and how far the rankings they lead to agree.

The estimators are the library's own: :class:`Samples` only leaves out the training passes that no sample reads. The exact integral
drives the path context directly, and is tested against the completeness axiom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from igulora.bank import Bank, find_bank
from igulora.batches import batch_size, take_rows
from igulora.config import IGUConfig
from igulora.importance import Importance
from igulora.objective import LossFn, Objective
from igulora.path_pass import PathPasses, _PathRows
from igulora.training.tasks import average_ranks, pearson

# What allocation may rank by, each with a smoothing over windows. ``product`` is AdaLoRA's score, lambda's term included: beside
# |lambda| itself the products would vanish.
SCORES: dict[str, dict[str, str]] = {
    "snr": {"combine": "snr", "lambda_score": "magnitude"},
    "product": {"combine": "product", "lambda_score": "score"},
}
MEASURES = ("sensitivity", *SCORES)


@dataclass(frozen=True)
class Integral:
    """Over a window, flat with the bank's layout: the mean gradient (``signed``); the mean over micro-batches of |w| |T| (``absolute``)."""

    signed: Tensor
    absolute: Tensor

    def of(self, aggregate: str) -> Tensor:
        """What ``Importance.update`` takes under ``aggregate``."""
        return self.absolute if aggregate == "absolute" else self.signed


def composite_trapezoid(intervals: int) -> list[tuple[float, float]]:
    """(alpha, weight) of the N + 1 evaluations of the composite trapezoid on N intervals of [0, 1]."""
    return [(k / intervals, (0.5 if k in (0, intervals) else 1.0) / intervals) for k in range(intervals + 1)]


def integrate(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    rule: Sequence[tuple[float, float]],
    copies: int = 1,
    tell: Callable[[int], None] = lambda _: None,
) -> Integral:
    """The rule's integral of every micro-batch's path gradient, over all of its sequences (path "delta").

    Args:
        rule: (alpha, weight) of the evaluations.
        copies: evaluations that run side by side in one pass.
        tell: called with the number of micro-batches done.
    """
    bank = find_bank(model)
    signed, absolute = torch.zeros_like(bank.weight), torch.zeros_like(bank.weight)
    for done, batch in enumerate(batches, start=1):
        bank.path.zero_()
        rows = batch_size(batch)
        for first in range(0, len(rule), copies):
            part = rule[first : first + copies]
            alpha = torch.tensor([a for a, _ in part], dtype=bank.dtype).repeat_interleave(rows)
            # The loss is a mean over all copies; each is to be a mean of its own.
            weight = torch.tensor([u * len(part) for _, u in part], dtype=bank.dtype).repeat_interleave(rows)
            with bank.context.at(alpha, 0, 0, weight):
                loss_fn(take_rows(batch, torch.arange(rows).repeat(len(part)))).backward()
        with torch.no_grad():
            signed.add_(bank.path, alpha=1 / len(batches))
            absolute.add_((bank.weight * bank.path).abs_(), alpha=1 / len(batches))
        tell(done)
    return Integral(signed, absolute)


@torch.no_grad()
def loss_change(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> float:
    """Mean of L(Delta W) - L(0) over the micro-batches: what the attributions of all lambdas add up to (completeness)."""
    context, total = find_bank(model).context, 0.0
    for batch in batches:
        losses = []
        for alpha in (1.0, 0.0):
            with context.at(torch.tensor(alpha, dtype=find_bank(model).dtype)):
                losses.append(loss_fn(batch).double())
        total += (losses[0] - losses[1]).item()
    return total / len(batches)


class Samples(PathPasses):
    """The library's path passes without the training passes that no sample reads; counts the sequences of the path passes.

    Attributes:
        extra_rows: sequences that ran forward and backward beside the training rows, so far.
    """

    def __init__(self, model: nn.Module, config: IGUConfig, control: bool = False) -> None:
        super().__init__(model, find_bank(model), config, None)
        self.control = control
        self.extra_rows = 0

    def window(self, loss_fn: LossFn, batches: Iterable[Any]) -> Tensor:
        """T of one window (with ``aggregate="absolute"`` the mean of |w| |sample|); valid until the next one starts."""
        bank = self.bank
        for batch in batches:
            bank.bind_grads()
            bank.grad.zero_()
            bank.context.unstepped = 0  # nothing is trained here
            if self.config.estimator == "instantaneous":
                super().train(Objective(loss_fn), batch)
                self.sample_training_gradient(1)
            else:
                self.train_and_sample(Objective(self._counted(loss_fn)), batch)
        bank.context.unstepped = 0
        return self.close_window()

    def train(self, task: Objective, batch: Any) -> Tensor:
        """The training pass, where a sample is taken of it."""
        if self.bank.context.path_start is None:
            return self.bank.weight.new_zeros(())
        return super().train(task, batch)

    def _counted(self, loss_fn: LossFn) -> LossFn:
        def counted(batch: Any) -> Tensor:
            if self.bank.context.train_groups == 0:
                # The control's second copy is the training rows themselves in a mixed batch: no sequences of its own.
                self.extra_rows += batch_size(batch) // (2 if self.control else 1)
            return loss_fn(batch)

        return counted

    def _draw(self, batch: Any) -> _PathRows:
        """The sampled sequences; with ``control`` each once more at alpha = 1 with a negative weight."""
        drawn = super()._draw(batch)
        if not self.control:
            return drawn
        return dataclasses.replace(
            drawn,
            rows=torch.cat((drawn.rows, drawn.rows)),
            alpha=torch.cat((drawn.alpha, torch.ones_like(drawn.alpha))),
            factor=torch.cat((drawn.factor, -drawn.factor)),
            copies=2,
        )


class Scorer:
    """Everything allocation could rank triplets by, from one T per window: the library's own scores, with the parameters frozen.

    Attributes:
        sensitivity: per window (triplets,): y = |w T| averaged over all weights of a triplet, without smoothing.
    """

    def __init__(self, bank: Bank, config: IGUConfig) -> None:
        self.bank = bank
        self.by_name = {name: Importance(bank, dataclasses.replace(config, **SCORES[name])) for name in SCORES}
        self.sensitivity: list[Tensor] = []
        self._sizes = torch.tensor([[1, layer.out_features, layer.in_features] for layer in bank.layers]).T[
            :, bank.layer_index
        ]

    def update(self, T: Tensor) -> None:
        """Take one window's T, as ``Importance.update`` does."""
        for importance in self.by_name.values():
            importance.update(T)
        stats = self.by_name["snr"].stats
        assert stats is not None
        self.sensitivity.append((stats[1] * self._sizes).sum(0) / self._sizes.sum(0))

    def scores(self) -> dict[str, Tensor]:
        """(triplets,) smoothed scores by name."""
        return {name: importance.triplet_scores().clone() for name, importance in self.by_name.items()}

    @property
    def snr_terms(self) -> Tensor:
        """(triplets,) what the SNR adds to |lambda|: the mean scores of p and of q."""
        return self.by_name["snr"].terms[1:].sum(0)

    @property
    def below_epsilon(self) -> float:
        """Share of the rows of P and Q whose mean deviation is below the SNR's epsilon, which then sets the denominator."""
        importance = self.by_name["snr"]
        assert importance.stats is not None
        return (importance.stats[3, 1:] < importance.config.eps).double().mean().item()


def top(scores: Tensor, b: int) -> Tensor:
    """(triplets,) bool: the b highest, ties to the lower index, as allocation breaks them."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[torch.argsort(scores, descending=True, stable=True)[:b]] = True
    return chosen


def agreement(estimate: Tensor, exact: Tensor, b: int) -> dict[str, float]:
    """``top``: share of the exact top b that the estimate finds; ``spearman``: rank correlation over all triplets."""
    common = (top(estimate, b) & top(exact, b)).sum().item()
    return {"top": common / b, "spearman": pearson(average_ranks(estimate), average_ranks(exact))}


def difference(estimate: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact one."""
    return ((estimate - exact).norm() / exact.norm()).item()
