"""Sentences with mean human ratings from -4 to 4, from the source archive of a package that pip downloads."""

from __future__ import annotations

import io
import os
import random
import tarfile
import zipfile
from pathlib import Path

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


def sentences(source: str = "movie") -> list[tuple[str, float]]:
    """Every sentence of movie reviews, product reviews or tweets with its mean rating, in the archive's order."""
    with zipfile.ZipFile(archive()) as package:
        inner = io.BytesIO(package.read(_INSIDE))
    with tarfile.open(fileobj=inner) as data:
        member = data.extractfile(_FILES[source])
        assert member is not None
        lines = member.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    return [(text.strip(), float(rating)) for _, rating, text in rows]


def examples(task: str, held_out: int, source: str = "movie", seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples in a fixed order: "polarity" (sign of the rating, neutral ones left out) or "rating"."""
    rows = sentences(source)
    random.Random(seed).shuffle(rows)
    if task == "polarity":
        found = [Example(text, "positive" if rating > 0 else "negative") for text, rating in rows if abs(rating) > 0.5]
    else:
        found = [Example(text, rating) for text, rating in rows]
    return found[held_out:], found[:held_out]
