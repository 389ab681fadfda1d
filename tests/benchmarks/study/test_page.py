"""What the page and the summaries claim."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from igulora.benchmarks.study.book import Book
from igulora.benchmarks.study.comparing import comparisons, difference, found_by_method
from igulora.benchmarks.study.conduct import conduct
from igulora.benchmarks.study.page import page
from igulora.benchmarks.study.plan import Budget, Study
from igulora.benchmarks.study.reading import read_study
from igulora.benchmarks.study.summaries import summary

from .small import FILE, Pretended


def test_the_page_claims_what_is_clear(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.5})
    study, book = read_study(file), Book(tmp_path / "records.jsonl")
    assert "0 of 9 runs" in page(study, book)
    conduct(study, book, lambda _: None)
    assert "No difference is clear" in page(study, book)  # of three pairs
    file.write_text(FILE.replace("[0, 1, 2, 3]", "[0, 1, 2, 3, 4, 5, 6, 7, 8]"))
    study = read_study(file)
    conduct(study, book, lambda _: None)
    text = page(study, book)
    assert "24 of 24 runs" in text
    assert "| `igu` | 0.850 (0.828 to 0.864) | 0.814 | 8 | 0.004* | 20 | 10 | 3 |" in text
    assert "| `igu` | 0.850 |  | **+0.400 (+0.397 to +0.403)** | **+0.400" in text
    assert "| `igu` | polarity | 4 to 2 | 0.903 | 0.906 |" in text  # validation rows, by learning rate
    hours = 30 * 4.0 * torch.get_num_threads() / 3600
    assert f"30 trainings took {hours:.1f} hours of one core" in text
    assert "- `igu` is better than `fixed`: +0.400 over 8 pairs." in text
    assert "holds for all 3 together" in text
    assert "`fixed` is better" not in text
    assert "`peft-lora` is better" not in text


def test_the_seed_that_picks_a_rate_does_not_count(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    for judge in ("test", "validation"):
        file.write_text(FILE.replace("[training]", f'judged_by = "{judge}"\n[training]', 1))
        study, book = read_study(file), Book(tmp_path / f"{judge}.jsonl")
        conduct(study, book, lambda _: None)
        text = page(study, book)
        assert "9 of 9 runs that count, 3 seeds" in text
        median = 0.822 + 0.1 * (judge == "validation")  # of seeds 1 to 3
        assert f"| `igu` | {median:.3f} (" in text
    file.write_text(FILE.replace("[1e-3, 4e-3]", "[4e-3]"))
    study = read_study(file)
    assert study.judged_seeds == (0, 1, 2, 3)  # none picks anything
    assert study.count == 3 * 4


def test_runs_that_diverged_are_counted(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.5})
    book = Book(tmp_path / "records.jsonl")
    conduct(study, book, lambda _: None)
    book.records["polarity/igu/4-2/lr0.004/seed2"]["test"]["loss"] = math.nan
    assert "| 3, 1 diverged |" in page(study, book)


def test_methods_are_compared_with_whom_they_say(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.5})
    asked = FILE.replace("[training]", 'against = ["igu"]\n[training]', 1)
    file.write_text(asked.replace("[methods.fixed]", '[methods.fixed]\nagainst = ["peft-lora"]'))
    study, book = read_study(file), Book(tmp_path / "records.jsonl")
    conduct(study, book, lambda _: None)
    assert set(comparisons(study, found_by_method(study, book))) == {("fixed", "peft-lora"), ("peft-lora", "igu")}


def test_a_short_summary_says_what_holds_among_all(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.5})
    asked = FILE.replace("budgets = [[4, 2]]", 'budgets = [[4, 2], [8, 4]]\nagainst = ["fixed", "igu"]')
    asked = asked.replace("seeds = [0, 1, 2, 3]", "seeds = [0, 1, 2, 3, 4, 5, 6]")
    file.write_text(asked.replace("[methods.peft-lora]", "[methods.peft-lora]\nbudgets = [[8, 4]]"))
    study, book = read_study(file), Book(tmp_path / "records.jsonl")
    assert summary(study, book, "[page](page.md)") == "Nothing has run yet.\n"
    conduct(study, book, lambda _: None)
    whole, short = (summary(study, book, "[page](page.md)", short) for short in (False, True))
    for text in (whole, short):
        assert text.startswith(
            "accuracy of movie-polarity; triplets per matrix 4 to 2, 8 to 4; 6 seeds, test rows; [page](page.md).\n"
        )
        assert "- `igu` is better than `fixed`: " in text
        assert "holds for all 3 together" in text
    assert "| median | 4 to 2 | 8 to 4 | minus `fixed` | minus `igu` | parameters at the end |" in whole
    assert "| median | 4 to 2 | 8 to 4 | minus `fixed` | parameters at the end |" in short
    assert "| `peft-lora` |  | 1." in whole
    assert "peft-lora" not in short


def test_differences_are_of_runs_that_both_did(study: Study) -> None:
    def runs(gain: float, seeds: int) -> dict[tuple[str, Budget, int], Any]:
        return {
            ("polarity", budget, seed): {"metric": "accuracy", "test": {"accuracy": 0.5 + gain * (1 + seed) * budget.target}}
            for budget in (Budget(4, 2), Budget(8, 4)) for seed in range(seeds)
        }  # fmt: skip

    gap = difference(study, runs(0.02, 2), runs(0.01, 3))
    assert gap is not None
    assert gap.pairs == 4
    assert gap.mean == pytest.approx(0.045)  # of 0.02, 0.04 and 0.04, 0.08
    assert difference(study, runs(0.02, 2), {}) is None
