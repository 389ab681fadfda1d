"""Runs of a study: in which order, in how many processes, which learning rate, and that it goes on where it was stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from igulora.benchmarks.study import conduct as conducting
from igulora.benchmarks.study.book import Book
from igulora.benchmarks.study.conduct import again, conduct, picked, row
from igulora.benchmarks.study.configuring import recipe
from igulora.benchmarks.study.page import page
from igulora.benchmarks.study.plan import Budget, Run, Study
from igulora.benchmarks.study.reading import read_study

from .small import FILE, Pretended


def test_rates_are_picked_on_validation_rows_and_seeds_follow(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended, said = Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6}), []
    book = Book(tmp_path / "records.jsonl")
    conduct(study, book, said.append)
    assert len(pretended.runs) == len(set(pretended.runs)) == study.count == len(said)
    assert picked(study, book, "accuracy", "polarity", "igu", Budget(4, 2)) == 4e-3
    assert pretended.runs[:5] == [
        f"polarity/igu/4-2/{end}" for end in ("lr0.001/seed0", *(f"lr0.004/seed{seed}" for seed in range(4)))
    ]
    assert [(progress.done, progress.count) for progress in said] == [(n + 1, 15) for n in range(15)]
    assert said[0].run.key == pretended.runs[0]
    conduct(study, book, said.append)
    assert len(pretended.runs) == study.count


def test_the_lowest_rate_that_is_nearly_as_good_is_picked(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})  # 0.003 less at 1e-3 than at 4e-3
    for tolerance, rate in ((0.0, 4e-3), (0.002, 4e-3), (0.004, 1e-3)):
        file.write_text(f"tolerance = {tolerance}\n{FILE}")
        study, book = read_study(file), Book(tmp_path / f"{tolerance}.jsonl")
        conduct(study, book, lambda _: None)
        assert picked(study, book, "accuracy", "polarity", "igu", Budget(4, 2)) == rate
        assert ("within 0.004 of the best" in page(study, book)) == (tolerance == 0.004)


def test_rates_are_picked_at_one_budget(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    asked = "budgets = [[2, 1], [4, 2]]\npick_at = [4, 2]"
    file.write_text(
        FILE.replace("budgets = [[4, 2]]", asked).replace('method = "lora"', 'method = "lora"\nrate_of = "igu"')
    )
    study, book = read_study(file), Book(tmp_path / "records.jsonl")
    conduct(study, book, lambda _: None)
    assert len(pretended.runs) == len(set(pretended.runs)) == study.count
    assert [key for key in pretended.runs if "/lr0.001/" in key] == [
        f"polarity/{name}/4-2/lr0.001/seed100" for name in ("igu", "peft-lora")
    ]
    assert [key for key in pretended.runs if "/fixed/" in key] == [
        f"polarity/fixed/{budget}/lr0.004/seed{seed}"
        for budget, first in (("4-2", 100), ("2-1", 0))
        for seed in range(first + 1, first + 4)
    ]


def test_a_borrowed_rate_needs_no_run_with_the_seed_that_picked_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    file.write_text(FILE.replace('method = "lora"', 'method = "lora"\nrate_of = "igu"'))
    study, book = read_study(file), Book(tmp_path / "records.jsonl")
    conduct(study, book, lambda _: None)
    assert len([key for key in pretended.runs if "/fixed/" in key]) == 3
    assert len(pretended.runs) == study.count == 2 * 5 + 3
    assert set(pretended.runs) <= study.possible().keys()


def test_methods_that_do_not_run_at_every_budget(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    file.write_text(
        FILE.replace("[[4, 2]]", "[[2, 1], [4, 2]]").replace("[methods.igu]", "[methods.igu]\nbudgets = [[4, 2]]")
    )
    study, book = read_study(file), Book(tmp_path / "records.jsonl")
    conduct(study, book, lambda _: None)
    assert len(pretended.runs) == study.count == 5 * 5
    assert {key.split("/")[2] for key in pretended.runs if "/igu/" in key} == {"4-2"}
    assert (
        page(study, book).count("| `igu` |") == 1 + 1 + 1
    )  # a table of values, one of differences, one of learning rates


def test_a_study_that_was_stopped_goes_on(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    path, pretended.most = tmp_path / "records.jsonl", 5
    with pytest.raises(KeyboardInterrupt):
        conduct(study, Book(path), lambda _: None)
    path.write_text(path.read_text() + '{"key": "polarity/fix')  # cut off in the middle of a line
    pretended.most = 10**6
    conduct(study, Book(path), lambda _: None)
    assert len(pretended.runs) == len(set(pretended.runs)) == study.count
    assert len(Book(path).records) == len(path.read_text().splitlines()) == study.count


def test_several_runs_at_a_time(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended, said = Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6}), []
    monkeypatch.setattr(conducting, "_workers", lambda jobs, threads: ThreadPoolExecutor(jobs))
    path = tmp_path / "records.jsonl"
    conduct(study, Book(path), said.append, jobs=3)
    assert len(pretended.runs) == len(set(pretended.runs)) == study.count == len(said)
    assert {record["jobs"] for record in Book(path).records.values()} == {3}
    assert "Runs at a time: 3." in page(study, Book(path))


@pytest.mark.slow
def test_runs_in_processes_of_their_own() -> None:
    with conducting._workers(2, 1) as executor:
        assert executor.submit(torch.get_num_threads).result() == 1
        assert executor.submit(os.getpid).result() != os.getpid()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_processes_end_with_a_study_that_was_killed() -> None:
    code = (
        "import os, time\n"
        "from igulora.benchmarks.study import conduct\n"
        "if __name__ == '__main__':\n"
        "    with conduct._workers(2, 1) as executor:\n"
        "        print(executor.submit(os.getpid).result(), flush=True)\n"
        "        time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(200):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail(f"expected process {worker} to end with the one that started it, it still ran after ten seconds")


def test_a_run_that_fails_is_named_and_others_are_kept(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    monkeypatch.setattr(conducting, "_workers", lambda jobs, threads: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(conducting, "Prepared", lambda spec: None)

    def train(run: Run, *rest: Any) -> dict[str, Any]:
        if run.learning_rate == 1e-3:
            time.sleep(0.2)
            raise ValueError("the loss is not a number")
        time.sleep(0.4)
        return pretended(run, *rest)

    monkeypatch.setattr(conducting, "train", train)
    path = tmp_path / "records.jsonl"
    with pytest.raises(
        ValueError, match="expected polarity/igu/4-2/lr0.001/seed0 to train, got ValueError: the loss is not a number"
    ):
        conduct(study, Book(path), lambda _: None, jobs=2)
    assert list(Book(path).records) == ["polarity/igu/4-2/lr0.004/seed0"]


def test_what_methods_differ_in(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = '[methods.igu-slow]\nmethod = "igu"\noptimizer = { lambda_lr_ratio = 3 }\ntraining = { rows = 8 }\n'
    file.write_text(FILE + others)
    study = read_study(file)
    assert (study.training_of("igu-slow").rows, study.training_of("igu").rows) == (8, 4)
    run = study.searches("polarity", "igu-slow", Budget(4, 2))[0]
    assert recipe(run, study.methods["igu-slow"], study.training).optimizer["lambda_lr_ratio"] == 3
    Pretended(monkeypatch, {"igu": 0.9, "igu-slow": 0.8, "fixed": 0.5, "peft-lora": 0.6})
    book = Book(tmp_path / "records.jsonl")
    conduct(study, book, lambda _: None)
    assert book.records[run.key]["settings"]["training"]["rows"] == 8


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("igu]\nprune = 'hart'", r"expected options of \[methods.igu\] that fit r 4 to 2: .* Did you mean 'hard'"),
        (
            "igu]\nprone = 'hard'",
            r"expected options of \[methods.igu\] that fit r 4 to 2: .*'prone'. Did you mean 'prune'",
        ),
        (
            "igu]\noptimizer = { lambda_ratio = 1 }",
            r"expected optimizer of \[methods.igu\] .* Did you mean 'lambda_lr_ratio'",
        ),
        (
            "peft-adalora]\nlibrary = 'peft'\nuse_roda = true",
            r"expected options of \[methods.peft-adalora\] that fit .*use_roda",
        ),
    ],
)
def test_options_are_checked_before_anything_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, words: str
) -> None:
    pytest.importorskip("peft")
    pretended = Pretended(monkeypatch, {})
    file.write_text(FILE[: FILE.index("[methods.igu]")] + "[methods.random]\n[methods." + method + "\n")
    with pytest.raises(ValueError, match=words):
        conduct(read_study(file), Book(tmp_path / "records.jsonl"), lambda _: None)
    assert pretended.runs == []


def test_a_row_is_run_again(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    book = Book(tmp_path / "records.jsonl")
    conduct(study, book, lambda _: None)
    key = "polarity/igu/4-2/lr0.004/seed2"
    [run] = row(study, book, key)
    pretended.better["igu"] = 0.95
    then, now = again(study, book, run)
    assert now["test"]["accuracy"] - then["test"]["accuracy"] == pytest.approx(0.05)
    assert [run.key for run in row(study, book, "polarity/igu/4-2")] == [key[:-1] + seed for seed in "123"]
    for wrong in ("polarity/igu/4-2/lr0.004/seed4", "polarity/igo/4-2"):
        with pytest.raises(ValueError, match=f"expected the key of a recorded run, .*, got '{wrong}'. Did you mean"):
            row(study, book, wrong)
