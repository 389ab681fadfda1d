"""What the estimator fidelity study runs: its models and the settings it compares, frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from igulora.config import IGUConfig


@dataclass(frozen=True)
class Study:
    """One model at one trained point.

    Attributes:
        name: as given to ``--model``.
        rows, length: sequences of a micro-batch and tokens in each.
        rank, target_rank: stored triplets per matrix, and the average that a top-b choice keeps.
        steps: optimizer steps before the study; ``lr``: their learning rate.
        window, windows: M micro-batches per window, and how many windows the scores are smoothed over.
        intervals: N of the exact integral, a composite trapezoid of N + 1 evaluations.
        exact_windows: how many windows have that integral; the others have Gauss-Legendre's 5 nodes on every sequence.
        copies: nodes that one exact pass evaluates side by side.
        seeds, dear_seeds: repetitions of a setting that draws random numbers; the second number where it costs more than half a window.
        rounds: of the timing.
    """

    name: str
    title: str
    rows: int
    length: int
    rank: int
    target_rank: int
    steps: int
    lr: float
    window: int = 16
    windows: int = 4
    intervals: int = 20
    exact_windows: int = 1
    copies: int = 3
    seeds: int = 3
    dear_seeds: int = 1
    rounds: int = 9

    def config(self) -> IGUConfig:
        """The adapter's options. The schedule is so long that nothing is pruned before or during the study."""
        return IGUConfig(
            r=self.rank,
            target_rank=self.target_rank,
            total_steps=100 * max(self.steps, self.window),
            window=self.window,
            estimator="instantaneous",
            path_pass="separate",
            init="orthonormal",
        )


STUDIES = {
    s.name: s
    for s in (
        Study(
            "smollm2",
            "SmolLM2-135M, all 210 linears, language modelling of BBC News",
            rows=4,
            length=64,
            rank=16,
            target_rank=8,
            steps=200,
            lr=5e-4,
            seeds=2,
        ),
        Study(
            "minilm",
            "MiniLM (all-MiniLM-L6-v2), classes of BBC News snippets",
            rows=8,
            length=32,
            rank=8,
            target_rank=4,
            steps=300,
            lr=1e-3,
            exact_windows=2,
        ),
        Study(
            "tiny",
            "a random two-layer Llama on random tokens (shows that everything runs, says nothing about fidelity)",
            rows=4,
            length=8,
            rank=4,
            target_rank=2,
            steps=6,
            lr=1e-2,
            window=6,
            windows=3,
            exact_windows=1,
            seeds=2,
            rounds=2,
        ),
    )
}


@dataclass(frozen=True)
class Setting:
    """One way to estimate the path gradient; the fields are those of ``IGUConfig``.

    ``control`` marks a proposal that the library does not offer: the training gradient of *all* sequences, which is free, plus the
    sampled sequences' path gradient minus their own gradient at alpha = 1 (a control variate; unbiased for the same integral).
    """

    estimator: str
    nodes: int | None = None
    every: int = 1
    fraction: float = 1.0
    weights: str = "trapezoid"
    f0: bool = False
    aggregate: str = "signed"
    control: bool = False

    @property
    def title(self) -> str:
        """The estimator without its sampling, such as ``gauss 3``."""
        parts = [self.estimator]
        if self.estimator == "gauss":
            parts.append(str(self.nodes))
        if self.estimator == "trapezoid":
            parts.append("eq6" if self.weights == "eq6" else "A.1")
        parts += ["+ f(0)"] * self.f0 + ["+ control"] * self.control + ["absolute"] * (self.aggregate == "absolute")
        return " ".join(parts)

    @property
    def key(self) -> str:
        """A name that tells settings apart, in files and tables."""
        return f"{self.title}, every {self.every}, fraction {self.fraction:g}"

    @property
    def kind(self) -> str:
        """Settings of one kind have steps of one duration: what the timing measures."""
        if self.estimator == "instantaneous":
            return "plain"
        if self.estimator.startswith("on-path"):
            return "on-path"
        endpoint = self.estimator == "trapezoid" or self.control
        return f"rows {self.fraction:g}" + " + endpoint" * endpoint + " + f(0)" * self.f0

    @property
    def timed_as(self) -> Setting:
        """A setting of the library with steps of the same kind, scored once per window. A control's training rows take part in the
        sample, as the trapezoid's do for its endpoint.
        """
        estimator = "trapezoid" if self.control else self.estimator
        nodes = None if self.control else self.nodes
        return Setting(estimator, nodes, every=10**6, fraction=self.fraction, f0=self.f0)

    @property
    def draws(self) -> bool:
        """Whether the seed matters: Gauss nodes are taken in turn, so only the choice of sequences is random there."""
        return not (self.estimator == "instantaneous" or (self.estimator == "gauss" and self.fraction == 1.0))

    def config(self, base: IGUConfig, seed: int) -> IGUConfig:
        """The library's options for this setting."""
        return dataclasses.replace(
            base,
            estimator=self.estimator,
            nodes=self.nodes,
            ig_every=self.every,
            ig_fraction=self.fraction,
            weights=self.weights,
            include_f0=self.f0,
            aggregate=self.aggregate,
            path_pass="separate",
            seed=seed,
        )

    def passes(self, study: Study) -> list[tuple[int, int]]:
        """What a window of samples costs here: (number of passes, sequences in each)."""
        scored = -(-study.window // min(self.every, study.window))
        if self.estimator == "instantaneous":
            return []  # kept from the preparation
        if self.estimator.startswith("on-path"):
            return [(scored, study.rows)]
        rows = max(1, round(self.fraction * study.rows))
        ends = [(scored, study.rows)] if self.estimator == "trapezoid" else []
        return [(scored, rows * (1 + self.f0 + self.control)), *ends]

    def repetitions(self, study: Study) -> int:
        """How many seeds this setting is run with."""
        cost = sum(count * rows for count, rows in self.passes(study)) / (study.window * study.rows)
        return 1 if not self.draws else study.seeds if cost <= 0.5 else study.dear_seeds


_SPARSE = ((1, 0.5), (1, 0.25), (2, 0.25), (4, 0.25), (6, 0.25), (8, 0.25), (16, 0.25))
_WHOLE = ((1, 1.0), (2, 1.0), (4, 1.0), (6, 1.0), (8, 1.0), (16, 1.0))
_FEW = ((1, 0.25), (6, 0.25))


def all_settings() -> Iterator[Setting]:
    """The registry, the paper's and the released estimators first."""
    yield Setting("instantaneous")
    yield Setting("instantaneous", aggregate="absolute")
    for weights in ("trapezoid", "eq6"):
        yield Setting("trapezoid", weights=weights)
        yield Setting("trapezoid", weights=weights, every=6, fraction=0.25)
    yield Setting("on-path")
    yield Setting("on-path-stratified")
    for every, fraction in (*_WHOLE, *_SPARSE):
        yield Setting("gauss", 3, every, fraction)
    for nodes in (1, 2, 5):
        for every, fraction in ((1, 1.0), *_FEW):
            yield Setting("gauss", nodes, every, fraction)
    for every, fraction in ((1, 1.0), (1, 0.25), (2, 0.25), (4, 0.25), (6, 0.25), (16, 0.25)):
        yield Setting("stratified", None, every, fraction)
    yield Setting("gauss", 3, aggregate="absolute")
    for every in (1, 2, 4, 6, 8, 16):
        yield Setting("gauss", 3, every, 0.25, control=True)
    for estimator, nodes in (("gauss", 1), ("gauss", 2), ("stratified", None)):
        yield Setting(estimator, nodes, 6, 0.25, control=True)


def settings(study: Study) -> list[Setting]:
    """What this study runs: on MiniLM everything, the trapezoid with f(0) too; on SmolLM2, whose passes are dear, neither Eq. 6 on all
    sequences nor five nodes, and fewer controls; a short list on the tiny model.
    """
    chosen = list(all_settings())
    if study.name == "smollm2":
        chosen = [s for s in chosen if s.nodes != 5 and (s.weights != "eq6" or s.fraction < 1)]
        chosen = [s for s in chosen if not s.control or (s.nodes, s.every) in ((3, 1), (3, 6), (3, 16))]
    if study.name == "minilm":
        chosen.insert(3, Setting("trapezoid", f0=True))
    if study.name == "tiny":
        kept = {"instantaneous", "trapezoid", "on-path", "stratified"}
        chosen = [s for s in chosen if s.every == 1 and s.fraction == 1.0 and s.estimator in kept]
        chosen += [
            Setting("gauss", 3, 1, 1.0),
            Setting("gauss", 3, 2, 0.25),
            Setting("gauss", 3, 2, 0.25, control=True),
        ]
    return chosen
