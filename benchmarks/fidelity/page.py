"""Writes results/fidelity/README.md and frontier.png from the records beside it: python -m igulora.benchmarks.fidelity.page"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..machine import RESULTS
from ..pages import table
from .choice import RULE, Choice, Line, Record, choose, frontier, lines, measures_of
from .plot import draw

FOLDER = RESULTS / "fidelity"
PICTURE = "frontier.png"
INTRODUCTION = f"""# How faithful are the estimators of the path gradient?

Written by `python -m igulora.benchmarks.fidelity.page` from the records in this folder (`python -m igulora.benchmarks.fidelity`).

Adapters are trained for some hundred steps at full rank and then held still. Over the micro-batches of one scoring window the *exact*
integral is a composite trapezoid on 20 intervals (21 evaluations of every sequence). Each estimator, the library's own code, sees the
same micro-batches. *top-b*: the share of the b best triplets by the exact integral that the estimate finds, b being half of all, the
default target; chance finds half of them. *Sensitivity*: |w·T| of one window, averaged over a triplet's weights, without smoothing.
*Score*: what allocation ranks by, after smoothing over several windows: |λ| plus the SNR of p and q (default), and AdaLoRA's product.
*ρ*: Spearman's rank correlation. Values are means over seeds, and for the sensitivity over windows too. Settings with absolute
aggregation are held against the exact integral under the same aggregation.

*Extra sequences* are counted: run forward and backward on the path, per training sequence. *Extra time*: medians of paired ratios of
whole training steps with and without path rows (mixed batches), times the share of the scored micro-batches; ± half the interquartile
range. Mixed and separate passes give the same samples up to rounding (checked below), so the study takes separate ones.

*+ control* is a proposal, not in the library: the training gradient of all sequences, which is free, plus the path gradient of the
sampled sequences minus their own training gradient. Its time is that of the same rows with the training rows taking part in the sample.

Rule for the default: {RULE}. On
several models a setting counts with its lowest agreement and its highest cost. Estimators that train away from α = 1 (`on-path`) and
absolute aggregation, which estimates another integral, do not take part.
"""


def read(folder: Path) -> list[Record]:
    """The newest complete record of every model in a folder, by name of the model."""
    newest: dict[str, Record] = {}
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["complete"]:
            newest[record["study"]["name"]] = record
    return [newest[name] for name in sorted(newest)]


def _percent(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _cells(measures: list[str], top: dict[str, float], low: dict[str, float], spearman: dict[str, float]) -> list[str]:
    return [
        f"{top[name]:.3f}" + (f" (≥ {low[name]:.3f})" if name == measures[0] else "") + f" / {spearman[name]:.3f}"
        for name in measures
    ]


def _setting_rows(record: Record) -> list[list[str]]:
    found, measures = lines(record), measures_of(record)
    best = {
        line.key for line in frontier([x for x in found if x.aggregate == "signed" and not x.trains_apart], measures[0])
    }

    def row(line: Line) -> list[str]:
        name = f"**{line.title}**" if line.key in best else line.title
        return [
            name + (" (proposed)" if line.proposed else ""),
            str(line.every),
            f"{line.fraction:g}",
            _percent(line.extra_sequences),
            _percent(line.extra_time, line.spread),
            str(line.seeds),
            *_cells(measures, line.top, line.low, line.spearman),
        ]

    return [row(line) for line in found]


def _control_rows(record: Record) -> list[list[str]]:
    names = {
        "random": "chance: random numbers",
        "magnitude": "the size of λ alone",
        "other data": "the exact integral over other micro-batches (scores: one half of the windows against the other)",
        "absolute": "the exact integral, absolute aggregation",
    }
    rows = []
    for key, title in names.items():
        found, measures = record["controls"][key], measures_of(record)
        by = {kind: {m: found[m][kind] for m in measures} for kind in ("top", "spearman")}
        top = {m: _mean(v) for m, v in by["top"].items()}
        low = {m: min(v) for m, v in by["top"].items()}
        spearman = {m: _mean(v) for m, v in by["spearman"].items()}
        rows.append([title, *_cells(measures, top, low, spearman)])
    return rows


def _quantiles(values: list[float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)


def _separation(record: Record) -> str:
    scores = record["scores"]
    magnitude, sensitivity = scores["snr_against_magnitude"], scores["snr_against_sensitivity"]
    wide = {name: scores[name][3] / max(scores[name][1], 1e-300) for name in ("snr_terms", "sensitivity")}
    return (
        f"Do the exact scores tell triplets apart? Quantiles at {_quantiles(scores['levels'])}: SNR of p plus q "
        f"{_quantiles(scores['snr_terms'])}; |λ| {_quantiles(scores['magnitude'])}; "
        f"sensitivity {_quantiles(scores['sensitivity'])}. Over the middle half of the triplets the SNR terms grow by a factor of "
        f"{wide['snr_terms']:.2f}, the sensitivity by one of {wide['sensitivity']:.3g}. "
        f"In {_percent(scores['below_epsilon'])} of the rows of P and Q the mean deviation is below the ε of the SNR: there the score is "
        f"Ī/ε, a sensitivity, rather than a ratio. {_percent(scores['near_threshold'])} of the "
        "triplets lie within 1 % of the score at which the top b begins. The ranking by the exact score shares "
        f"{magnitude['top']:.3f} of its top b with |λ| alone (Spearman {magnitude['spearman']:.3f}), and {sensitivity['top']:.3f} with "
        f"the exact sensitivity, averaged over the windows ({sensitivity['spearman']:.3f}). With {record['study']['windows']} updates "
        "since a start at 0 the SNR is young; agreement of scores must be read against the controls.\n"
    )


def _exactness(record: Record) -> str:
    exact = record["exact"]
    whole, gauss, doubled, passes = (exact[name] for name in ("completeness", "gauss5", "doubled", "passes"))
    windows, done = record["study"]["windows"], exact["windows"]
    others = (
        ""
        if done >= windows
        else f" The other {windows - done} have 5 Gauss nodes on every sequence as their reference: on the first window those differ "
        f"from the exact integral by {_percent(gauss['difference'])} of its norm (top-b {gauss['top']:.4f})."
    )
    return (
        f"The exact integral has {exact['intervals']} intervals, so {exact['evaluations']} evaluations, on {done} of {windows} "
        f"windows.{others} With {2 * exact['intervals']} intervals one micro-batch's changes by {_percent(doubled['difference'])} of "
        f"its norm (top-b {doubled['top']:.4f}, Spearman {doubled['spearman']:.5f}). Completeness: the attributions of all λ add up to "
        f"{whole['attributed']:.5f}, the loss changes by {whole['loss_change']:.5f}. Mixed against separate passes "
        f"({passes['setting']}): they differ by {_percent(passes['difference'])} of the norm, top-b {passes['top']:.4f}.\n"
    )


def _conditions(record: Record) -> str:
    study, place, training = record["study"], record["machine"], record["training"]
    return (
        f"{record['date']}, {place['cpu']}, {place['cores']} cores, {record['threads']} threads, torch {record['versions']['torch']}, "
        f"commit {record['versions']['commit']}. r = {study['rank']}, {record['triplets']} triplets, b = {record['budget']}; "
        f"{study['steps']} training steps (loss {training['loss_first']:.3f} → {training['loss_last']:.3f}); {study['windows']} windows "
        f"of {study['window']} micro-batches of {study['rows']}×{study['length']} tokens.{'' if 'time' in record else ' Not timed.'}\n"
    )


def section(record: Record) -> str:
    """Everything about one model; figures of one machine only."""
    measures = measures_of(record)
    columns = [f"{name}: top-b / ρ" for name in measures]
    header = ["estimator", "every", "fraction", "extra sequences", "extra time", "seeds", *columns]
    return "\n".join(
        [
            f"## {record['study']['title']}\n",
            _conditions(record),
            _exactness(record),
            table(header, _setting_rows(record)),
            "Bold: on the frontier of sensitivity against cost. In brackets: the least of all seeds and windows.\n",
            table(["control", *columns], _control_rows(record)),
            _separation(record),
        ]
    )


def _sentence(choice: Choice | None, what: str) -> str:
    if choice is None:
        return f"- {what}: no setting costs 5 % or less.\n"
    cost = "extra time" if choice.timed else "extra sequences (not every model was timed)"
    missed = "" if choice.reached else "; the aim of 0.95 is missed"
    return f"- {what}: **{choice.key}**, agreement {choice.agreement:.3f} at {_percent(choice.cost)} {cost}{missed}.\n"


def choices(records: list[Record]) -> str:
    """What the rule picks, by the sensitivity and by the score."""
    out = []
    for measure, name in (("sensitivity", "sensitivity"), ("snr", "score")):
        out.append(_sentence(choose(records, measure), f"By the {name}, all estimators"))
        out.append(
            _sentence(choose(records, measure, path_only=True), f"By the {name}, estimators that sample the path")
        )
        out.append(_sentence(choose(records, measure, proposed=True), f"By the {name}, proposals admitted"))
    default = "The library's default is the pick by the score, which allocation ranks by, among estimators that sample the path.\n"
    return "## What the rule picks\n\n" + "".join(out) + f"\n{default}"


def page(records: list[Record]) -> str:
    """The whole text."""
    picture = f"![Agreement against cost]({PICTURE})\n"
    return "\n".join([INTRODUCTION, choices(records), picture, *(section(record) for record in records)])


def write(folder: Path) -> list[Path]:
    """Write page and picture of a folder's records.

    Raises:
        ValueError: there is no complete record.
    """
    records = read(folder)
    if not records:
        raise ValueError(f"expected complete records in {folder}, found none; igulora.benchmarks.fidelity writes them")
    written = [folder / "README.md", folder / PICTURE]
    written[0].write_text(page(records), encoding="utf-8")
    draw(records, written[1])
    return written


def main(arguments: list[str] | None = None) -> int:
    """Render the folder given, or the committed one."""
    given: list[Any] = sys.argv[1:] if arguments is None else arguments
    try:
        write(Path(given[0]) if given else FOLDER)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
