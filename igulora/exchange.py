"""Exchange: triplets move from matrices that need fewer to matrices that need more (ALGORITHMS 4; FlexLoRA), on rows held in reserve.

Every matrix stores ``max_rank`` rows; those that do not live are masked. An adjustment reads lambda (and scores) from the device, decides
on the host by the rules of :func:`choose`, and writes the few rows that change: one wait every ``delta_t`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bank import Bank
from .budget import ExchangeSchedule
from .config import IGUConfig
from .gained import Place, check_states
from .importance import Importance

_NORM_OF_GAUSSIAN = 0.02  # PEFT's start: the standard deviation of an entry


def spectral_entropy(lambdas: Tensor, eps: float) -> float:
    """``I = -(1/log r) sum e_i log(e_i + eps)``, ``e_i = lambda_i^2 / sum lambda^2`` (FlexLoRA), in [0, 1].

    Args:
        lambdas: (r,) of the live triplets of one matrix.

    Where all are 0 the spectrum counts as uniform (1); one triplet alone has entropy 0 (our rules).
    """
    if lambdas.numel() < 2:
        return 0.0
    energy = lambdas.double().square()
    total = float(energy.sum())
    if total == 0.0:
        return 1.0
    e = energy[energy > 0] / total  # 0 log 0 is 0, whatever eps is
    return max(0.0, min(1.0, float(-(e * (e + eps).log()).sum()) / math.log(lambdas.numel())))


@dataclass(frozen=True)
class Moves:
    """Which matrices lose a triplet, and which gain one, by their numbers."""

    losers: tuple[int, ...]
    gainers: tuple[int, ...]


def choose(
    importance: list[float], ranks: list[int], most: list[int], count: int, direction: str, least: int = 1
) -> Moves:
    """The ``count`` least important matrices that can lose, and the ``count`` most important ones that can gain.

    Matrices stand in one order, by importance and then by number: losers are taken from its front, gainers from its end, and where the two
    would meet fewer move, so that none does both and, with ``direction="both"``, the total stays.

    Args:
        importance: of every matrix. ranks: its live triplets. most: how many it may have.
        count: b(t). direction: "both", "prune" or "expand". least: triplets that stay in every matrix, at least 1.
    """
    order = sorted(range(len(ranks)), key=lambda k: (importance[k], k))
    losers = [place for place, k in enumerate(order) if ranks[k] > max(least, 1)]
    gainers = [place for place, k in reversed(list(enumerate(order))) if 0 < ranks[k] < most[k]]
    if direction == "prune":
        return Moves(tuple(order[place] for place in losers[:count]), ())
    if direction == "expand":
        return Moves((), tuple(order[place] for place in gainers[:count]))
    pairs = [pair for pair in zip(losers[:count], gainers[:count], strict=False) if pair[0] < pair[1]]
    return Moves(tuple(order[loser] for loser, _ in pairs), tuple(order[gainer] for _, gainer in pairs))


def check_moves(config: IGUConfig, matrices: int) -> None:
    """Raise ValueError where more triplets are to move at once than matrices can lose or gain; later on fewer move where fewer can."""
    most = matrices // 2 if config.direction == "both" else matrices
    if config.bidirectional and config.moves is not None and config.moves > max(most, 1):
        raise ValueError(
            f"expected moves of at most {max(most, 1)} for {matrices} matrices and direction={config.direction!r} (each loses or gains "
            f"one), got {config.moves}"
        )


class Allocated(NamedTuple):
    """What an allocation did beyond masks and lambdas.

    Attributes:
        importance: of every matrix, by its module's name, where matrices were ranked.
        gained: rows that are new triplets, of which nothing may be left from before (:func:`igulora.gained.start_anew`).
    """

    importance: dict[str, float] | None = None
    gained: Sequence[Place] = ()


class Exchange:
    """Moves triplets between the matrices of a model, as :class:`Allocator` prunes them.

    Args:
        bank: the triplets, spare ones masked.
        config: reads the options of the methods "flexlora" and "igu-flex".
    """

    def __init__(self, bank: Bank, config: IGUConfig) -> None:
        self.bank, self.config = bank, config
        matrices = sum(layer.r > 0 for layer in bank.layers)
        self.schedule = ExchangeSchedule(
            moves=max(matrices // 4, 1) if config.moves is None else config.moves,
            t_init=config.t_init or 0,
            t_end=config.prunes_until,
            delta_t=config.delta_t or 1,
        )
        self._total: int | None = None
        self._checked: tuple[int, bool] | None = (
            None  # id of the optimizer that was found to fit, and whether it had states by then
        )

    @property
    def initial_budget(self) -> int:
        """What a saved state says of the budget: triplets that live."""
        return self.budget(0)

    @property
    def target(self) -> int:
        """The total, which stays."""
        return self.budget(0)

    def budget(self, step: int) -> int:
        """Triplets that live; read from the device once."""
        if self._total is None:
            self._total = int(self.bank.live.sum())
        return self._total

    def check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Raise ValueError unless an optimizer is known whose moments of new triplets can be set to zero; once for each."""
        if optimizer is None:
            raise ValueError(
                f"expected the optimizer in igulora.Controller(model, optimizer=...) for method={self.config.method!r}, got none: its "
                "moments for the rows of a triplet that is gained have to start at zero"
            )
        seen = (id(optimizer), bool(optimizer.state))
        if self._checked != seen:
            check_states(optimizer, self.bank)
            self._checked = seen

    @torch.no_grad()
    def allocate(self, importance: Importance, step: int) -> Allocated:
        """Move b(step) triplets. The outputs change by what the lost ones added; gained ones start at lambda = 0.

        Raises:
            ValueError: lambda or a score is not finite, or there are fewer than three score updates. No triplet is changed then.
        """
        bank = self.bank
        scores = _scores(bank, importance, self.config)
        table = torch.stack([bank.lambdas, bank.live, scores]).cpu()  # the one wait
        lambdas, live, scores = table.unbind()
        parts = [slice(a, b) for a, b in zip(bank.starts[:-1], bank.starts[1:], strict=True)]
        values = [self._importance(lambdas[p], live[p] > 0, scores[p]) for p in parts]
        for name, value in zip(bank.names, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"expected finite lambda and scores to rank the matrices by, got {value} for {name!r}; the run has diverged: go back "
                    "to an earlier checkpoint"
                )
        ranks = [int(live[p].sum()) for p in parts]
        moves = choose(
            values,
            ranks,
            [layer.r for layer in bank.layers],
            self.schedule.moves_at(step),
            self.config.direction,
            self.config.min_rank,
        )
        weakest = scores if self.config.method == "igu-flex" and self.config.scored else lambdas.abs()
        after = live.clone()
        for k in moves.losers:
            after[_weakest(weakest[parts[k]], live[parts[k]] > 0) + parts[k].start] = 0.0
        gained = [(k, int((live[parts[k]] == 0).nonzero()[0])) for k in moves.gainers]
        for k, row in gained:
            after[parts[k].start + row] = 1.0
        self._write(after, live, gained, step)
        self._total = int(after.sum())
        return Allocated(dict(zip(bank.names, values, strict=True)), gained)

    def _importance(self, lambdas: Tensor, live: Tensor, scores: Tensor) -> float:
        kind, lambdas = self.config.importance, lambdas[live]
        if not bool(torch.isfinite(lambdas).all()):
            return math.nan
        if kind == "entropy":
            return spectral_entropy(lambdas, self.config.eps)
        if kind == "nuclear":
            return float(lambdas.abs().sum())
        if kind == "frobenius":
            return float(lambdas.norm())
        return float(scores[live].mean()) if lambdas.numel() else 0.0

    def _write(self, after: Tensor, before: Tensor, gained: list[Place], step: int) -> None:
        """Masks and lambda of all triplets, and the directions of those gained."""
        bank, device = self.bank, self.bank.device
        live = after.to(device)
        bank.lambdas.mul_((after * before).to(device))  # what an optimizer did to a masked lambda goes, too
        bank.live = live
        bank.mask.copy_(live)
        for k, row in gained:
            layer: Any = bank.layers[k]
            first = bank.starts[k]
            generator = torch.Generator().manual_seed(_seed(self.config.seed, step, first + row))
            alive = (after[first : bank.starts[k + 1]] > 0).tolist()
            others = [i for i, lives in enumerate(alive) if lives and i != row]
            for name in ("lora_P", "lora_Q"):
                matrix: Tensor = getattr(layer, name)
                matrix[row].copy_(_direction(matrix, others, self.config, generator))
            layer.keep_padding()


def put_aside(bank: Bank, ranks: list[int]) -> None:
    """Mask all but the first ``ranks[k]`` triplets of every matrix: rows that it may gain."""
    if all(rank == layer.r for layer, rank in zip(bank.layers, ranks, strict=True)):
        return
    with torch.no_grad():
        for layer, rank in zip(bank.layers, ranks, strict=True):
            layer.mask[rank:] = 0.0
            layer.lora_E[rank:] = 0.0
        bank.live = bank.mask.clone()


def _scores(bank: Bank, importance: Importance, config: IGUConfig) -> Tensor:
    if not config.scored:
        return torch.zeros_like(bank.lambdas)
    importance.check_settled()
    return importance.triplet_scores()


def _weakest(values: Tensor, live: Tensor) -> int:
    """The number of the smallest live value; of equal ones the last."""
    numbers = live.nonzero().flatten().tolist()
    return min(reversed(numbers), key=lambda i: float(values[i]))


def _seed(seed: int, step: int, triplet: int) -> int:
    """The same in every process and after a resume; another for every direction."""
    return (seed * 1_000_003 + step * 7_919_777 + triplet * 104_729) % 2**63


def _direction(matrix: Tensor, others: list[int], config: IGUConfig, generator: torch.Generator) -> Tensor:
    """(length,) of a new triplet: Gaussian of the size that rows have at the start, zero, or orthogonal to the live ones."""
    length = matrix.shape[1]
    if config.new_directions == "zeros":
        return matrix.new_zeros(length)
    size = _NORM_OF_GAUSSIAN if config.init == "gaussian" else length**-0.5
    drawn = (torch.randn(length, generator=generator) * size).to(matrix)
    if config.new_directions == "zero-impact" or not others:
        return drawn
    basis = torch.linalg.qr(matrix[others].t().double()).Q  # (length, others)
    rest = drawn.double()
    for _ in range(2):  # once more: what rounding left
        rest = rest - basis @ (basis.t() @ rest)
    return (rest * (drawn.double().norm() / rest.norm().clamp(min=1e-30))).to(matrix)
