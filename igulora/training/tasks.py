"""What a run learns: how rows become tensors, the loss, and the metrics. Classification and regression live here.

A batch is a dict of tensors whose first dimension is the row; the controller may append rows to it. ``labels`` is always in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Example

Row = dict[str, Any]
Batch = dict[str, Tensor]


class Task(Protocol):
    """One kind of learning. ``metric`` names the entry of :meth:`evaluate` that says how good the model is."""

    metric: str
    higher_is_better: bool

    def encode(self, examples: Sequence[Example]) -> list[Row]:
        """Tokenise rows."""
        ...

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Pad rows into one batch on the CPU."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over the batch's labels, fp32, 0-dim."""
        ...

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, device: torch.device
    ) -> dict[str, float]:
        """Metrics over all of ``rows``."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; the former mode after it."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; copies from pinned memory overlap with what the device is doing."""
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def batches_by_length(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Batches of rows of similar length, so that evaluation pads little."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        yield [rows[i] for i in order[start : start + batch_size]]


def pad_token(tokenizer: Any) -> int:
    """The id to pad with; padding is masked, so any id serves where the tokenizer has none of its own."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


class SequenceTask:
    """Classification and regression on one text or a pair of texts; subclasses say what the head's output means."""

    metric: str
    higher_is_better = True
    label_dtype: torch.dtype

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def encode(self, examples: Sequence[Example]) -> list[Row]:
        """Tokenise texts, cut at ``max_length`` tokens, and encode their targets."""
        texts = [example.text for example in examples]
        pairs = (
            [example.pair or "" for example in examples]
            if any(example.pair is not None for example in examples)
            else None
        )
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length)
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
        return [
            {name: encoded[name][i] for name in names} | {"labels": self._label(example)}
            for i, example in enumerate(examples)
        ]

    def collate(self, rows: Sequence[Row]) -> Batch:
        """``input_ids``, ``attention_mask`` (B, T) and, where the model has them, ``token_type_ids``; ``labels`` (B,)."""
        length = max(len(row["input_ids"]) for row in rows)
        pads = {"input_ids": pad_token(self.tokenizer)}
        batch = {
            name: torch.tensor([row[name] + [pads.get(name, 0)] * (length - len(row[name])) for row in rows])
            for name in rows[0]
            if name != "labels"
        }
        batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=self.label_dtype)
        return batch

    def _label(self, example: Example) -> Any:
        raise NotImplementedError

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return model(**inputs).logits.float()

    def _predict(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        logits, labels = [], []
        with evaluating(model):
            for part in batches_by_length(rows, batch_size):
                batch = to_device(self.collate(part), device)
                logits.append(self._logits(model, batch))
                labels.append(batch["labels"])
        return torch.cat(logits), torch.cat(labels)


class Classification(SequenceTask):
    """One of ``classes`` for each text; accuracy."""

    metric = "accuracy"
    label_dtype = torch.long

    def __init__(self, tokenizer: Any, max_length: int, classes: Sequence[str]) -> None:
        super().__init__(tokenizer, max_length)
        self.classes = list(classes)
        self._index = {name: i for i, name in enumerate(self.classes)}

    def _label(self, example: Example) -> int:
        return self._index[str(example.target)]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy."""
        return F.cross_entropy(self._logits(model, batch), batch["labels"])

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, device: torch.device
    ) -> dict[str, float]:
        """``accuracy`` and ``loss``; a prediction that is not finite is wrong."""
        logits, labels = self._predict(model, rows, batch_size, device)
        accuracy = ((logits.argmax(-1) == labels) & logits.isfinite().all(-1)).float().mean()
        return {"accuracy": accuracy.item(), "loss": F.cross_entropy(logits, labels).item()}


class Regression(SequenceTask):
    """A number for each text; the mean of Pearson's and Spearman's correlation, as GLUE reports STS-B."""

    metric = "correlation"
    label_dtype = torch.float32

    def _label(self, example: Example) -> float:
        return float(example.target)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(self._logits(model, batch).squeeze(-1), batch["labels"])

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, device: torch.device
    ) -> dict[str, float]:
        """``correlation``, ``pearson``, ``spearman`` and ``loss``; predictions that are constant, or not all finite, correlate 0."""
        logits, labels = self._predict(model, rows, batch_size, device)
        values = logits.squeeze(-1)
        linear = ranked = 0.0
        if values.isfinite().all():
            linear, ranked = pearson(values, labels), pearson(average_ranks(values), average_ranks(labels))
        loss = F.mse_loss(values, labels).item()
        return {"correlation": 0.5 * (linear + ranked), "pearson": linear, "spearman": ranked, "loss": loss}


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors, computed in float64; 0 where one of them is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = (a.norm() * b.norm()).item()
    return (a @ b).item() / norm if norm > 0 else 0.0


def average_ranks(values: Tensor) -> Tensor:
    """Rank of each value, ties sharing the mean of their ranks (float64, from 0)."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts + 1) / 2.0).double()[inverse]
