"""The estimator fidelity study: every estimator of the path gradient against the exact integral, at one trained point.

    python -m igulora.benchmarks.fidelity --model smollm2 --time     # results/fidelity/<date>-smollm2.json; half an hour on two cores
    python -m igulora.benchmarks.fidelity --model minilm --time      # some minutes
    python -m igulora.benchmarks.fidelity --quick --output FILE      # a tiny random model, seconds

Adapters are trained for some hundred steps at full rank and then stay as they are. Over the micro-batches of a few scoring windows
the exact integral (a composite trapezoid on 20 intervals, 21 evaluations of every sequence) is compared with what each estimator
makes of the same micro-batches. Each finished piece is written at once; the same command goes on where it was stopped, as long as the code
and the libraries are the same.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import igulora
from igulora.files import write_json
from igulora.training.demo import cache_folder

from ..machine import machine, versions
from ..record import check_same_place
from . import page
from .checks import check
from .point import Point
from .settings import STUDIES, Setting, Study, settings
from .timing import Forecast, time_kinds

FORMAT = 1


class Run:
    """One study, piece by piece; what is done already is read from the record and from the work folder.

    Args:
        study: what to run.
        record: the result so far, written to ``output`` after each piece.
        work: folder for what is too large to commit.
        timed: measure step times as well.
        say: where progress goes, line by line.
    """

    def __init__(
        self, study: Study, record: dict[str, Any], output: Path, work: Path, timed: bool, say: Callable[[str], None]
    ) -> None:
        self.study, self.record, self.output, self.timed, self.say = study, record, output, timed, say
        self.point = Point(study, work)
        self.settings = settings(study)
        self.forecast = Forecast(self.point.problem, study)

    def _whole(self, count: int) -> float:
        """Seconds of that many passes of a whole micro-batch."""
        return self.forecast.seconds([(count, self.study.rows)])

    def plan(self) -> list[tuple[str, Callable[[], None], float]]:
        """What is left to do: its name, how to do it, about how many seconds."""
        study, point, record = self.study, self.point, self.record
        pieces: list[tuple[str, Callable[[], None], float]] = []
        if not (point.trained and "training" in record):
            pieces.append(("training the adapters", self._train, self._whole(study.steps)))
        for w in range(study.windows):
            for name, evaluations in point.integrals(w).items():
                if not point.has(name, w):
                    twice = 2 if name == "instantaneous" else 1
                    do = partial(point.integrate, name, w, self.say)
                    pieces.append((f"window {w}: {name}", do, self._whole(twice * evaluations * study.window)))
        if "exact" not in record:
            cost = self._whole(3 * study.intervals + 2 + 3 * study.window)
            pieces.append(("checks and controls", lambda: record.update(check(point)), cost))
        for setting in self.settings:
            cost = study.windows * self.forecast.seconds(setting.passes(study))
            for seed in range(setting.repetitions(study)):
                if str(seed) not in record["settings"].get(setting.key, {}).get("seeds", {}):
                    pieces.append((f"{setting.key}, seed {seed}", partial(self._estimate, setting, seed), cost))
        if self.timed and "time" not in record:
            kinds = len({setting.kind for setting in self.settings})
            pieces.append(("timing", self._time, 1.3 * self._whole(kinds * (study.rounds + 1))))
        return pieces

    def go(self) -> None:
        """Do what is left, writing the record after each piece."""
        pieces = self.plan()
        self.point.hold()
        left = sum(cost for _, _, cost in pieces)
        self.say(f"{self.study.title}: {len(pieces)} pieces to do, about {self.forecast.left(left)}")
        for number, (name, do, cost) in enumerate(pieces, start=1):
            start = time.perf_counter()
            do()
            spent = time.perf_counter() - start
            self.forecast.note(cost, spent)
            left -= cost
            self.record["seconds_in_all"] = round(self.record["seconds_in_all"] + spent, 1)
            self.record["complete"] = number == len(pieces)
            write_json(self.output, self.record)
            self.say(f"[{number}/{len(pieces)}] {name}: {spent:.1f} s; about {self.forecast.left(left)} left")

    def _train(self) -> None:
        self.record["training"] = self.point.train(self.say)

    def _estimate(self, setting: Setting, seed: int) -> None:
        facts, found = self.point.estimate(setting, seed)
        self.record["settings"].setdefault(setting.key, {**facts, "seeds": {}})["seeds"][str(seed)] = found

    def _time(self) -> None:
        found = time_kinds(self.point.problem, self.study, self.settings, self.say)
        self.record["time"] = {**found, "threads": torch.get_num_threads()}


def identity(study: Study) -> str:
    """A short name of everything that determines the trained point and the integrals."""
    fields = {k: v for k, v in dataclasses.asdict(study).items() if k not in ("title", "seeds", "dear_seeds", "rounds")}
    return hashlib.sha256(json.dumps([FORMAT, fields], sort_keys=True).encode()).hexdigest()[:12]


def sources() -> list[Path]:
    """The files whose code decides what is trained and integrated."""
    own, library, operators = (
        Path(__file__).parent,
        Path(igulora.__file__).parent,
        Path(igulora.kernels.__file__).parent,
    )
    mine = [own / f"{name}.py" for name in ("measure", "point", "problem", "settings")]
    mine += [own.parent / f"{name}.py" for name in ("cases", "models")]
    return [
        *mine,
        *sorted(library.glob("*.py")),
        *sorted(library.glob("training/*.py")),
        *sorted(operators.rglob("*.py")),
    ]


def code_of(files: Iterable[Path]) -> str:
    """A short name of the code in these files, comments aside, and of the libraries it runs on."""
    libraries = {name: version for name, version in versions().items() if name != "commit"}
    texts = [ast.unparse(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    return hashlib.sha256(json.dumps([libraries, texts], sort_keys=True).encode()).hexdigest()[:12]


def open_record(study: Study, output: Path, threads: int) -> dict[str, Any]:
    """A new record, or the one in ``output`` to go on with.

    Raises:
        ValueError: ``output`` holds another study, or one of another machine or by other code.
    """
    code = code_of(sources())
    place = {"machine": machine(), "versions": versions(), "threads": threads}
    if output.exists():
        record = json.loads(output.read_text(encoding="utf-8"))
        found = record.get("identity"), record.get("code"), record.get("machine", {}).get("cpu")
        wanted = identity(study), code, place["machine"]["cpu"]
        if found != wanted:
            raise ValueError(
                f"expected {output} to hold study, code and processor {', '.join(wanted)}, got {', '.join(map(str, found))}; remove it or "
                "name another with --output"
            )
        check_same_place(record, place)
        return record
    return {
        "format": FORMAT,
        "identity": identity(study),
        "code": code,
        "date": datetime.date.today().isoformat(),
        **place,
        "study": dataclasses.asdict(study),
        "settings": {},
        "seconds_in_all": 0.0,
        "complete": False,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=[name for name in STUDIES if name != "tiny"], default="smollm2")
    parser.add_argument("--quick", action="store_true", help="a tiny random model instead: seconds, for testing")
    parser.add_argument("--steps", type=int, help="training steps before the study")
    parser.add_argument("--time", action="store_true", help="measure what path rows cost in time (idle machine)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--output", type=Path, help="result file (default benchmarks/results/fidelity/<date>-<model>.json)"
    )
    parser.add_argument("--work", type=Path, help="folder for what is too large to commit (default: the user's cache)")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"expected --steps >= 1, got {options.steps}")
    if options.quick and options.output is None:
        parser.error(
            "expected --output FILE with --quick: a tiny model's figures do not belong to the committed results"
        )
    return options


def unfinished(folder: Path, name: str, timed: bool) -> Path | None:
    """The last result file of a study that lacks something, to go on with."""
    for file in sorted(folder.glob(f"*-{name}.json"), reverse=True):
        record = json.loads(file.read_text(encoding="utf-8"))
        if not record["complete"] or (timed and "time" not in record):
            return file
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run or go on with a study and write its result file, page and picture."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    os.environ["TQDM_DISABLE"] = "1"  # the loader's progress bars
    study = STUDIES["tiny" if options.quick else options.model]
    if options.steps is not None:
        study = dataclasses.replace(study, steps=options.steps)
    output = options.output or unfinished(page.FOLDER, study.name, options.time)
    output = output or page.FOLDER / f"{datetime.date.today().isoformat()}-{study.name}.json"
    try:
        record = open_record(study, output, options.threads)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    work = (options.work or cache_folder() / "fidelity") / f"{study.name}-{record['identity']}-{record['code']}"
    work.mkdir(parents=True, exist_ok=True)
    Run(study, record, output, work, options.time, partial(print, flush=True)).go()
    print(f"written: {output}  ({record['seconds_in_all']:.0f} s in all)")
    if output.parent == page.FOLDER:
        print(f"written: {', '.join(str(file) for file in page.write(output.parent))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
