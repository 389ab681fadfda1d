"""What studies learn from: rows and their order, and answers that are exactly right."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

from igulora.benchmarks.study import models
from igulora.benchmarks.study.models import ExactAnswers
from igulora.benchmarks.study.plan import TaskSpec, Training
from igulora.benchmarks.study.tasks import Prepared
from igulora.training.data import Example

from ...training.conftest import make_llama, make_tokenizer


@pytest.fixture
def prepared(archive: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.setattr(models, "minilm_folder", lambda: encoder)
    task = Prepared(TaskSpec("polarity", "movie-polarity", train=50, validation=10, test=20, length=12))
    for number, row in enumerate(task.train):
        row["input_ids"] = row["input_ids"][:2] + [5] * (number % 4)
        row["attention_mask"] = [1] * len(row["input_ids"])
        row["token_type_ids"] = [0] * len(row["input_ids"])
        row["labels"] = number
    return task


@pytest.mark.parametrize("stretch", [1, 3])
def test_every_row_once_an_epoch(prepared: Prepared, stretch: int) -> None:
    batches = prepared.batches(Training(steps=26, rows=4, stretch=stretch), seed=3)
    assert len(batches) == 26
    epochs = [torch.cat([batch["labels"] for batch in part]) for part in (batches[:13], batches[13:])]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(50))
    assert epochs[0].tolist() != epochs[1].tolist()
    again = prepared.batches(Training(steps=26, rows=4, stretch=stretch), seed=3)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(batches, again, strict=True))
    other = prepared.batches(Training(steps=26, rows=4, stretch=stretch), seed=4)
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(batches, other, strict=True))


def test_rows_of_one_length_share_a_batch(prepared: Prepared) -> None:
    def padded(stretch: int) -> int:
        return sum(
            int((batch["attention_mask"] == 0).sum())
            for batch in prepared.batches(Training(steps=13, rows=4, stretch=stretch), 0)
        )

    assert 0 < padded(12) < padded(1) / 3


def test_the_frozen_models_dropout_and_dtype(prepared: Prepared) -> None:
    model, heads = prepared.model(Training(dropout=0.25), 0)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
    assert {p.dtype for name, p in model.named_parameters() if name.split(".")[0] not in heads} == {torch.bfloat16}
    assert {model.get_submodule(head).weight.dtype for head in heads} == {torch.float32}
    loss = prepared.loss(model, prepared.task.collate([dict(row, labels=0) for row in prepared.train[:3]]))
    loss.backward()
    assert model.get_submodule(heads[0]).weight.grad.dtype == torch.float32
    other = prepared.model(Training(), 1)[0].get_submodule(heads[0]).weight
    assert not torch.equal(other, model.get_submodule(heads[0]).weight)


def test_more_rows_than_there_are(archive: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "minilm_folder", lambda: encoder)
    with pytest.raises(
        ValueError, match=r"expected 70 training rows and 30 held out for movie-polarity, there are 50\s+and 30; lower"
    ):
        Prepared(TaskSpec("polarity", "movie-polarity", train=70, validation=10, test=20))


def test_exact_answers_are_what_the_model_would_say() -> None:
    model, tokenizer = make_llama().eval(), make_tokenizer()
    asked = ["what colour is the sky", "red", "is grass a film", "very good film"]

    def said(prompt: str) -> list[int]:
        ids = task.encode([Example(prompt, "red")])[0]["prompt"]
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=-1
            )
        return out[0, len(ids) :].tolist()

    task = ExactAnswers(tokenizer, model, 64, None, ())
    rows = task.encode([Example(prompt, "red green blue") for prompt in asked])
    for row, prompt in zip(rows, asked, strict=True):
        answer = said(prompt)
        row["input_ids"], row["response"] = row["prompt"] + answer, answer
    assert task.evaluate(model, rows, 2, torch.device("cpu"))["exact"] == 1.0
    for position in range(3):  # one token of one answer is another
        wrong = [dict(row, response=list(row["response"])) for row in rows]
        wrong[1]["response"][position] = (wrong[1]["response"][position] + 1) % 20 + 1
        wrong[1]["input_ids"] = wrong[1]["prompt"] + wrong[1]["response"]
        assert task.evaluate(model, wrong, 2, torch.device("cpu"))["exact"] == 0.75
