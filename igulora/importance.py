"""Importance: the smoothed scores of every weight and what they make of each triplet (ALGORITHMS 2.3; IGU-LoRA Eq. 3, 10-12)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .bank import Bank
from .config import MIN_UPDATES, IGUConfig
from .kernels import importance_update


def normalized(term: Tensor, how: str, bank: Bank, among: Tensor | None = None) -> Tensor:
    """One term of Eq. 3 over all triplets.

    Args:
        term: (triplets,) values.
        how: an option of ``IGUConfig.normalize``: "none", as it is; "rank", its rank among all triplets, in [0, 1]; "unit", divided by its
            mean; "matrix", how many standard deviations it lies above the mean of its own matrix.
        bank: says which triplets are of one matrix.
        among: bool (triplets,), those that "matrix" compares with; None for all.
    """
    if how == "rank":
        # Equal values share the mean of their ranks: allocation, not this, breaks ties. NaN stays NaN and loses.
        term = term.contiguous()
        ordered = torch.sort(term).values
        twice = torch.searchsorted(ordered, term) + torch.searchsorted(ordered, term, right=True) - 1
        return torch.where(torch.isnan(term), term, twice.to(term.dtype) / (2 * max(term.numel() - 1, 1)))
    if how == "unit":
        mean = term.abs().nanmean()
        return term / torch.where(mean > 0, mean, torch.ones_like(mean))
    if how == "matrix":
        return _standardised(term, bank, among)
    return term


def _standardised(term: Tensor, bank: Bank, among: Tensor | None) -> Tensor:
    """Standard deviations above the mean of its matrix; 0 where a matrix has equal values. NaN stays NaN and counts for no other."""
    table = bank.triplet_table
    values = term[table]
    counted = torch.where(table >= 0 if among is None else (table >= 0) & among[table], values, torch.nan)
    mean = counted.nanmean(1, keepdim=True)
    spread = (counted - mean).square().nanmean(1, keepdim=True).sqrt()
    return ((values - mean) / torch.where(spread > 0, spread, torch.ones_like(spread))).flatten()[bank.triplet_place]


class Importance:
    """States and scores of all weights of a bank.

    Attributes:
        mean, deviation: flat float32 with the bank's layout: EMA of y (Eq. 10) and of |y - mean| (Eq. 11).
        terms: (3, triplets) scores of lambda, p and q after the last update; for ``method="random"`` the first holds the draws.
        stats: (4, 3, triplets) row means of score, y, mean and deviation of lambda, p and q after the last update, or None.
        updates: how many updates were made.
    """

    def __init__(self, bank: Bank, config: IGUConfig) -> None:
        self.bank, self.config = bank, config
        self.mean = torch.zeros_like(bank.weight)
        self.deviation = torch.zeros_like(bank.weight)
        self.terms = bank.weight.new_zeros((3, bank.triplets))
        if config.method == "random":
            # Chance decides once who dies; kept with the scores, so that it survives compaction and a resumed run.
            generator = torch.Generator().manual_seed(config.seed)
            self.terms[0].copy_(torch.rand(bank.triplets, generator=generator))
        self.stats: Tensor | None = None
        self.updates = 0

    def update(self, path: Tensor) -> None:
        """Take one window's path gradient T, flat; with ``aggregate="absolute"`` the window's mean of |w| |g|. No synchronisation."""
        config, bank = self.config, self.bank
        # A window with a non-finite T leaves the states, and so the terms computed from them, as they were.
        stats, _ = importance_update(
            bank.weight,
            path,
            self.mean,
            self.deviation,
            list(bank.layout.regions),
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            combine=config.combine,
            absolute=config.aggregate == "absolute",
            table=bank.score_table,
        )
        self.stats = stats.view(4, 3, bank.triplets)
        self.terms = self.stats[0]
        self.updates += 1

    def check_settled(self) -> None:
        """Raise ValueError where fewer than three updates were made: after the first every weight scores the same."""
        if self.updates < MIN_UPDATES:
            raise ValueError(
                f"expected at least {MIN_UPDATES} score updates before an allocation, got {self.updates}: after the first every "
                "weight scores the same. Allocate later (t_init), or score more often (window)"
            )

    def triplet_scores(self) -> Tensor:
        """``S_i = s_lambda + mean_k score(P_ik) + mean_k score(Q_ik)`` (Eq. 3), (triplets,).

        Raises:
            ValueError: no update was made yet.
        """
        if self.updates == 0:
            raise ValueError(
                "expected scores, got none yet: no window of path samples has been completed; train on first"
            )
        how = self.config.normalize or "none"
        magnitude = self.config.lambda_score == "magnitude"
        first = self.bank.lambdas.abs() if magnitude else self.terms[0]
        # What is pruned for ever counts no longer, so that compaction changes nothing.
        among = self.bank.live > 0 if how == "matrix" and self.config.prune == "hard" else None
        parts = [normalized(term, how, self.bank, among) for term in (first, self.terms[1], self.terms[2])]
        return parts[0] + parts[1] + parts[2]

    def to(self, device: torch.device) -> None:
        """Follow the bank to another device."""
        self.mean, self.deviation = self.mean.to(device), self.deviation.to(device)
        self.terms = self.terms.to(device)
        self.stats = None if self.stats is None else self.stats.to(device)

    def module_stats(self) -> dict[str, Tensor]:
        """(modules,) means over each module's P and Q rows of y, mean, deviation and score, on the device."""
        if self.stats is None:
            raise ValueError("expected row statistics, got none: no score update was made yet")
        per_triplet = self.stats[:, 1:].mean(1)  # (4, triplets)
        starts = self.bank.starts
        means = [per_triplet[:, a:b].sum(1) / max(b - a, 1) for a, b in itertools.pairwise(starts)]
        table = torch.stack(means, dim=1) if means else per_triplet.new_zeros((4, 0))
        return dict(zip(("score", "y", "mean", "deviation"), table, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, and the number of updates."""
        return {"mean": self.mean, "deviation": self.deviation, "terms": self.terms, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take states saved by :meth:`state_dict` for a bank of the same layout.

        Raises:
            ValueError: a tensor has another shape.
        """
        for name in ("mean", "deviation", "terms"):
            mine: Tensor = getattr(self, name)
            if mine.shape != state[name].shape:
                raise ValueError(
                    f"expected score state {name!r} of shape {tuple(mine.shape)}, got {tuple(state[name].shape)}: "
                    "it was saved for another adapter"
                )
            mine.copy_(state[name])
        self.updates = int(state["updates"])
