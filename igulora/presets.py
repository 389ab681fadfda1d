"""The hyper-parameters the IGU-LoRA paper trained with (its Tables 6 and 7), by task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import FIXED_RANK
from .errors import nearest


@dataclass(frozen=True)
class Preset:
    """One row of the paper's tables together with the values all of its rows share.

    ``lr`` is AdamW's learning rate and ``batch_size`` counts sequences per optimizer step; ``t_init``, ``delta_t`` and ``t_final``
    are optimizer steps (t_i, Δ_T and t_f of ALGORITHMS 2.4); ``r`` and ``target_rank`` are triplets per matrix before pruning and
    on average after it. ``max_length`` counts tokens. The paper's ``t_init + t_final`` can exceed the steps that its 25 epochs
    make of a small data set (RTE): such a run is refused until ``t_final`` is lowered or the epochs are raised.
    """

    name: str
    lr: float
    batch_size: int
    t_init: int
    delta_t: int
    t_final: int
    r: int
    target_rank: int
    epochs: int = 25
    max_length: int = 512
    window: int = 16
    nodes: int = 20
    beta1: float = 0.85
    beta2: float = 0.85
    eps: float = 1e-6
    normalize: str = "none"
    init: str = "orthonormal"
    orthogonality: float = 0.1
    estimator: str = "trapezoid"
    include_f0: bool = True
    patience: int = 10

    def config_options(self, method: str = "igu") -> dict[str, Any]:
        """The fields of :class:`igulora.IGUConfig` that this row sets for ``method``.

        ``total_steps`` is not among them: it follows from the size of the data. The path's own fields (``estimator``, ``nodes``,
        ``window``) are set for "igu" only; the other methods have values of their own for them.
        """
        names = ["r", "target_rank", "t_init", "delta_t", "t_final", "beta1", "beta2", "eps", "init", "orthogonality"]
        if method in ("igu", "igu-flex"):
            names += ["estimator", "nodes", "window", "include_f0", "normalize"]
        elif method in FIXED_RANK:
            names = ["r", "target_rank"]
        return {name: getattr(self, name) for name in names}

    def run_options(self) -> dict[str, Any]:
        """The options of the training run that this row sets."""
        return {name: getattr(self, name) for name in ("lr", "batch_size", "epochs", "max_length", "patience")}


def _glue(name: str, lr: float, batch_size: int, t_init: int, delta_t: int, t_final: int) -> Preset:
    return Preset(name, lr, batch_size, t_init, delta_t, t_final, r=2, target_rank=1)


def _instruction(name: str, lr: float, batch_size: int, epochs: int = 25) -> Preset:
    return Preset(name, lr, batch_size, t_init=500, delta_t=20, t_final=10000, r=32, target_rank=16, epochs=epochs)


_ROWS = (
    _glue("MNLI", 5e-4, 128, 500, 20, 10000),
    _glue("RTE", 1e-3, 32, 300, 5, 2500),
    _glue("QNLI", 5e-4, 128, 400, 20, 10000),
    _glue("MRPC", 1e-3, 32, 300, 5, 2500),
    _glue("QQP", 5e-4, 128, 500, 20, 10000),
    _glue("SST-2", 1e-3, 64, 400, 20, 5000),
    _glue("CoLA", 1e-3, 32, 300, 5, 2500),
    _glue("STS-B", 2e-3, 32, 300, 5, 2500),
    _instruction("BoolQ", 5e-4, 16),
    _instruction("ARC-e", 5e-4, 16),
    _instruction("ARC-c", 5e-4, 16),
    _instruction("COPA", 1e-3, 16),
    _instruction("AQuA", 1e-4, 16),
    _instruction("MMLU", 1e-4, 128, epochs=15),
)
PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}


def _key(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def get_preset(name: str) -> Preset:
    """The preset called ``name``; case, hyphens and underscores do not matter.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: there is no such preset; lists them and names the nearest.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected the preset's name as a string, got {name!r} ({type(name).__name__})")
    by_key = {_key(row.name): row for row in _ROWS}
    row = by_key.get(_key(name))
    if row is None:
        hint = nearest(_key(name), by_key)
        for key, candidate in by_key.items():
            hint = hint.replace(repr(key), repr(candidate.name))
        raise ValueError(f"expected a preset out of {', '.join(PRESETS)}; got {name!r}.{hint}")
    return row
