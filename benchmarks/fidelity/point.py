"""The trained point of a fidelity study: its windows' integrals, kept on disk, and what every setting makes of the same windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from igulora.bank import find_bank
from igulora.files import write_tensors
from igulora.quadrature import gauss_legendre

from .measure import MEASURES, Integral, Samples, Scorer, agreement, composite_trapezoid, integrate
from .problem import Problem, load, load_point, save_point, train
from .settings import Setting, Study

_GAUSS = 5  # nodes of the reference where the exact integral would take too long


class Point:
    """An adapted model that is trained once and then held still.

    Args:
        study: what is studied.
        work: folder for the trained point and the integrals of the windows (too large to commit).

    Attributes:
        target: b, how many triplets a top-b choice keeps.
    """

    def __init__(self, study: Study, work: Path) -> None:
        self.study, self.work = study, work
        self.problem: Problem = load(study)
        self.model = self.problem.model
        self.bank = find_bank(self.model)
        self.config = self.model.igulora_config
        self.target = study.target_rank * len(self.bank.layers)

    # -- training -----------------------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.work / "point.safetensors"

    @property
    def trained(self) -> bool:
        """Whether the work folder holds the trained adapters."""
        return self._file.exists()

    def train(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Train, keep the result, and return the losses."""
        steps = self.study.steps

        def tell(step: int) -> None:
            if step % max(1, steps // 5) == 0:
                say(f"  step {step} of {steps}")

        losses = train(self.problem, self.study, tell)
        save_point(self.model, self._file)
        self.hold()
        return losses

    def hold(self) -> None:
        """Take the trained adapters, if there are any, and stand still: no dropout, so that the integrand is one function."""
        if self.trained:
            load_point(self.model, self._file)
        self.model.eval()
        self.bank.context.unstepped = 0

    # -- integrals ----------------------------------------------------------------------------------------------------

    def integrals(self, window: int) -> dict[str, int]:
        """What is integrated over a window, and by how many evaluations: the training gradient alone, and the references."""
        study = self.study
        exact = {"exact": study.intervals + 1} if window < study.exact_windows else {}
        gauss = {"gauss5": _GAUSS} if window >= study.exact_windows or window == 0 else {}
        return {"instantaneous": 1, **exact, **gauss}

    def has(self, name: str, window: int) -> bool:
        """Whether an integral is kept already."""
        return self._integral_file(name, window).exists()

    def _integral_file(self, name: str, window: int) -> Path:
        return self.work / f"window-{window}-{name}.safetensors"

    def integrate(self, name: str, window: int, say: Callable[[str], None]) -> None:
        """Compute and keep an integral of :meth:`integrals`."""
        batches = self.problem.window(self.study, window)
        if name == "instantaneous":  # the library's own; every setting with a control needs it too
            parts = []
            for aggregate in ("signed", "absolute"):
                config = dataclasses.replace(self.config, estimator="instantaneous", aggregate=aggregate)
                parts.append(Samples(self.model, config).window(self.problem.loss, batches).clone())
            found = Integral(*parts)
        else:
            gauss = list(zip(*gauss_legendre(_GAUSS), strict=True))
            rule = composite_trapezoid(self.study.intervals) if name == "exact" else gauss
            quarter = max(1, len(batches) // 4)

            def tell(done: int) -> None:
                if name == "exact" and done % quarter == 0 and done < len(batches):
                    say(f"  micro-batch {done} of {len(batches)}")

            found = integrate(self.model, self.problem.loss, batches, rule, self.study.copies, tell)
        write_tensors(self._integral_file(name, window), {"signed": found.signed, "absolute": found.absolute})

    def kept(self, name: str, window: int) -> Integral:
        """An integral from the work folder."""
        from safetensors.torch import load_file

        return Integral(**load_file(self._integral_file(name, window)))

    def reference(self, window: int) -> Integral:
        """The exact integral of a window, or Gauss-Legendre's 5 nodes on every sequence beyond ``exact_windows``."""
        return self.kept("exact" if window < self.study.exact_windows else "gauss5", window)

    # -- rankings -----------------------------------------------------------------------------------------------------

    def follow(self, windows: Sequence[Tensor], aggregate: str = "signed") -> Scorer:
        """Sensitivities and scores after these windows' path gradients."""
        scorer = Scorer(self.bank, dataclasses.replace(self.config, aggregate=aggregate))
        for T in windows:
            scorer.update(T)
        return scorer

    @cached_property
    def exact(self) -> dict[str, Scorer]:
        """What the references of all windows lead to, by aggregation."""
        every = range(self.study.windows)
        return {how: self.follow([self.reference(w).of(how) for w in every], how) for how in ("signed", "absolute")}

    def compare(self, scorer: Scorer, exact: Scorer) -> dict[str, Any]:
        """Agreement of every measure: of the sensitivity one value per window, of the scores one after the last window."""
        found: dict[str, Any] = {"sensitivity": {"top": [], "spearman": []}}
        for mine, theirs in zip(scorer.sensitivity, exact.sensitivity, strict=True):
            for key, value in agreement(mine, theirs, self.target).items():
                found["sensitivity"][key].append(value)
        ours, wanted = scorer.scores(), exact.scores()
        for name in MEASURES[1:]:
            found[name] = {key: [value] for key, value in agreement(ours[name], wanted[name], self.target).items()}
        return found

    def estimate(self, setting: Setting, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run a setting over all windows.

        Returns:
            What the setting is and costs, and how well it agrees with the exact integral under this seed.
        """
        study = self.study
        config = setting.config(self.config, seed)
        samples = Samples(self.model, config, setting.control)
        scorer = Scorer(self.bank, config)
        for w in range(study.windows):
            if setting.estimator == "instantaneous":
                T = self.kept("instantaneous", w).of(setting.aggregate)
            else:
                T = samples.window(self.problem.loss, self.problem.window(study, w))
                if setting.control:
                    T = T + self.kept("instantaneous", w).signed
            scorer.update(T)
        facts = {
            **dataclasses.asdict(setting),
            "title": setting.title,
            "kind": setting.kind,
            "scored": samples.quadrature.per_window / study.window,
            "extra_sequences": samples.extra_rows / (study.windows * study.window * study.rows),
        }
        return facts, self.compare(scorer, self.exact[setting.aggregate])
