"""Sentences with mean human ratings from -4 to 4, from the source archive of a package that pip downloads."""

from __future__ import annotations

import io
import os
import random
import re
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from igulora.training.data import Example
from igulora.training.demo import cache_folder

_ARCHIVE, _INSIDE = "vaderSentiment-0.5.zip", "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_FILES = {
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "product": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweet": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
TASKS = ("polarity", "rating")


def archive() -> Path:
    """The package's source archive.

    Raises:
        FileNotFoundError: it is not there; says the command that fetches it.
    """
    folder = Path(os.environ.get("IGULORA_REVIEWS") or cache_folder())
    if not (folder / _ARCHIVE).is_file():
        raise FileNotFoundError(
            f"expected {_ARCHIVE} in {folder}, found none; fetch it with: pip download --no-deps --no-binary :all: vaderSentiment==0.5 "
            f"--dest {folder} (or name its folder in IGULORA_REVIEWS)"
        )
    return folder / _ARCHIVE


class Sentence(NamedTuple):
    """One sentence of a review, or a tweet, and the mean of what people rated it."""

    review: str
    text: str
    rating: float


def sentences(source: str = "movie") -> list[Sentence]:
    """Every sentence of movie reviews, product reviews or tweets, in the archive's order."""
    with zipfile.ZipFile(archive()) as package:
        inner = io.BytesIO(package.read(_INSIDE))
    with tarfile.open(fileobj=inner) as data:
        member = data.extractfile(_FILES[source])
        assert member is not None
        lines = member.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    return [Sentence(number.partition("_")[0], text.strip(), float(rating)) for number, rating, text in rows]


def examples(task: str, held_out: int, source: str = "movie", seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples in a fixed order: "polarity" (sign of the rating, neutral ones left out) or "rating".

    All sentences of one review are on one side, where the archive tells reviews apart: those of products it does, of movies it does not. Of
    sentences that are the same but for capitals and signs the first stays.
    """
    rows = sentences(source)
    random.Random(seed).shuffle(rows)
    first: dict[str, int] = {}
    for place, row in enumerate(rows):
        first.setdefault(row.review, place)
    rows.sort(key=lambda row: first[row.review])
    kept: dict[str, Sentence] = {}
    for row in rows:
        if task == "rating" or abs(row.rating) > 0.5:
            kept.setdefault(re.sub(r"\W+", " ", row.text.lower()).strip(), row)
    rows = list(kept.values())
    apart = {row.review for row in rows[:held_out]}
    train = [row for row in rows[held_out:] if row.review not in apart]
    return [_example(task, row) for row in train], [_example(task, row) for row in rows[:held_out]]


def _example(task: str, row: Sentence) -> Example:
    return Example(row.text, row.rating if task == "rating" else "positive" if row.rating > 0 else "negative")
