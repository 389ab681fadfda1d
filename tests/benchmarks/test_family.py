"""The family's study runs from end to end on a tiny encoder, its page shows what a record holds, and reviews are read from the archive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from igulora.benchmarks import family, reviews  # noqa: E402


def test_reviews_are_read_and_split(archive: Path) -> None:
    rows = reviews.sentences()
    assert len(rows) == 81
    assert rows[0] == ("0", "the film is good good good", 3.0)
    train, held_out = reviews.examples("polarity", 20)
    assert (len(train), len(held_out)) == (60, 20)
    assert {example.target for example in train} == {"positive", "negative"}
    assert [e.text for e in reviews.examples("polarity", 20)[0]] == [e.text for e in train]
    assert len(reviews.examples("rating", 20)[0]) == 61


def test_no_sentence_and_no_review_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        reviews.Sentence(str(i // 7), f"sentence {i // 2 if i % 5 == 0 else i} says", 1.0 + i / 1000)
        for i in range(210)
    ]
    rows += [reviews.Sentence(str(100 + i), f"Sentence: {i}, says!", 2.0 + i / 1000) for i in range(20)]
    monkeypatch.setattr(reviews, "sentences", lambda source: list(rows))
    train, held_out = reviews.examples("rating", 60, "product")
    assert len(held_out) == 60
    assert len(train) > 60
    review = {row.rating: row.review for row in rows}
    assert not {review[float(e.target)] for e in train} & {review[float(e.target)] for e in held_out}
    words = ["".join(filter(str.isalnum, e.text.lower())) for e in train + held_out]
    assert len(set(words)) == len(words)


def test_without_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IGULORA_REVIEWS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"pip download --no-deps --no-binary :all: vaderSentiment==0.5 --dest"):
        reviews.sentences()


def test_methods_train_side_by_side(archive: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "minilm_folder", lambda: encoder)
    torch.manual_seed(0)
    plan = family.Plan(r=4, target_rank=2, rows=4, length=12, steps=32, held_out=16, lr=2e-2, window=2)
    methods = ["igu", "flexlora", "ralora-pro", "peft-adalora"]
    said: list[str] = []
    result = family.run("polarity", plan, methods, said.append)
    assert said[-1] == "polarity: step 32/32"
    assert result["after"].keys() == set(methods)
    assert all(len(series) == 16 for series in result["seconds"].values())
    assert result["over_igu"].keys() == {*methods} - {"igu"}
    losses = {name: metrics["loss"] for name, metrics in result["after"].items()}
    assert min(losses.values()) < 0.9 * result["before"]["loss"], (result["before"], losses)


def test_the_kept_page_shows_the_kept_record() -> None:
    records = sorted(family.FOLDER.glob("*.json"))
    assert records
    record: dict[str, Any] = json.loads(records[-1].read_text(encoding="utf-8"))
    assert (family.FOLDER / "README.md").read_text(encoding="utf-8") == family.page(record)
    for result in record["tasks"].values():
        metric = result["metric"]
        assert all(found[metric] > result["before"][metric] + 0.15 for found in result["after"].values())
