"""What a study's file may say, and which runs follow from it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from igulora.benchmarks.study.configuring import recipe
from igulora.benchmarks.study.plan import VARIES, Budget, Run, Study, Training
from igulora.benchmarks.study.reading import read_study

from .small import FILE


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


def test_what_a_seed_draws(file: Path) -> None:
    file.write_text(FILE.replace("[[4, 2]]", "[[4, 2], [8, 4]]"))
    study = read_study(file)
    seeds = {(run.budget.r, run.seed) for run in study.possible().values()}
    assert seeds == {(4, 0), (4, 1), (4, 2), (4, 3), (8, 100), (8, 101), (8, 102), (8, 103)}
    run = Run("polarity", "igu", Budget(4, 2), 1e-3, 3)
    drawn = {varies: recipe(run, study.methods["igu"], Training(varies=varies)).seed for varies in VARIES}
    assert drawn == {"everything": 3, "order": 0, "start": 3}
