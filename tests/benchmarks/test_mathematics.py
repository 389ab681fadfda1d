"""Generated questions: as many as asked for, none twice, the same each time, and right answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from igulora.benchmarks.generate_mathematics import KINDS
from igulora.benchmarks.mathematics import questions
from igulora.training.extras import MissingExtra


@pytest.fixture(scope="module")
def some() -> list:
    pytest.importorskip("mathematics_dataset")
    return questions(480)


def test_the_same_questions_each_time_and_none_twice(some: list) -> None:
    assert len({example.text for example in some}) == 480
    assert questions(24, seed=1) != some[:24]


def test_whatever_the_hashes_of_this_process(some: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    assert questions(240) == some[:240]


def test_answers_are_right(some: list) -> None:
    checked = 0
    for example in some:
        minutes = re.fullmatch(
            r"How many minutes are there between (\d+):(\d+) ([AP])M and (\d+):(\d+) ([AP])M\?", example.text
        )
        if minutes:
            h, m, a, hh, mm, aa = minutes.groups()
            then, now = ((int(x) % 12 + 12 * (z == "P")) * 60 + int(y) for x, y, z in ((h, m, a), (hh, mm, aa)))
            assert int(str(example.target)) == (now - then) % (24 * 60)
        elif re.fullmatch(r"[-+()\d ]+", example.text):
            assert int(str(example.target)) == eval(example.text)
        else:
            continue
        checked += 1
    assert checked >= 20


def test_every_kind_has_its_turn(some: list) -> None:
    assert len(KINDS) == 12
    words = ("minutes", "Solve", "round", "digit", "closest", "common", "order", "factor")
    assert all(any(word in example.text for example in some[:24]) for word in words)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mathematics_dataset.py").write_text("raise ImportError('no such package')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        MissingExtra, match=r"expected the package mathematics_dataset.*install it with: pip install --no-deps"
    ):
        questions(1)
