"""igulora's own methods. They allocate at every step, as PEFT's AdaLoRA does, so that every step that is timed does all of the work."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

import igulora
from igulora.kernels.windows import widened
from igulora.quadrature import path_factors

from ..cases import Case
from .method import Adapted, Batch, Method, Sampled

_SETTLED = 12  # steps


def _weight(W0: Tensor, values: dict[str, Tensor], layer: igulora.FusedSVDLinear) -> Tensor:
    P, Q = (widened(values[part], layer.blocks) for part in "PQ")
    E = values["E"] if "E" in values else layer.lora_E.detach().to(W0.dtype)  # method "lora" has no lambda to train
    return W0 + layer.scale * (P.t() * (layer.mask.to(W0.dtype) * E)) @ Q


def _adapted(model: nn.Module) -> Iterator[Adapted]:
    for name, layer in model.named_modules():
        if isinstance(layer, igulora.FusedSVDLinear):
            parts = {part: getattr(layer, f"lora_{part}") for part in "PEQ"}
            trained = {part: value for part, value in parts.items() if value.requires_grad}
            yield Adapted(name, trained, partial(_weight, layer=layer))


class Igulora(Method):
    """Ours. Steps differ in kind: with or without path rows, with or without a score update."""

    name = "default"
    title = "igulora, default estimator, averaged over a scoring window"
    adaptive = True
    options: ClassVar[dict[str, object]] = {}

    def __init__(self, model: nn.Module, case: Case) -> None:
        # The dearer of the two starts, with the orthogonality penalty; which of them it is changes nothing else of a step.
        options: dict[str, Any] = {"init": "orthonormal", **self.options}
        window = igulora.IGUConfig(total_steps=case.total_steps, **options).window
        self.config = igulora.IGUConfig(
            r=case.rank,
            target_rank=case.target_rank,
            total_steps=case.total_steps,
            t_init=3 * window,
            t_final=case.total_steps // 4,
            delta_t=1,
            target_modules=case.target_modules,
            **options,
        )
        super().__init__(igulora.adapt(model, self.config), case)
        self._optimize(igulora.param_groups(self.model, lr=1e-4))
        self.controller = igulora.Controller(self.model, optimizer=self.optimizer)
        self._sampled: list[bool] = []
        self._info: igulora.StepInfo | None = None

    def backward(self, batch: Batch) -> Tensor:
        loss = self.controller.backward(lambda b: self.model(**b).loss, batch)
        self._sampled.append(self.controller.passes.sampled)
        return loss

    def book(self) -> None:
        self._info = self.controller.step()

    def prepare(self, small: Batch) -> None:
        """Whole windows, at least four: three precede the first allocation, the next shows where in a window path rows come.

        And enough steps for the controller to have seen that the optimizer steps, which it looks at once.
        """
        self._sampled.clear()
        window = self.config.window
        for _ in range(max(4, -(-_SETTLED // window)) * window):
            self.step(small)

    def _kind(self, position: int) -> str:
        path = self._sampled[3 * self.config.window + position]
        scored = position == self.config.window - 1
        return ("path" if path else "plain") + ("+score" if scored else "")

    def kinds(self) -> dict[str, float]:
        counts = Counter(self._kind(position) for position in range(self.config.window))
        return {kind: count / self.config.window for kind, count in counts.items()}

    def seek(self, kind: str, small: Batch) -> None:
        super().seek(kind, small)
        while self._kind(len(self._sampled) % self.config.window) != kind:
            self.step(small)

    def check_kind(self, kind: str) -> None:
        found = ("path" in kind.split("+"), "score" in kind.split("+"))
        if len(self.kinds()) > 1 and found != (self._sampled[-1], self._info.scored):
            raise RuntimeError(
                f"expected a step of kind {kind!r} from {self.name}, got one with path samples: {self._sampled[-1]}, with a score update: "
                f"{self._info.scored}; its schedule of {self.case.total_steps} steps is over: take fewer rounds"
            )

    def score_state(self) -> Iterable[Tensor]:
        scores, bank = self.controller.importance, self.controller.bank
        yield from (scores.mean, scores.deviation, scores.terms)
        if bank.context.accumulators:
            yield bank.path

    def adapted(self) -> Iterator[Adapted]:
        yield from _adapted(self.model)

    def sample(self, batch: Batch) -> Sampled | None:
        passes = self.controller.passes
        if not passes.quadrature.samples_path:
            return None
        drawn = copy.deepcopy(passes.quadrature)
        self.backward(batch)
        size = len(batch["input_ids"])
        rows = drawn.rows_of(size)
        sample = drawn.sample(len(rows))
        points = []
        for alphas, factors in zip(sample.alphas, sample.factors, strict=True):
            for row, alpha, factor in zip(rows, alphas, factors, strict=True):
                forward, gradient = path_factors(alpha, self.config.path)
                points.append((row, forward, factor * gradient / (drawn.per_window * len(rows))))
        if sample.endpoint:
            points += [(row, 1.0, sample.endpoint / (drawn.per_window * size)) for row in range(size)]
        accumulators = self.controller.bank.context.accumulators
        layers = [m for m in self.model.modules() if isinstance(m, igulora.FusedSVDLinear)]
        return Sampled(points, [dict(zip("PEQ", accumulators[layer.slot], strict=True)) for layer in layers])

    def live(self) -> int | None:
        return sum(self.controller.live_ranks().values())


class Instantaneous(Igulora):
    """Ours without path rows, scoring at every step."""

    name = "instantaneous"
    title = "igulora, no path rows (`instantaneous`), scores every step"
    options: ClassVar[dict[str, object]] = {"estimator": "instantaneous", "window": 1}


class FlexLora(Instantaneous):
    """FlexLoRA: triplets move between matrices by their spectra."""

    name = "flexlora"
    title = "igulora, FlexLoRA"
    options: ClassVar[dict[str, object]] = {"method": "flexlora"}


class IguFlex(Igulora):
    """Triplets move between matrices by their path scores."""

    name = "igu-flex"
    title = "igulora, triplets moved by path scores, averaged over a scoring window"
    options: ClassVar[dict[str, object]] = {"method": "igu-flex"}


class Ralora(Method):
    """RaLoRA: fixed ranks in blocks, as many everywhere."""

    name = "ralora"
    title = "igulora, RaLoRA with 4 blocks"

    def __init__(self, model: nn.Module, case: Case) -> None:
        config = igulora.IGUConfig(method="ralora", blocks=4, r=case.rank, target_modules=case.target_modules)
        super().__init__(igulora.adapt(model, config), case)
        self._optimize(igulora.param_groups(self.model, lr=1e-4))

    def adapted(self) -> Iterator[Adapted]:
        yield from _adapted(self.model)


class Lean(Igulora):
    """Ours with the least memory: path passes of their own, inputs of adapted layers recomputed."""

    name = "lean"
    title = "igulora, default estimator, separate path passes, inputs recomputed"
    options: ClassVar[dict[str, object]] = {"path_pass": "separate", "recompute_inputs": True}


class OnPath(Igulora):
    """Ours with the release's estimator: the training pass itself runs at a random point of the path."""

    name = "on-path"
    title = "igulora, `on-path`, scores every step"
    options: ClassVar[dict[str, object]] = {"estimator": "on-path", "window": 1}


class AsAdaLora(Igulora):
    """Ours in its AdaLoRA setting."""

    name = "adalora"
    title = 'igulora, `method="adalora"`'
    options: ClassVar[dict[str, object]] = {"method": "adalora"}
