"""Compiles every kernel in the configurations we ship, for each architecture, without a device, and says what came out.

    python benchmarks/compile_report.py                          # table of all kernels on all architectures
    python benchmarks/compile_report.py --arch sm_90 --kernel importance
    python benchmarks/compile_report.py --check                  # exit code 1 and a list if a kernel breaks a rule
    make compile-report TRITON=3.6.0                             # check with that Triton, in an environment of its own; keep the result

The rules: nothing on the stack, shared memory within the architecture's limit, products on tensor cores, no atomics, and 16-byte global
accesses on aligned inputs: the widest load, the widest store, and those of every source line that moves a tile large enough. `*` marks
registers of a kernel that was assembled again with all of them, as launches are, because of the stack. Of
AMD's gfx942 each third configuration is compiled and shown, but held to no rule: no kernel runs there yet.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import hashlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from assembly import shown
from compiled import ARCHITECTURES, Row, breaches, compile_specimen

from igulora.kernels import fused
from igulora.kernels.backend import interpreting
from igulora.kernels.fused.common import Specimen

RESULTS = Path(__file__).resolve().parent / "results" / "compile"
_EVERY = {"gfx942": 3}  # one of so many shipped configurations is enough to see what is missing
Job = tuple[str, str, str]  # module, label, architecture
Outcome = tuple[Row, list[tuple[str, str]]] | str  # what came out and the rules it breaks, or why nothing did


def module_names(names: list[str] | None) -> list[str]:
    """Names of the modules to report on: those given, or all of the shipped kernels'."""
    return names or [f"{fused.__name__}.{m.name}" for m in pkgutil.iter_modules(fused.__path__)]


def specimens(module: ModuleType, arch: str) -> dict[str, Specimen]:
    """The shipped configurations of a module's kernels on an architecture, by label.

    Raises:
        ValueError: two have one label.
    """
    listed = module.specimens(ARCHITECTURES[arch].family) if hasattr(module, "specimens") else []
    counts = Counter(specimen.label for specimen in listed)
    twice = [label for label, n in counts.items() if n > 1]
    if twice:
        raise ValueError(f"expected labels that differ in {module.__name__}.specimens, got twice: {', '.join(twice)}")
    return {specimen.label: specimen for specimen in listed}


def digest(loaded: Iterable[ModuleType]) -> str:
    """Of the code of all jitted functions, comments and docstrings aside: whether a kept report is of these kernels."""
    texts = []
    for module in loaded:
        assert module.__file__ is not None
        for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                node.body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                texts.append(ast.unparse(node))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def forgotten(module: ModuleType, archs: list[str]) -> list[str]:
    """Kernels of a module that no specimen compiles."""
    from triton import JITFunction

    covered = {id(s.kernel) for arch in archs for s in specimens(module, arch).values()}
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
        and name.endswith("_kernel")
        and value.fn.__module__ == module.__name__
        and id(value) not in covered
    ]


def _work(connection: Connection, log: str) -> None:
    """Compile what the connection asks for until it asks for nothing; the compiler's own output goes to ``log``."""
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 2)
        while (job := connection.recv()) is not None:
            file.truncate(0)
            module, label, arch = job
            outcome: Outcome
            try:
                specimen = specimens(importlib.import_module(module), arch)[label]
                row = compile_specimen(specimen, arch)
                outcome = row, [] if arch.startswith("gfx") else breaches(row, specimen)
            except Exception as raised:
                error: BaseException = raised
                while error.__cause__ is not None:  # a fault in a function called by the kernel
                    error = error.__cause__
                said = complaint(str(error)) or complaint(Path(log).read_text(errors="replace"))
                outcome = f"{type(error).__name__}: {said}"
            connection.send(outcome)


def complaint(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error:|assert|must be|fatal", line, re.IGNORECASE)]
    return (telling or lines[-1:] or [""])[0][:300]


class _Worker:
    """A process that compiles, one job at a time."""

    def __init__(self, context: Any, folder: Path, number: int) -> None:
        self.log = folder / f"worker-{number}.log"
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, str(self.log)), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job | None) -> None:
        self.job = job
        self.connection.send(job)

    def take(self) -> Outcome:
        """The outcome of its job; the compiler may have ended the process instead."""
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            said = complaint(self.log.read_text(errors="replace"))
            return f"the compiler ended the process ({self.process.exitcode})" + (f": {said}" if said else "")


def run(jobs: list[Job], workers: int, folder: Path) -> Iterator[tuple[Job, Outcome]]:
    """Compile all, several at a time, each outcome as it comes; a job that ends its process costs only itself."""
    context = multiprocessing.get_context("spawn")
    waiting, started = list(reversed(jobs)), 0
    busy: list[_Worker] = []
    while waiting or busy:
        while waiting and len(busy) < workers:
            busy.append(_Worker(context, folder, started))
            started += 1
            busy[-1].give(waiting.pop())
        ready = wait([worker.connection for worker in busy])
        for worker in [w for w in busy if w.connection in ready]:
            assert worker.job is not None
            job, outcome = worker.job, worker.take()
            if worker.process.is_alive() and waiting:
                worker.give(waiting.pop())
            else:
                if worker.process.is_alive():
                    worker.give(None)
                worker.process.join()
                busy.remove(worker)
            yield job, outcome


def cells(row: Row) -> list[str]:
    """A row of the table, after kernel and architecture."""
    tensor = ", ".join(f"{name} ×{n}" for name, n in row.tensor.items()) or "–"
    return [
        f"{row.warps}/{row.stages}",
        f"{row.registers}{'*' * row.again}",
        str(row.stack),
        f"{row.shared / 1024:.1f}",
        tensor,
        shown(row.loads),
        shown(row.stores),
        f"{row.occupancy:.0f} ({row.bound})",
    ]


HEADER = ["warps/stages", "registers", "stack", "shared, KiB", "tensor cores", "load, B", "store, B", "occupancy, %"]


def versions() -> dict[str, str]:
    """What the result depends on."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return {"triton": importlib.metadata.version("triton"), "commit": commit}


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """A table for the terminal, columns aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [header, *rows]
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="default: all")
    parser.add_argument("--kernel", help="only kernels whose name or label contains this")
    parser.add_argument(
        "--module", nargs="+", help="importable modules with specimens (default: those of igulora.kernels.fused)"
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="only each N-th configuration of an architecture"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--cache", type=Path, help="Triton cache to use and keep (default: a new one, removed at the end)"
    )
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--keep", action="store_true", help="write it to results/compile/<Triton version>.json")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a rule is broken, or a kernel has no specimen"
    )
    options = parser.parse_args(arguments)
    if interpreting():
        parser.error("TRITON_INTERPRET is set, so that nothing would be compiled; unset it")
    if options.jobs < 1 or options.every < 1:
        parser.error(f"expected --jobs and --every of at least 1, got {options.jobs} and {options.every}")
    partial = options.kernel or options.module or options.every > 1 or options.arch != list(ARCHITECTURES)
    if options.keep and partial:
        parser.error("--keep is for whole reports: leave out --arch, --every, --kernel and --module, or use --output")
    return options


def report(jobs: list[Job], outcomes: dict[Job, Outcome], missing: list[str], kernels: str) -> dict[str, Any]:
    """The result as it is kept: nothing in it depends on the machine. ``kernels``: their digest."""
    rows, failed = [], []
    broken = [
        {"rule": "every kernel in a specimen", "label": name, "arch": "any", "found": "in none"} for name in missing
    ]
    for job in jobs:
        outcome = outcomes[job]
        _, label, arch = job
        if isinstance(outcome, str):
            failed.append({"label": label, "arch": arch, "reason": outcome})
            if not arch.startswith("gfx"):
                broken.append({"rule": "it compiles", "label": label, "arch": arch, "found": outcome})
        else:
            row, found = outcome
            rows.append({name: value for name, value in dataclasses.asdict(row).items() if name != "seconds"})
            broken += [{"rule": rule, "label": label, "arch": arch, "found": detail} for rule, detail in found]
    date = datetime.date.today().isoformat()
    return {
        "date": date,
        "versions": versions(),
        "kernels": kernels,
        "breaches": broken,
        "failed": failed,
        "rows": rows,
    }


def verdict(breaches: list[dict[str, str]]) -> str:
    """The rules that are broken, and by which kernels where."""
    rules: dict[str, dict[str, dict[str, list[str]]]] = {}
    for breach in breaches:
        labels = rules.setdefault(breach["rule"], {})
        labels.setdefault(breach["label"], {}).setdefault(breach["found"], []).append(breach["arch"])
    lines = [f"{len(rules)} rules broken" if rules else "no rule broken"]
    for rule, labels in rules.items():
        lines.append(f"  {rule}")
        for label, found in labels.items():
            lines.append(f"    {label}: " + "; ".join(f"{what} ({', '.join(archs)})" for what, archs in found.items()))
    return "\n".join(lines)


def dump(record: dict[str, Any]) -> str:
    """JSON with a line per row."""
    lists = {name: value for name, value in record.items() if isinstance(value, list)}
    head = [f'"{name}": {json.dumps(value)}' for name, value in record.items() if name not in lists]
    body = [f'"{name}": [\n' + ",\n".join(f" {json.dumps(v)}" for v in value) + "]" for name, value in lists.items()]
    return "{\n" + ",\n".join(head + body) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, judge."""
    options = parse(arguments)
    loaded = {name: importlib.import_module(name) for name in module_names(options.module)}
    jobs = []
    for arch in options.arch:
        wanted = [
            (name, label, arch)
            for name, module in loaded.items()
            for label, specimen in specimens(module, arch).items()
            if not options.kernel or options.kernel in label or options.kernel in specimen.kernel.__name__
        ]
        rare = _EVERY.get(arch, 1) if not (options.module or options.kernel) else 1
        jobs += wanted[:: options.every * rare]
    missing = [
        f"{kernel} of {name}"
        for name, module in loaded.items()
        for kernel in forgotten(module, list(ARCHITECTURES))
        if not options.kernel or options.kernel in kernel
    ]
    if not jobs and not missing:
        print("expected at least one kernel to compile, found none; see --kernel and --module", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="igulora-compile-") as scratch:
        # The workers inherit these. A cache of its own: what is reported was compiled now.
        os.environ["TRITON_CACHE_DIR"] = str(options.cache or Path(scratch) / "cache")
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 takes it as 1 where it is unset, and warns
        outcomes = dict(run(jobs, options.jobs, Path(scratch)))
    record = report(jobs, outcomes, missing, digest(loaded.values()))
    compiled = [outcome[0] for outcome in map(outcomes.__getitem__, jobs) if not isinstance(outcome, str)]
    print(f"Triton {record['versions']['triton']}")
    print(
        text_table(
            ["configuration", "arch", *HEADER, "s"],
            [[r.label, r.arch, *cells(r), f"{r.seconds:.1f}"] for r in compiled],
        )
    )
    for failure in record["failed"]:
        print(f"{failure['label']} on {failure['arch']} does not compile: {failure['reason']}")
    kept = RESULTS / f"{record['versions']['triton']}.json"
    for file in [options.output] * bool(options.output) + [kept] * options.keep:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dump(record), encoding="utf-8")
    if not options.check:
        return 0
    print("\n" + verdict(record["breaches"]))
    return 1 if record["breaches"] else 0


if __name__ == "__main__":
    sys.exit(main())
