"""IGUConfig: every scientific option of the library, validated when it is made, and the defaults of each method."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from .errors import check_choice, nearest

# What a field left at None becomes, by method. AdaLoRA is a setting of the same machine (ALGORITHMS 3).
_SHARED: dict[str, Any] = {
    "estimator": "gauss",
    "path": "delta",
    "path_pass": "mixed",
    "weights": "trapezoid",
    "aggregate": "signed",
    "window": 16,
    "combine": "snr",
    "lambda_score": "magnitude",
    "normalize": "none",
    "init": "orthonormal",
    "orthogonality": 0.1,
    "importance": "sensitivity",
}
# Unit directions fail right above their best learning rate, P = 0 needs no penalty nor a second rate (docs/choices.md); what looks at
# lambda as at a spectrum starts from unit directions all the same.
_FROM_ZERO: dict[str, Any] = {**_SHARED, "init": "zero"}
_FIXED: dict[str, Any] = {**_SHARED, "estimator": "instantaneous", "init": "lora", "orthogonality": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    # Scores differ more between matrices than within one, so that some keep all and others nothing, which learns worse than chance does.
    "igu": {**_FROM_ZERO, "normalize": "matrix"},
    "adalora": {**_SHARED, "estimator": "instantaneous", "combine": "product", "lambda_score": "score", "window": 1},
    "lora": _FIXED,
    "ralora": _FIXED,
    "ralora-pro": _FIXED,
    "random": {**_FROM_ZERO, "estimator": "instantaneous"},
    "magnitude": {**_FROM_ZERO, "estimator": "instantaneous"},
    "flexlora": {
        **_SHARED, "estimator": "instantaneous", "combine": "product", "lambda_score": "score", "window": 1, "importance": "entropy",
    },
    "igu-flex": _SHARED,
}  # fmt: skip
# Methods whose ranks stay: LoRA, and RaLoRA's blocks of it, which are measured before training (ALGORITHMS 5).
FIXED_RANK = ("lora", "ralora", "ralora-pro")
# Methods that move triplets from matrix to matrix, under a total that stays (ALGORITHMS 4).
BIDIRECTIONAL = ("flexlora", "igu-flex")
CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "init": ("orthonormal", "gaussian", "zero", "lora"),
    "estimator": ("gauss", "stratified", "trapezoid", "on-path", "on-path-stratified", "instantaneous"),
    "path": ("delta", "factors"),
    "path_pass": ("mixed", "separate"),
    "weights": ("trapezoid", "eq6"),
    "aggregate": ("signed", "absolute"),
    "combine": ("snr", "snr-release", "product", "mean"),
    "lambda_score": ("magnitude", "score"),
    "normalize": ("none", "rank", "unit", "matrix"),
    "budget_unit": ("rank", "parameters"),
    "prune": ("soft", "hard"),
    "orthogonality_form": ("full", "offdiagonal"),
    "importance": ("entropy", "nuclear", "frobenius", "sensitivity"),
    "direction": ("both", "prune", "expand"),
    "new_directions": ("zero-impact", "zeros", "orthogonal"),
}
# How often, and on which share of the sequences, an estimator samples. Ours: what the rule of the fidelity study picks
# (benchmarks/results/fidelity; a test holds it against that), 1.6% more sequences. The paper's own: every micro-batch.
_SPARSE, _EVERY = {"ig_every": 16, "ig_fraction": 0.25}, {"ig_every": 1, "ig_fraction": 1.0}
_SAMPLING: dict[str, dict[str, Any]] = {"gauss": _SPARSE, "stratified": _SPARSE}
# Score updates that must precede the first allocation (ALGORITHMS 2.3: after one update every score is equal).
MIN_UPDATES = 3


def named(pattern: dict[str, int], name: str, default: int) -> int:
    """What a pattern of names and name endings gives the layer of that full name: its own entry, else the first ending that fits."""
    if name in pattern:
        return pattern[name]
    return next((value for ending, value in pattern.items() if name.endswith("." + ending)), default)


def initial_lambda(init: str | None, given: float | None) -> float:
    """What a lambda that is trained starts at: ``given``, or for None 1 where P starts at zero and 0 where it does not.

    Raises:
        ValueError: it is not finite, or 0 with P = 0. TypeError: it is no number.
    """
    if given is None:
        return 1.0 if init == "zero" else 0.0
    if not math.isfinite(_number("init_lambda", given)):
        raise ValueError(f"expected a finite init_lambda, got {given}")
    if init == "zero" and given == 0:
        raise ValueError(
            f"expected init_lambda other than 0 with init={init!r}: of P = 0 and lambda = 0 neither would ever move; leave it out"
        )
    return given


@dataclass
class IGUConfig:
    """Options of adaptive-rank fine-tuning. Fields left at None take the default of ``method``.

    Adapter (ALGORITHMS 1): ``r`` stored triplets per matrix, ``target_rank`` their average number after pruning (default r // 2; for the
    fixed-rank "lora" the rank itself, r by default, so that methods compare at one final budget),
    ``lora_alpha`` (default r; the update is scaled by ``s = lora_alpha / r``), ``init``, ``init_lambda``, ``dropout``,
    ``target_modules`` ("all-linear", a regular expression over full names, or a list of name endings), ``exclude_modules``,
    ``target_parameters`` (endings of names of 3-D parameters, such as "experts.down_proj": every expert's slice is a matrix of its own),
    ``modules_to_save`` (trained and saved whole, such as a classification head), ``rank_pattern`` (name ending -> r), ``blocks`` and
    ``block_pattern`` (name ending -> n) for block-diagonal adapters, whose ranks are those of a block (5; RaLoRA; :func:`igulora.align`
    measures which),
    ``recompute_inputs`` (layers do not keep their inputs where these can be multiplied out again, bit by bit, from what autograd keeps
    anyway: less memory, a little more time).

    Path (2.1-2.2; Eq. 4-7): ``estimator``, ``path``, ``path_pass`` (path rows appended to the training batch, or passes of their
    own), ``nodes`` (N of the trapezoid and of on-path; number of Gauss points), ``weights`` (appendix A.1 or the printed Eq. 6),
    ``include_f0``, ``aggregate``, ``window`` (M micro-batches per score update), ``ig_every`` (score every k-th micro-batch),
    ``ig_fraction`` (share of the sequences a path pass sees).

    Scores (2.3; Eq. 3, 10-12): ``beta1``, ``beta2``, ``eps``, ``combine``, ``lambda_score``, ``normalize``.

    Budget (2.4): ``total_steps`` T, ``t_init`` t_i, ``t_final`` t_f, ``delta_t`` (all in optimizer steps), ``budget_unit``,
    ``min_rank``, ``prune``, ``orthogonality`` gamma, ``orthogonality_form``.

    Moving triplets between matrices (4; FlexLoRA), for methods "flexlora" and "igu-flex": ``max_rank`` (triplets that a matrix may have;
    twice the rank at the start by default), ``moves`` b0 (how many matrices lose one, and gain one, at the first adjustment; a quarter of
    them by default), ``importance`` (of a matrix: entropy, nuclear norm or Frobenius norm of its lambda, or the mean sensitivity of its
    triplets), ``direction``, ``new_directions`` (how a gained triplet starts). The total stays, so that ``target_rank`` is the rank at the
    start, ``r`` by default.

    Raises:
        ValueError, TypeError: an option is unknown, out of range, or does not fit another; says what was expected.
    """

    method: str = "igu"
    r: int = 32
    target_rank: int | None = None
    total_steps: int | None = None
    lora_alpha: float | None = None
    target_modules: str | list[str] = "all-linear"
    exclude_modules: list[str] = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    blocks: int = 1
    block_pattern: dict[str, int] = field(default_factory=dict)
    dropout: float = 0.0
    init: str | None = None
    init_lambda: float | None = None
    seed: int = 0
    recompute_inputs: bool = False
    estimator: str | None = None
    path: str | None = None
    path_pass: str | None = None
    nodes: int | None = None
    weights: str | None = None
    include_f0: bool = False
    aggregate: str | None = None
    window: int | None = None
    ig_every: int | None = None
    ig_fraction: float | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    eps: float = 1e-6
    combine: str | None = None
    lambda_score: str | None = None
    normalize: str | None = None
    t_init: int | None = None
    t_final: int | None = None
    delta_t: int | None = None
    budget_unit: str = "rank"
    min_rank: int = 0
    prune: str = "soft"
    orthogonality: float | None = None
    orthogonality_form: str = "full"
    max_rank: int | None = None
    moves: int | None = None
    importance: str | None = None
    direction: str = "both"
    new_directions: str = "zero-impact"

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if self.orthogonality is None and (self.init or METHODS[self.method]["init"]) in ("zero", "lora"):
            self.orthogonality = 0.0  # the penalty would pull the rows of P to unit length
        for name, value in METHODS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, value in _SAMPLING.get(self.estimator or "", _EVERY).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.target_rank is None:
            shrinks = self.adaptive and not self.bidirectional
            self.target_rank = self.r // 2 if shrinks and isinstance(self.r, int) else self.r
        if self.nodes is None:
            self.nodes = 3 if self.estimator == "gauss" else 20
        for name, options in CHOICES.items():
            check_choice(name, getattr(self, name), options)
        self.init_lambda = initial_lambda(self.init, self.init_lambda)
        self._check_numbers()
        self._check_blocks()
        self._check_exchange()
        if self.adaptive:
            self._fill_schedule()
            self._check_schedule()

    @property
    def adaptive(self) -> bool:
        """Whether ranks are allocated at all (every method but "lora" and those of its blocks)."""
        return self.method not in FIXED_RANK

    @property
    def bidirectional(self) -> bool:
        """Whether triplets move from matrix to matrix, instead of being pruned ("flexlora", "igu-flex")."""
        return self.method in BIDIRECTIONAL

    @property
    def scored(self) -> bool:
        """Whether allocation needs importance scores: not for the controls "random" and "magnitude", nor where spectra are looked at."""
        return self.method in ("igu", "adalora") or (self.bidirectional and self.importance == "sensitivity")

    @property
    def live_rank(self) -> int:
        """Triplets per matrix that live at the start: ``r``, or ``target_rank`` where the total does not shrink."""
        assert self.target_rank is not None
        return self.r if self.adaptive and not self.bidirectional else self.target_rank

    @property
    def initial_rank(self) -> int:
        """Triplets stored per matrix at the start: those that live, or ``max_rank`` where a matrix may gain some."""
        return self.max_rank if self.bidirectional and self.max_rank is not None else self.live_rank

    @property
    def scale(self) -> float:
        """``s = lora_alpha / r_init``, constant for the whole run."""
        r = self.live_rank
        return 1.0 if self.lora_alpha is None or r == 0 else self.lora_alpha / r

    @property
    def prunes_until(self) -> int:
        """Step ``T - t_f`` of the last allocation."""
        return (self.total_steps or 0) - (self.t_final or 0)

    def _check_numbers(self) -> None:
        endings = self.target_parameters
        if not isinstance(endings, (list, tuple)) or not all(isinstance(ending, str) for ending in endings):
            raise TypeError(f"expected target_parameters to be a list of names, got {endings!r}")
        for name in ("r", "target_rank", "min_rank", "window", "ig_every", "nodes", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"expected {name} to be an int, got {value!r} ({type(value).__name__})")
        for name, rank in self.rank_pattern.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
                raise ValueError(f"expected rank_pattern to give ranks >= 0, got {rank!r} for {name!r}")
        lowest = {"r": 0, "target_rank": 0, "min_rank": 0, "window": 1, "ig_every": 1, "nodes": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"expected {name} >= {low}, got {getattr(self, name)}")
        if self.estimator == "trapezoid" and self.nodes < 2:  # type: ignore[operator]
            raise ValueError(
                f"expected nodes >= 2 for estimator={self.estimator!r} (an interior node), got {self.nodes}"
            )
        if self.adaptive and not self.bidirectional and self.target_rank > self.r:  # type: ignore[operator]
            raise ValueError(
                f"expected target_rank <= r, got target_rank={self.target_rank} > r={self.r}; "
                "raise r or lower target_rank: ranks only shrink"
            )
        if self.min_rank > self.target_rank:  # type: ignore[operator]
            raise ValueError(f"expected min_rank <= target_rank, got {self.min_rank} > {self.target_rank}")
        for name, least, high in (
            ("dropout", 0.0, 1.0),
            ("beta1", 0.0, 1.0),
            ("beta2", 0.0, 1.0),
            ("orthogonality", 0.0, math.inf),
            ("eps", 0.0, math.inf),
        ):
            number = _number(name, getattr(self, name))
            if not least <= number < high:
                wanted = f"{least:g} <= {name} < {high:g}" if high < math.inf else f"{name} >= {least:g} and finite"
                raise ValueError(f"expected {wanted}, got {number}")
        if not 0.0 < _number("ig_fraction", self.ig_fraction) <= 1.0:
            raise ValueError(f"expected 0 < ig_fraction <= 1, got {self.ig_fraction}")
        if self.lora_alpha is not None and not 0.0 < _number("lora_alpha", self.lora_alpha) < math.inf:
            raise ValueError(
                f"expected lora_alpha > 0 and finite (the update is scaled by lora_alpha / r), got {self.lora_alpha}"
            )
        # A window scores at least one micro-batch; AdaLoRA's window of one is the case in point.
        self.ig_every = min(self.ig_every, self.window)  # type: ignore[type-var]

    def rank_of(self, name: str) -> int:
        """Triplets that live at the start in each block of the layer, or slice of experts, of that full name."""
        return self._of(self.rank_pattern, name, self.live_rank)

    def blocks_of(self, name: str) -> int:
        """Blocks of the layer, or slice of experts, of that full name."""
        return self._of(self.block_pattern, name, self.blocks)

    def rank_at_start(self, name: str) -> int:
        """Triplets that live at the start in all blocks of the layer, or slice of experts, of that full name."""
        return self.rank_of(name) * self.blocks_of(name)

    def _of(self, pattern: dict[str, int], name: str, default: int) -> int:
        """What a pattern gives a layer; to a slice of experts what it gives their parameter, unless it names the slice."""
        owner = name.rpartition(".")[0]
        if any(owner == wanted or owner.endswith("." + wanted) for wanted in self.target_parameters):
            default = named(pattern, owner, default)
        return named(pattern, name, default)

    def _check_blocks(self) -> None:
        for name, blocks in {"": self.blocks, **self.block_pattern}.items():
            if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
                what = f"block_pattern to give blocks for {name!r}" if name else "blocks"
                raise ValueError(f"expected {what} of at least 1, got {blocks!r}")
        if self.bidirectional and {self.blocks, *self.block_pattern.values()} != {1}:
            raise ValueError(
                f"expected blocks=1 for method={self.method!r}, which moves triplets between whole matrices, got blocks={self.blocks} and "
                f"block_pattern={self.block_pattern}"
            )

    def _check_exchange(self) -> None:
        """Options of the methods that move triplets."""
        if not self.bidirectional:
            defaults = {"max_rank": None, "moves": None, "direction": "both", "new_directions": "zero-impact"}
            given = [name for name, value in defaults.items() if getattr(self, name) != value]
            given += ["importance"] if self.importance != "sensitivity" else []
            if given:
                raise ValueError(
                    f"expected {', '.join(given)} with method {' or '.join(BIDIRECTIONAL)} only, got method={self.method!r}; leave it out"
                )
            return
        if self.live_rank < 1:
            raise ValueError(f"expected a rank of at least 1 for method={self.method!r}, got {self.live_rank}")
        if self.max_rank is None:
            self.max_rank = max(2 * self.live_rank, *self.rank_pattern.values(), 0)
        for name, low in (("max_rank", 1), ("moves", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"expected {name} to be an int >= {low}, got {value!r}")
        largest = max(self.live_rank, *self.rank_pattern.values(), 0)
        if self.max_rank < largest:
            raise ValueError(
                f"expected max_rank >= {largest}, the rank at the start, got {self.max_rank}: matrices gain triplets up to max_rank"
            )
        starts, least = {self.live_rank, *self.rank_pattern.values()} - {0}, max(self.min_rank, 1)
        stuck = ""
        if self.direction != "expand" and max(starts) <= least:
            stuck = f"no matrix has more than the {least} triplets it keeps, so that none could be lost: raise target_rank (or r)"
        elif self.direction != "prune" and min(starts) >= self.max_rank:
            stuck = f"every matrix has max_rank={self.max_rank} triplets already, so that none could be gained: raise max_rank"
        if stuck:
            raise ValueError(f"expected ranks that can move with method={self.method!r}, but {stuck}")
        for name, value, wanted in (
            ("init", self.init, ("orthonormal", "gaussian")),
            ("budget_unit", self.budget_unit, ("rank",)),
        ):
            if value not in wanted:
                raise ValueError(
                    f"expected {name} of {' or '.join(map(repr, wanted))} for method={self.method!r}, which moves triplets and looks at "
                    f"lambda, got {value!r}"
                )

    def _fill_schedule(self) -> None:
        if self.total_steps is None:
            raise ValueError(
                f"expected total_steps (how many optimizer steps the run takes) for method={self.method!r}, got None; "
                "the budget shrinks along it"
            )
        if isinstance(self.total_steps, bool) or not isinstance(self.total_steps, int) or self.total_steps < 1:
            raise ValueError(f"expected total_steps to be a positive int, got {self.total_steps!r}")
        if self.t_final is None:
            self.t_final = round(0.3 * self.total_steps)
        if self.t_init is None:
            burn_in = MIN_UPDATES * self.window if self.scored else 1  # type: ignore[operator]
            self.t_init = max(round(0.1 * self.total_steps), burn_in)
        if self.delta_t is None:
            self.delta_t = max(1, (self.prunes_until - self.t_init) // 50)

    def _check_schedule(self) -> None:
        for name, low in (("t_init", 0), ("t_final", 0), ("delta_t", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"expected {name} to be an int >= {low}, got {value!r}")
        if self.total_steps <= self.t_init + self.t_final:  # type: ignore[operator]
            raise ValueError(
                f"expected total_steps > t_init + t_final, got {self.total_steps} <= {self.t_init} + {self.t_final}; "
                "train longer, or lower t_init (steps before pruning; with scores at least three windows of "
                f"{self.window} micro-batches: lower window too) or t_final (steps at the final ranks)"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IGUConfig:
        """Rebuild a config from :meth:`to_dict`.

        Raises:
            ValueError: a key is not an option; names the nearest one.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(f"expected an option of IGUConfig, got {key!r}.{nearest(key, known)}")
        return cls(**values)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected {name} to be a number, got {value!r} ({type(value).__name__})")
    return float(value)
