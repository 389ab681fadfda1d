"""What the fidelity study's results come to: one line per setting, and the default estimator that a written rule picks from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

RULE = (
    "the cheapest setting whose top-b agreement with the exact integral is at least 0.95 at no more than 5 % extra time; "
    "else the one that agrees best at no more than 5 %"
)
WANTED, ALLOWED = 0.95, 0.05
DEFAULT_MEASURE = "snr"  # allocation ranks by the score
Record = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One setting of one record.

    Attributes:
        extra_sequences: forwarded and backwarded per training sequence; ``extra_time``: over steps without path rows, None if not timed.
        spread: half the interquartile range of ``extra_time``.
        top, spearman: per measure the mean over seeds (and windows); ``low``: the least top-b agreement among them.
        proposed: the library does not offer it.
        trains_apart: the training pass itself leaves alpha = 1, which costs quality: not a default.
    """

    key: str
    title: str
    every: int
    fraction: float
    aggregate: str
    extra_sequences: float
    extra_time: float | None
    spread: float | None
    seeds: int
    top: dict[str, float]
    low: dict[str, float]
    spearman: dict[str, float]
    proposed: bool
    trains_apart: bool

    @property
    def cost(self) -> float:
        """Extra time where it was measured, else extra sequences."""
        return self.extra_sequences if self.extra_time is None else self.extra_time


def measures_of(record: Record) -> list[str]:
    """Names of what was compared, the first being what the rule looks at."""
    entry = next(iter(record["settings"].values()))
    return list(next(iter(entry["seeds"].values())))


def lines(record: Record) -> list[Line]:
    """The settings of a record, in the order in which they ran."""
    over = record.get("time", {}).get("over_plain", {})
    found = []
    for key, entry in record["settings"].items():
        seeds = list(entry["seeds"].values())
        pooled = {
            name: {kind: [v for seed in seeds for v in seed[name][kind]] for kind in ("top", "spearman")}
            for name in measures_of(record)
        }
        ratio = over.get(entry["kind"])
        on_path = entry["estimator"].startswith("on-path")
        # On the path every pass does, scored or not; path rows run in the scored micro-batches only.
        share = 1.0 if on_path else entry["scored"]
        found.append(
            Line(
                key=key,
                title=entry["title"],
                every=entry["every"],
                fraction=entry["fraction"],
                aggregate=entry["aggregate"],
                extra_sequences=entry["extra_sequences"],
                extra_time=None if ratio is None else share * (ratio["median"] - 1),
                spread=None if ratio is None else share * (ratio["q3"] - ratio["q1"]) / 2,
                seeds=len(seeds),
                top={name: float(np.mean(p["top"])) for name, p in pooled.items()},
                low={name: float(np.min(p["top"])) for name, p in pooled.items()},
                spearman={name: float(np.mean(p["spearman"])) for name, p in pooled.items()},
                proposed=entry["control"],
                trains_apart=on_path,
            )
        )
    return found


@dataclass(frozen=True)
class Choice:
    """What the rule picks: the setting, its agreement and cost on the model where each is worst, and whether the aim is met."""

    key: str
    agreement: float
    cost: float
    reached: bool
    timed: bool


def choose(
    records: list[Record], measure: str = "sensitivity", *, path_only: bool = False, proposed: bool = False
) -> Choice | None:
    """Apply :data:`RULE` to all records together: a setting counts with its lowest agreement and its highest cost.

    Settings that train away from alpha = 1 and absolute aggregation (another integral) are left out.

    Args:
        measure: "sensitivity", or a smoothed score.
        path_only: leave out ``instantaneous``, which samples no path.
        proposed: admit settings that the library does not offer yet.

    Returns:
        None where no setting costs little enough in every record.
    """
    by_record = [{line.key: line for line in lines(record)} for record in records]
    worst: list[tuple[str, float, float]] = []
    for key, first in by_record[0].items() if by_record else ():
        if first.trains_apart or first.aggregate != "signed" or (first.proposed and not proposed):
            continue
        if (path_only and first.title.startswith("instantaneous")) or any(key not in found for found in by_record):
            continue
        same = [found[key] for found in by_record]
        worst.append((key, min(line.top[measure] for line in same), max(line.cost for line in same)))
    timed = bool(records) and all("time" in record for record in records)
    cheap = [w for w in worst if w[2] <= ALLOWED]
    good = [w for w in cheap if w[1] >= WANTED]
    if good:
        picked = min(good, key=lambda w: (w[2], -w[1]))
    elif cheap:
        picked = max(cheap, key=lambda w: (w[1], -w[2]))
    else:
        return None
    return Choice(*picked, reached=bool(good), timed=timed)


def frontier(found: list[Line], measure: str) -> list[Line]:
    """The lines that no other beats in agreement at the same or a lower cost, cheapest first."""
    best: list[Line] = []
    for line in sorted(found, key=lambda one: (one.cost, -one.top[measure])):
        if not best or line.top[measure] > best[-1].top[measure]:
            best.append(line)
    return best
