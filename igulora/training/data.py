"""Reading training data: csv, jsonl and parquet files or hub data sets, mapped onto texts and targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import nearest
from .extras import require

_READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
_USUAL_TEXT = {
    "causal-lm": ("prompt", "instruction", "question", "input"),
    "classification": ("text", "sentence", "content", "sentence1"),
    "regression": ("text", "sentence", "content", "sentence1"),
}
_USUAL_TARGET = {
    "causal-lm": ("response", "completion", "output", "answer"),
    "classification": ("label", "labels", "class", "category"),
    "regression": ("label", "score", "rating", "target"),
}


@dataclass(frozen=True)
class DataSource:
    """Where rows come from: a file, or a data set's name on the hub with its subset and split."""

    name: str
    subset: str | None = None
    split: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the name is meant as a file: it exists, or ends like one of the formats read here."""
        path = Path(self.name)
        return path.exists() or path.suffix.lower() in _READERS or len(path.parts) > 2


@dataclass(frozen=True)
class Example:
    """One row: a text (and perhaps a second one of a pair) and what is to be learned from it.

    ``target`` is the response (causal-lm), the class name (classification) or the number (regression).
    """

    text: str
    target: str | float
    pair: str | None = None


def load_table(source: DataSource) -> Any:
    """All rows of ``source`` as a ``pyarrow.Table``.

    Raises:
        ValueError: the file is missing, of an unknown format, unreadable or empty, or the hub has no such data set.
        MissingExtra: pyarrow, or ``datasets`` for a hub data set, is not installed.
    """
    table = _read_file(Path(source.name)) if source.is_file else _read_hub(source)
    if table.num_rows == 0:
        raise ValueError(f"expected at least one row of data in {source.name}, got an empty file or split")
    return table


def _read_file(path: Path) -> Any:
    pa = require("pyarrow", "demo", "reading data files")
    kind = _READERS.get(path.suffix.lower())
    if not path.exists():
        raise ValueError(
            f"expected a data file, found nothing at {path}; check the path (it is relative to {Path.cwd()})"
        )
    if not path.is_file() or kind is None:
        raise ValueError(f"expected a file ending in {', '.join(_READERS)}; got {path}")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"expected at least one row of data in {path}, got an empty file")
    try:
        if kind == "parquet":
            return require("pyarrow.parquet", "demo", "reading parquet").read_table(path)
        if kind == "csv":
            csv = require("pyarrow.csv", "demo", "reading csv")
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
            # An empty cell is a missing value, not a text or a class of its own.
            convert = csv.ConvertOptions(strings_can_be_null=True)
            return csv.read_csv(path, parse_options=parse, convert_options=convert)
        json = require("pyarrow.json", "demo", "reading jsonl")
        # One block: a row must not be cut, and the columns' types are inferred from the first block only.
        return json.read_json(path, read_options=json.ReadOptions(block_size=min(size + 1, 2**31 - 1)))
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        what = "one JSON object per line" if kind == "json" else f"a readable {kind} file"
        raise ValueError(f"expected {what} in {path}, got: {str(error).splitlines()[0]}") from error


def _read_hub(source: DataSource) -> Any:
    datasets = require("datasets", "hf", f"the hub data set {source.name!r}")
    split = source.split or "train"
    try:
        rows = datasets.load_dataset(source.name, source.subset, split=split)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"expected a data file or a hub data set with the split {split!r}, got {source.name!r}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    table = rows.with_format("arrow")[:]
    pa = require("pyarrow", "demo", "reading hub data sets")
    for index, (name, feature) in enumerate(rows.features.items()):
        if hasattr(feature, "int2str"):  # a ClassLabel: its names say more than its numbers
            names = [None if v is None or v < 0 else feature.int2str(v) for v in table.column(name).to_pylist()]
            table = table.set_column(index, name, pa.array(names, pa.string()))
    return table


def read_examples(
    table: Any, task: str, source: str, text_columns: Sequence[str] = (), target_column: str | None = None
) -> list[Example]:
    """Texts and targets of a table for ``task``; several text columns are joined (causal-lm) or make a pair (the others).

    Columns left out are looked for under their usual names ("text", "label", "prompt", "response", ...).

    Raises:
        ValueError: a column is missing (lists those there are), holds nulls, or its type does not fit the task.
    """
    names = table.column_names
    texts = [_find_column(name, names, source) for name in text_columns] or [
        _usual_column(_USUAL_TEXT[task], names, source, "--prompt-column" if task == "causal-lm" else "--text-column")
    ]
    target = (
        _find_column(target_column, names, source)
        if target_column
        else _usual_column(
            _USUAL_TARGET[task], names, source, "--response-column" if task == "causal-lm" else "--label-column"
        )
    )
    if task != "causal-lm" and len(texts) > 2:
        raise ValueError(f"expected one or two text columns for task {task}, got {len(texts)}: {', '.join(texts)}")
    columns = [_texts(table, name, source) for name in texts]
    targets = _targets(table, target, task, source)
    if task == "causal-lm":
        return [Example("\n\n".join(parts), value) for *parts, value in zip(*columns, targets, strict=True)]
    pairs: Iterable[str | None] = columns[1] if len(columns) == 2 else [None] * len(targets)
    return [Example(text, value, pair) for text, pair, value in zip(columns[0], pairs, targets, strict=True)]


def _find_column(name: str, names: Sequence[str], source: str) -> str:
    if name not in names:
        raise ValueError(
            f"expected a column {name!r} in {source}; its columns are {', '.join(names)}.{nearest(name, names)}"
        )
    return name


def _usual_column(usual: Sequence[str], names: Sequence[str], source: str, option: str) -> str:
    for name in usual:
        if name in names:
            return name
    raise ValueError(
        f"expected a column called {' or '.join(repr(u) for u in usual)} in {source}; its columns are {', '.join(names)}. "
        f"Name the right one with {option}"
    )


def _texts(table: Any, name: str, source: str) -> list[str]:
    pa = require("pyarrow", "demo", "reading data")
    kind = table.schema.field(name).type
    scalar = (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
    )
    if not (scalar or pa.types.is_boolean(kind) or pa.types.is_null(kind) or pa.types.is_temporal(kind)):
        raise ValueError(f"expected text in the column {name!r} of {source}, got {kind}; map a column of plain strings")
    return [str(value) for value in _values(table, name, source)]


def _targets(table: Any, name: str, task: str, source: str) -> list[Any]:
    pa = require("pyarrow", "demo", "reading data")
    kind = table.schema.field(name).type
    if task == "causal-lm":
        return _texts(table, name, source)
    values = _values(table, name, source)
    if task == "classification":
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            raise ValueError(
                f"expected class names or integers in the column {name!r} of {source} for task classification, got {kind} "
                f"(such as {values[0]!r}); numbers on a scale are --task regression"
            )
        return _texts(table, name, source)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise ValueError(
            f"expected numbers in the column {name!r} of {source} for task regression, got {kind} (such as {values[0]!r}); "
            "class names are --task classification"
        )
    numbers = [float(value) for value in values]
    bad = next((i for i, value in enumerate(numbers) if not math.isfinite(value)), None)
    if bad is not None:
        raise ValueError(
            f"expected finite numbers in the column {name!r} of {source}, got {numbers[bad]} in row {bad + 1}"
        )
    return numbers


def _values(table: Any, name: str, source: str) -> list[Any]:
    values = table.column(name).to_pylist()
    bad = next((i for i, value in enumerate(values) if value is None), None)
    if bad is not None:
        count = sum(value is None for value in values)
        raise ValueError(
            f"expected a value in every row of the column {name!r} of {source}, got {count} without one (first: row {bad + 1}); "
            "fill or drop them"
        )
    return values


def class_names(train: Sequence[Example], evaluation: Sequence[Example]) -> list[str]:
    """The classes of the training rows, integers in numeric order and names in alphabetical order.

    Raises:
        ValueError: there are fewer than two, or the evaluation rows hold one that the training rows lack.
    """
    found = {str(example.target) for example in train}
    if len(found) < 2:
        raise ValueError(
            f"expected at least two classes in the training data, got {len(found)}: {', '.join(sorted(found))}"
        )
    unseen = sorted({str(example.target) for example in evaluation} - found)
    if unseen:
        raise ValueError(
            f"expected only classes of the training data in the evaluation data, got {', '.join(map(repr, unseen[:5]))} as well; "
            f"the training data has {', '.join(map(repr, sorted(found)[:20]))}"
        )
    integers = all(name.lstrip("-").isdigit() for name in found)
    return sorted(found, key=int) if integers else sorted(found)


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split rows at random into training and held-out rows, the same ones for the same seed.

    Raises:
        ValueError: the fraction is not in (0, 1), or there are fewer than two rows.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"expected the held-out fraction in (0, 1), got {fraction}")
    if len(examples) < 2:
        raise ValueError(
            f"expected at least 2 rows to hold some out for evaluation, got {len(examples)}; give --eval a file"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(examples) - 1, max(1, round(fraction * len(examples))))
    return [examples[i] for i in order[count:]], [examples[i] for i in order[:count]]


class BatchStream:
    """Rows of every micro-batch of a run, each epoch in a seeded order of its own.

    ``stream[k]`` depends on nothing but ``k``, so resuming needs no more than the position. The last micro-batch of an epoch may
    be smaller.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.per_epoch = math.ceil(size / batch_size)
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, position: int) -> list[int]:
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.size, generator=generator).tolist()
            self._epoch = epoch
        return self._order[index * self.batch_size : (index + 1) * self.batch_size]
