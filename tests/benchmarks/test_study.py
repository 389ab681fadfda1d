"""A study: what its file may say, which runs follow, that it goes on where it was stopped, and what its page claims."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from igulora.benchmarks.study import conduct as conducting
from igulora.benchmarks.study import models
from igulora.benchmarks.study.book import Book
from igulora.benchmarks.study.comparing import comparisons, difference, found_by_method
from igulora.benchmarks.study.conduct import again, conduct, picked, row
from igulora.benchmarks.study.configuring import recipe
from igulora.benchmarks.study.intervals import Difference, Spread, bootstrap, surely_different
from igulora.benchmarks.study.page import page
from igulora.benchmarks.study.plan import VARIES, Budget, Run, Study, Training
from igulora.benchmarks.study.reading import read_study
from igulora.benchmarks.study.summaries import summary
from igulora.benchmarks.study.training import factor
from igulora.cli.main import main
from igulora.config import METHODS

FILE = """
name = "small"
seeds = [0, 1, 2, 3]
learning_rates = [1e-3, 4e-3]
budgets = [[4, 2]]
[training]
steps = 30
rows = 4
window = 2
[tasks.polarity]
data = "movie-polarity"
train = 40
validation = 12
test = 12
length = 12
[methods.igu]
[methods.fixed]
method = "lora"
[methods.peft-lora]
library = "peft"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
def study(file: Path) -> Study:
    return read_study(file)


class Pretended:
    """Stands for training: known metrics, and a stop after so many runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, better: dict[str, float]) -> None:
        self.better, self.runs, self.most = better, [], 10**6
        monkeypatch.setattr(conducting, "train", self)
        monkeypatch.setattr(conducting, "_prepared", lambda task: None)

    def __call__(self, run: Run, *_: Any) -> dict[str, Any]:
        if len(self.runs) == self.most:
            raise KeyboardInterrupt
        self.runs.append(run.key)
        reached = self.better[run.method] + 0.01 * run.seed - abs(run.learning_rate - 4e-3)
        reached += 0.002 * (len(run.method) * (run.seed + 1) % 4)  # so that differences spread
        return {
            "metric": "accuracy", "validation": {"accuracy": reached, "loss": 1.0}, "test": {"accuracy": reached - 0.1, "loss": 1.0},
            "seconds": 3.0, "seconds_in_all": 4.0, "trained_at_start": 20, "trained_at_end": 10,
        }  # fmt: skip


def test_a_file_and_its_runs(study: Study) -> None:
    assert study.methods["igu"].method == "igu"
    assert (study.methods["peft-lora"].library, study.methods["peft-lora"].method) == ("peft", "lora")
    assert study.budgets == (Budget(4, 2),)
    assert study.count == 3 * (2 + 3)
    keys = [run.key for group in study.groups() for run in study.searches(*group)]
    assert keys[0] == "polarity/igu/4-2/lr0.001/seed0"
    assert len(set(keys)) == 6


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds = [0, 1, 2, 3]", "seeds = []", "expected a list of seeds"),
        ("seeds = [0, 1, 2, 3]", "seeds = [0, 0]", r"expected seeds in .* to differ, got \[0, 0\]"),
        ("seeds = [0, 1, 2, 3]", "seeds = [0.5]", "expected seeds in .* to be of at least 0, got 0.5"),
        ("steps = 30", 'steps = 30\nvaries = "ordre"', r"expected varies of \[methods.igu\] .* Did you mean 'order'"),
        ("seeds = [0, 1, 2, 3]", "seeds = [0]", r"expected at least 2 seeds in .* first of which picks .*, got \[0\]"),
        ("[1e-3, 4e-3]", "[0, 4e-3]", r"expected learning_rates above 0 in .*, got \[0.0, 0.004\]"),
        (
            "[methods.igu]",
            '[methods.igu]\nagainst = ["fixd"]',
            r"expected against of \[methods.igu\] .* Did you mean 'fixed'",
        ),
        (
            "[methods.igu]",
            "[methods.igu]\ntraining = { remove = 13 }",
            r"expected remove of at most 12 for \[methods.igu\]",
        ),
        (
            "steps = 30",
            'steps = 30\nbudget_unit = "ranks"',
            r"expected budget_unit of \[methods.igu\] .* Did you mean 'rank'",
        ),
        ("seeds = [0, 1, 2, 3]", "seed = [0]", "expected entries of .* got 'seed'. Did you mean 'seeds'"),
        ("[[4, 2]]", "[[2, 4]]", r"expected budgets in .* as \[r, target\] with 1 <= target <= r, got \[2, 4\]"),
        ("seeds = [0, 1, 2, 3]", "seeds = [0]\ntolerance = -0.1", "expected tolerance in .* at least 0, got -0.1"),
        ("steps = 30", "steps = -1", r"expected steps in \[training\] to be a number >= 0"),
        ("steps = 30", "step = 30", r"expected entries of \[training\] among .* Did you mean 'steps'"),
        ('data = "movie-polarity"', "", r"expected data in \[tasks.polarity\], got none"),
        (
            'data = "movie-polarity"',
            'data = "movies"',
            r"expected data of \[tasks.polarity\] to be one of movie-polarity",
        ),
        (
            'method = "lora"',
            'method = "lore"',
            r"expected method of \[methods.fixed\] to be one of .* Did you mean 'lora'",
        ),
        ("[methods.igu]", "[methods.other]", r"expected method of \[methods.other\] to be one of"),
        (
            'library = "peft"',
            'library = "pfet"',
            r"expected library of \[methods.peft-lora\] to be one of igulora, peft",
        ),
        ("[methods.igu]", "[methods.igu", "expected a study in TOML"),
        (
            "[training]",
            "pick_at = [8, 4]\n[training]",
            r"expected pick_at in .* to be one of its budgets, got \[8, 4\]",
        ),
        ("[training]", 'judged_by = "tests"\n[training]', "expected judged_by in .* Did you mean 'test'"),
        ("[training]", 'against = ["fix"]\n[training]', "expected against in .* Did you mean 'fixed'"),
        ("[training]", 'maps = "fixed"\n[training]', "expected maps in .* to be a list of methods, got 'fixed'"),
        (
            "[methods.igu]",
            '[methods.igu]\nrate_of = "fixd"',
            r"expected rate_of of \[methods.igu\] .* Did you mean 'fixed'",
        ),
        (
            "[methods.igu]",
            '[methods.igu]\nrate_of = "igu"',
            r"expected rate_of of \[methods.igu\] to name a method with",
        ),
        (
            "[methods.igu]",
            "[methods.igu]\ntraining = { row = 4 }",
            r"entries of training of \[methods.igu\] .* Did you mean 'rows'",
        ),
    ],
)
def test_files_that_do_not_fit(file: Path, old: str, new: str, words: str) -> None:
    assert old in FILE
    file.write_text(FILE.replace(old, new, 1))
    with pytest.raises(ValueError, match=words):
        read_study(file)


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


def test_records_of_other_settings_or_damaged_ones(
    study: Study, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    path = tmp_path / "records.jsonl"
    conduct(study, Book(path), lambda _: None)
    file.write_text(FILE.replace("rows = 4", "rows = 8"))
    with pytest.raises(ValueError, match=r"expected polarity/igu/4-2/lr0.001/seed0 in .* got others for training"):
        conduct(read_study(file), Book(path), lambda _: None)
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(ValueError, match="expected a JSON object with a key in line 1"):
        Book(path)


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


def test_a_default_that_changed_is_another_method(
    study: Study, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    path = tmp_path / "records.jsonl"
    conduct(study, Book(path), lambda _: None)
    monkeypatch.setitem(METHODS["igu"], "combine", "mean")
    with pytest.raises(ValueError, match="expected polarity/igu/4-2/lr0.001/seed0 in .* got others for config"):
        page(study, Book(path))
    file.write_text(FILE.replace("[methods.igu]", '[methods.igu]\ncombine = "snr"'))
    assert "9 of 9 runs" in page(read_study(file), Book(path))  # what it was, spelt out


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("peft-lora", 'library = "peft"', 'library = "peft"\nuse_rslora = true'),
        ("igu", "[methods.igu]", "[methods.igu]\noptimizer = { p_lr_ratio = 4 }"),
        ("igu", "[methods.igu]", "[methods.igu]\nrank_pattern = { query = 3 }"),
    ],
)
def test_an_option_more_is_another_method(
    study: Study, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, old: str, new: str
) -> None:
    Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    path = tmp_path / "records.jsonl"
    conduct(study, Book(path), lambda _: None)
    file.write_text(FILE.replace(old, new))
    with pytest.raises(ValueError, match=f"expected polarity/{key}/4-2/lr0.001/seed0 in .* got others for config"):
        page(read_study(file), Book(path))


def test_a_field_that_came_later_changes_nothing(
    study: Study, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pretended(monkeypatch, {"igu": 0.9, "fixed": 0.5, "peft-lora": 0.6})
    path = tmp_path / "records.jsonl"
    conduct(study, Book(path), lambda _: None)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for record in lines:
        del record["settings"]["training"]["varies"]
        record["settings"]["config"]["options"].pop("block_pattern", None)
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    assert "9 of 9 runs" in page(study, Book(path))
    file.write_text(FILE.replace("[training]", '[training]\nvaries = "order"'))  # not what they were
    with pytest.raises(ValueError, match=r"expected polarity/igu/4-2/lr0.001/seed0 in .* got others for training"):
        page(read_study(file), Book(path))


def test_one_process_writes(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with Book(path).writing(), pytest.raises(ValueError, match="expected no other study at work on"):
        conduct(study, Book(path), lambda _: None)
    path.write_text('{"key": "cut')
    assert Book(path).records == {}
    assert path.read_text() == '{"key": "cut'  # reading repairs nothing
    with Book(path).writing():
        assert path.read_text() == ""


def test_a_full_disk_leaves_the_records_as_they_were(study: Study, tmp_path: Path) -> None:
    class Full(io.FileIO):
        def write(self, line: Any) -> int:
            return super().write(line[:10])

    path = tmp_path / "records.jsonl"
    path.write_text('{"key": "another"}\n')
    book = Book(path)
    with book.writing(), Full(path, "a+b") as file:
        book._file = file
        with pytest.raises(OSError, match="expected room for"):
            book.add(study, study.searches("polarity", "igu", Budget(4, 2))[0], {})
    assert path.read_text() == '{"key": "another"}\n'


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


def test_intervals() -> None:
    clear = bootstrap([[0.1, 0.11, 0.12, 0.09, 0.1]])
    assert clear.clear
    assert clear.p < 0.01
    assert clear.mean == pytest.approx(0.104)
    assert clear.low < clear.mean < clear.high
    mixed = bootstrap([[0.5, -0.4, 0.4, -0.5, 0.1]])
    assert not mixed.clear
    assert mixed.p > 0.5
    assert not bootstrap([[1.0, 1.1, 0.9, 1.0]]).clear  # too few
    for alike in ([[0.2], [0.1, 0.1]], [[0.1] * 6]):  # of one value, or of equal ones, resamples tell nothing
        assert bootstrap(alike)[1:4] == (-math.inf, math.inf, 1.0)
    assert bootstrap([[0.0, 0.0]]) == (0.0, 0.0, 0.0, 1.0, 2)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_of_many_comparisons_what_is_said_is_surer() -> None:
    sure, unsure, none = (Difference(1.0, 0.5, 1.5, p, 5) for p in (0.01, 0.04, 0.2))
    assert surely_different([sure, none]) == [True, False]
    assert surely_different([none, sure, unsure]) == [False, True, False]
    assert surely_different([sure, unsure]) == [True, True]  # the second only needs what is left
    assert surely_different([sure] * 6) == [False] * 6
    assert surely_different([]) == []


def test_tasks_weigh_alike_and_are_resampled_apart() -> None:
    gap = bootstrap([[0.1, 0.1001] * 3, [0.3, 0.3001] * 2])
    assert (gap.mean, gap.pairs) == (pytest.approx(0.2, abs=1e-3), 10)
    assert gap.high - gap.low < 0.001  # what tasks differ in is no uncertainty


@pytest.mark.parametrize(
    ("sizes", "spreads"), [((5,), (1,)), ((15,), (1,)), ((4, 4), (1, 0.1)), ((5, 5, 5), (1, 0.3, 0.1))]
)
def test_how_often_equals_look_different(sizes: tuple[int, ...], spreads: tuple[float, ...]) -> None:
    generator = np.random.default_rng(0)
    strata = [
        [spread * generator.standard_normal(size) for size, spread in zip(sizes, spreads, strict=True)]
        for _ in range(300)
    ]
    found = [bootstrap(part) for part in strata]
    assert sum(gap.clear for gap in found) / len(found) <= 0.08  # 0.05 but for chance; percentiles: up to 0.2
    assert 0.4 < np.mean([gap.p for gap in found]) < 0.6


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


def test_what_a_seed_draws(file: Path) -> None:
    file.write_text(FILE.replace("[[4, 2]]", "[[4, 2], [8, 4]]"))
    study = read_study(file)
    seeds = {(run.budget.r, run.seed) for run in study.possible().values()}
    assert seeds == {(4, 0), (4, 1), (4, 2), (4, 3), (8, 100), (8, 101), (8, 102), (8, 103)}
    run = Run("polarity", "igu", Budget(4, 2), 1e-3, 3)
    drawn = {varies: recipe(run, study.methods["igu"], Training(varies=varies)).seed for varies in VARIES}
    assert drawn == {"everything": 3, "order": 0, "start": 3}


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1.0
    assert factors[-1] == pytest.approx(1 / 90)
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.slow
def test_a_whole_study(
    file: Path, archive: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(models, "minilm_folder", lambda: encoder)
    conducting._prepared.cache_clear()
    asked = FILE.replace("seeds = [0, 1, 2, 3]", 'seeds = [1]\nmaps = ["igu", "random"]\nagainst = ["fixed"]')
    asked = asked.replace("[1e-3, 4e-3]", "[2e-2]").replace("window = 2", "window = 2\nwatch = 2\nremove = 6")
    others = '[methods.random]\n[methods.igu-flex]\n[methods.ralora-pro]\n[methods.peft-adalora]\nlibrary = "peft"\n'
    file.write_text(asked + others)
    assert main(["study", str(file)]) == 0
    assert "7/7 polarity/peft-adalora/4-2/lr0.02/seed1: validation accuracy" in capsys.readouterr().out
    output = file.with_suffix("")
    records = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
    assert len(records) == 7
    assert all(0.0 <= record["test"]["accuracy"] <= 1.0 for record in records)
    assert {"date", "machine", "versions", "threads"} <= records[0].keys()
    written = (output / "README.md").read_text()
    igu, peft_lora = records[0], records[2]
    assert set(igu["removed"]) == {"", *igu["ranks"]}
    assert len(igu["series"]) == 2
    assert "removed" not in peft_lora
    assert igu["trained_at_end"] < igu["trained_at_start"]
    assert records[-1]["trained_at_end"] < records[-1]["trained_at_start"]  # PEFT's AdaLoRA
    assert set(igu["scores"]) == set(igu["ranks"])
    assert set(peft_lora["ranks"].values()) == {2}
    assert "## Matrices removed one at a time" in written
    for name in ("differences", "ranks-polarity", "series"):
        assert f"![{name}]({name}.png)" in written
        assert (output / f"{name}.png").stat().st_size > 0
    assert main(["study", str(file), "--render"]) == 0
    assert (output / "README.md").read_text() == written
    for record in (records[0], records[1], records[-1]):  # in a process of their own the model is made anew for each
        models._encoder.cache_clear()
        conducting._prepared.cache_clear()
        assert main(["study", str(file), "--again", record["key"]]) == 0
        assert f"{record['key']}, test: recorded {record['test']}, now {record['test']}" in capsys.readouterr().out
