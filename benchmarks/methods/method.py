"""What a method is to the suite: it takes a copy of the frozen model and knows how to take one training step; and the floor."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from igulora.errors import check_choice

from ..cases import Case

Batch = dict[str, Tensor]


def missing(package: str, install: str) -> str | None:
    """Why a method that needs ``package`` cannot run here, with how to ``install`` it; None where the package is there."""
    return f"{package} is not installed; {install}" if importlib.util.find_spec(package) is None else None


@dataclass(frozen=True)
class Adapted:
    """One adapted layer in plain mathematics, which the method's own arithmetic is checked against.

    Attributes:
        name: of the linear layer in the base model.
        trained: its parameters by a name of the method's choice.
        weight: ``(W0, values of the trained parameters by name) -> W``, the (out, in) weight of the plain linear layer that the adapted
            one stands for.
    """

    name: str
    trained: dict[str, nn.Parameter]
    weight: Callable[[Tensor, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Sampled:
    """What one micro-batch added to the path accumulators.

    Attributes:
        points: of every path row its sequence in the batch, its alpha on the path from the base to the adapted weights, and the weight of
            its gradient. All sequences of the batch have equally many loss terms.
        accumulated: per layer of :meth:`Method.adapted` the accumulators by its parameters' names.
    """

    points: list[tuple[int, float, float]]
    accumulated: list[dict[str, Tensor]]


class Method:
    """One way to train. ``step`` is what is timed; its parts are separate so that their launches can be counted apart.

    Attributes:
        name: key of :data:`METHODS`.
        title: for tables.
        adaptive: whether it prunes, so that the check after the runs can ask for it.
        starts_as_base: whether a fresh adapter leaves the outputs as they are. Where it does not, :meth:`logits` switches it off.
        start_bound: what it may change them by, relative to the largest logit, in units of the dtype's rounding.
        check_dtype: of the tiny model on which its gradients are checked; 16 bits where its kernels know no others.
    """

    name: str
    title: str
    adaptive = False
    starts_as_base = True
    start_bound = 8
    check_dtype = torch.float32
    optimizer: torch.optim.Optimizer | None = None

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.case = case
        self.model = model

    @classmethod
    def available(cls) -> str | None:
        """None where the method can run, else why it cannot and how to install what it needs. Imports nothing."""
        return None

    def _optimize(self, params: object) -> None:
        self.optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def bare(self, batch: Batch) -> Tensor:
        """Forward and backward of the adapted model, without regulariser and path rows."""
        loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def backward(self, batch: Batch) -> Tensor:
        """Everything that produces the gradients of a step."""
        return self.bare(batch)

    def book(self) -> None:
        """Scores, schedule and masks."""

    def step(self, batch: Batch) -> Tensor:
        """One whole training step; returns the loss, detached."""
        loss = self.backward(batch)
        if self.optimizer is not None:
            self.optimizer.step()
        self.book()
        self.zero_grad()
        return loss

    def zero_grad(self) -> None:
        """Clear the gradients of a step."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def prepare(self, small: Batch) -> None:
        """Bring the schedule into its pruning phase, with cheap steps."""
        for _ in range(4):
            self.step(small)

    def kinds(self) -> dict[str, float]:
        """The kinds of step there are, with their share among all steps."""
        return {"step": 1.0}

    def seek(self, kind: str, small: Batch) -> None:
        """Take cheap steps until the next one is of ``kind``.

        Raises:
            ValueError: the method has no such kind.
        """
        check_choice("kind", kind, self.kinds())

    def dearest(self) -> str:
        """The kind of step that takes most memory."""
        return max(self.kinds(), key=lambda kind: ("path" in kind, "score" in kind or "mask" in kind))

    def check_kind(self, kind: str) -> None:
        """Raise RuntimeError unless the last step was of ``kind``."""

    def score_state(self) -> Iterable[Tensor]:
        """Tensors that are kept between steps for the scores and the path samples."""
        return ()

    def logits(self, batch: Batch) -> Tensor:
        """What the model says, for the check that a fresh adapter changes nothing."""
        with torch.no_grad():
            return self.model(input_ids=batch["input_ids"]).logits

    def adapted(self) -> Iterator[Adapted]:
        """Every adapted layer as plain mathematics; nothing where nothing is trained."""
        return iter(())

    def sample(self, batch: Batch) -> Sampled | None:
        """Forward and backward with path rows, from the start of a scoring window; None where the method has no path rows."""
        return None

    def trainable(self) -> int:
        """How many parameters are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def capacity(self) -> int | None:
        """How many triplets there were before any was pruned, or None where there is no such thing."""
        return self.case.rank * sum(1 for _ in self.adapted()) if self.adaptive else None

    def live(self) -> int | None:
        """How many triplets are live, or None where there is no such thing."""
        return None


class Floor(Method):
    """Forward and input gradient of the frozen model: what no adapter can do without."""

    name = "floor"
    title = "frozen model, forward + input gradient (floor)"

    def bare(self, batch: Batch) -> Tensor:
        embedded = self.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        loss = self.model(inputs_embeds=embedded, labels=batch["labels"]).loss
        loss.backward()
        return loss.detach()


class FloorTwice(Floor):
    """The floor's work done twice: a check of the clockwork, whose ratio to the floor must come out as 2."""

    name = "floor-twice"
    title = "the floor twice (a check: 2 by construction)"

    def bare(self, batch: Batch) -> Tensor:
        super().bare(batch)
        return super().bare(batch)
