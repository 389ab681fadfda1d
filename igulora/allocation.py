"""Allocation: budget schedule x policy -> which triplets live, written to masks and lambdas on the device (ALGORITHMS 2.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .bank import Bank
from .batches import on_device
from .budget import BudgetSchedule
from .config import IGUConfig
from .exchange import Allocated, Exchange
from .importance import Importance
from .kernels import allocate_triplets


def _score_policy(bank: Bank, importance: Importance, config: IGUConfig) -> Tensor:
    importance.check_settled()
    return importance.triplet_scores()


def _magnitude_policy(bank: Bank, importance: Importance, config: IGUConfig) -> Tensor:
    return bank.lambdas.abs()


def _random_policy(bank: Bank, importance: Importance, config: IGUConfig) -> Tensor:
    return importance.terms[0]


# Scores (triplets,) that the top-b choice is made by, per method. The last two are the controls of ALGORITHMS 6.
POLICIES: dict[str, Callable[[Bank, Importance, IGUConfig], Tensor]] = {
    "igu": _score_policy,
    "adalora": _score_policy,
    "magnitude": _magnitude_policy,
    "random": _random_policy,
}


_TABLE = 1024  # steps whose budgets go to the device at a time


class Allocator:
    """Prunes the weakest triplets of the whole model to the budget of a step.

    Args:
        bank: the triplets.
        config: reads the budget and pruning options.
        initial: budget before pruning (of the uncompacted model); the bank's own by default.
    """

    def __init__(self, bank: Bank, config: IGUConfig, initial: int | None = None) -> None:
        self.bank, self.config = bank, config
        by_parameters = config.budget_unit == "parameters"
        if by_parameters:
            per_rank = sum(layer.in_features + layer.out_features for layer in bank.layers)
            stored = int(bank.cost.sum())
        else:
            per_rank, stored = sum(layer.blocks for layer in bank.layers), bank.triplets
        self.schedule = BudgetSchedule(
            initial=stored if initial is None else initial,
            target=min((config.target_rank or 0) * per_rank, stored if initial is None else initial),
            t_init=config.t_init or 0,
            t_end=config.prunes_until,
            delta_t=config.delta_t or 1,
        )
        self._table: Tensor | None = None
        self._first = -1  # the step that the table begins with

    def check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Pruning needs none."""

    @property
    def initial_budget(self) -> int:
        """What the budget began with."""
        return self.schedule.initial

    @property
    def target(self) -> int:
        """What the budget ends with."""
        return self.schedule.target

    def budget(self, step: int) -> int:
        """b(step), in ``budget_unit``."""
        return self.schedule.budget(step)

    def _budget(self, step: int) -> Tensor:
        """b(step), () int64 on the device: one of a table that goes there now and then, so that an allocation launches nothing for it."""
        first, device = step - step % _TABLE, self.bank.device
        if self._table is None or self._first != first or self._table.device != device:
            budgets = [self.schedule.budget(first + i) for i in range(_TABLE)]
            self._table, self._first = on_device(budgets, torch.int64, device), first
        return self._table[step - first]

    @torch.no_grad()
    def allocate(self, importance: Importance, step: int) -> Allocated:
        """Choose b(step) triplets and write live mask, lambdas and, once ranks are fixed, the masks of the layers.

        Raises:
            ValueError: the policy needs scores and fewer than three updates were made.
        """
        bank, config = self.bank, self.config
        scores = POLICIES[config.method](bank, importance, config)
        live = allocate_triplets(
            scores,
            self._budget(step),
            bank.layer_index,
            eligible=bank.live > 0 if config.prune == "hard" else None,
            costs=bank.cost if config.budget_unit == "parameters" else None,
            min_rank=config.min_rank,
        )
        bank.live = live
        bank.lambdas.mul_(live)  # soft: a pruned lambda is 0 now and may grow back until the next allocation
        if config.prune == "hard" or self.schedule.phase(step) == "final":
            bank.mask.copy_(live)
        return Allocated()


def allocator_of(bank: Bank, config: IGUConfig, initial: int | None = None) -> Allocator | Exchange:
    """What allocates the triplets of ``bank``; ``initial`` as in :class:`Allocator`."""
    return Exchange(bank, config) if config.bidirectional else Allocator(bank, config, initial)
