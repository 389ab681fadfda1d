"""Runs on a CUDA machine what cannot be known without one: GPU tests, and times of kernels, layers and training steps; under ten minutes.

    python benchmarks/gpu_suite.py                   # everything; results/gpu/<date>-<device>.json and a page of tables beside it
    python benchmarks/gpu_suite.py --quick           # fewer shapes and repetitions, about four minutes
    python benchmarks/gpu_suite.py --only layers     # one part (may be repeated); "compiled", models under torch.compile, only so
    python benchmarks/gpu_suite.py --tiny            # no device needed: does it still run, under Triton's interpreter; times mean nothing

It needs no network, and nothing installed but torch, Triton, numpy and, for the training step, transformers; what else there is (PEFT,
Unsloth, LoRAFusion, pytest) is compared with or used, what there is not is named in the result. Every part runs in a process of its own
within its share of the time: one that takes longer is cut and says so, one that fails is recorded, and the rest goes on.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "gpu"
FORMAT = 2  # 2: steps of two batches, their profile
# Module of each part and its share of the time; what a part does not use goes to those behind it.
PARTS = {
    "floors": ("gpu_machine", 0.02),
    "tests": ("gpu_tests", 0.29),
    "compile": ("gpu_compile", 0.045),
    "kernels": ("gpu_kernels", 0.055),
    "steps": ("gpu_steps", 0.36),
    "layers": ("gpu_layers", 0.23),
}
# Only with --only.
MORE = {"compiled": ("gpu_compiled", 1.0)}
_KILL_AFTER = 15  # seconds behind its deadline that a part may take for the item under way
_RESTARTS = 3  # of a part whose process was lost


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    parser.add_argument("--tiny", action="store_true", help="shapes that Triton's interpreter gets through in a minute")
    parser.add_argument(
        "--only", choices=sorted(PARTS | MORE), action="append", help="only this part (may be repeated)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="result file (default benchmarks/results/gpu/<date>-<device>.json, with --only <date>-<device>-<part>.json)",
    )
    parser.add_argument("--minutes", type=float, help="time for all parts together (default 9.5, with --quick 4)")
    parser.add_argument("--part", choices=sorted(PARTS | MORE), help=argparse.SUPPRESS)  # a child's own options
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = 4.0 if options.quick else 9.5
    return options


# -- a part, in its own process -------------------------------------------------------------------------------------------


def _write(file: Path, content: Any) -> None:
    """All or nothing: the process may be killed at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, file)


def run_part(options: argparse.Namespace) -> int:
    """Measure the items of a part that its state does not hold yet, and write each down as soon as it is there."""
    from gpu_machine import Deadline, Setting, environment

    state = json.loads(options.state.read_text(encoding="utf-8")) if options.state.exists() else {"items": {}}
    items: dict[str, Any] = state["items"]
    setting = Setting.here(tiny=options.tiny, quick=options.quick)
    deadline = Deadline(options.until)
    if "environment" not in state:
        state["environment"] = environment(setting)
    found = importlib.import_module((PARTS | MORE)[options.part][0]).items(setting)
    while True:
        state["running"] = "its preparation"
        _write(options.state, state)
        try:
            item = next(found, None)
        except Exception:
            items["preparation"] = {"error": traceback.format_exc()}
            break
        if item is None:
            break
        name, measure = item
        if name in items:
            continue
        if deadline.passed:
            items[name] = {"cut": "the part's time was over"}
            continue
        state["running"] = name
        _write(options.state, state)
        start = time.perf_counter()
        try:
            items[name] = measure(deadline)
        except Exception:
            items[name] = {"error": traceback.format_exc()}
        print(f"  {name}: {_summary(items[name])}, {time.perf_counter() - start:.1f} s", flush=True)
        if not _alive(setting.device):
            _write(options.state, state | {"running": None})
            return 1
    _write(options.state, state | {"running": None})
    return 0


def _summary(item: dict[str, Any]) -> str:
    if "error" in item:
        return "error: " + item["error"].strip().splitlines()[-1][:200]
    return "cut" if "cut" in item else "measured"


def _alive(device: Any) -> bool:
    """Whether the device still answers; after an illegal access none does in this process."""
    if device.type != "cuda":
        return True
    import torch

    try:
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


# -- all parts, from outside ----------------------------------------------------------------------------------------------


def importable(folder: Path) -> dict[str, str]:
    """Environment in which ``import igulora`` works: as installed, or from this checkout by links in a folder of our own."""
    environment = dict(os.environ)
    if importlib.util.find_spec("igulora") is None:
        package = folder / "igulora"
        package.mkdir()
        for entry in (HERE.parent / "igulora").iterdir():
            (package / entry.name).symlink_to(entry)
        for name in ("kernels", "benchmarks"):
            (package / name).symlink_to(HERE.parent / name)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), environment.get("PYTHONPATH"))))
    # Choices are measured anew: a result must not depend on what this machine happened to keep.
    environment["IGULORA_CACHE_DIR"] = str(folder / "choices")
    environment.setdefault("TQDM_DISABLE", "1")
    return environment


def supervise(
    name: str, options: argparse.Namespace, environment: dict[str, str], folder: Path, until: float, end: float
) -> dict[str, Any]:
    """Run a part until its items are measured or its time is over; a process that is lost is started again without the item it was lost in.

    Args:
        until: when the part is to start no further item. end: when it is killed at the latest; both in seconds of ``time.time()``.
    """
    file, start, lost = folder / f"{name}.json", time.time(), 0
    command = [sys.executable, str(HERE / "gpu_suite.py"), "--part", name, "--state", str(file), "--until", str(until)]
    command += [flag for flag in ("--tiny", "--quick") if getattr(options, flag.lstrip("-"))]
    while True:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code: int | None = process.wait(max(end - time.time(), 1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):  # the part itself, and whatever it left running
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        state = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"items": {}}
        running = state.pop("running", "its start")
        if code == 0:
            break
        lost += 1
        how = "took too long and was ended" if code is None else f"ended with code {code}"
        if running is not None:
            state["items"][running] = {"error": f"the process {how}"}
            _write(file, state | {"running": None})
        if code is None or lost > _RESTARTS or time.time() >= until or running in ("its start", "its preparation"):
            break
    return {"seconds": round(time.time() - start, 1), "status": status(state["items"]), "restarts": lost, **state}


def status(items: dict[str, Any]) -> str:
    """Of a part: "done", or what is missing."""
    errors, cuts = (sum(key in item for item in items.values()) for key in ("error", "cut"))
    found = [f"{errors} of {len(items)} items failed"] if errors else []
    found += [f"{cuts} of {len(items)} items cut for time"] if cuts else []
    return "; ".join(found) or ("done" if items else "nothing was measured")


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, write the record and its page; 0 unless nothing could be measured."""
    options = parse(arguments)
    if options.part:
        return run_part(options)
    begin = time.time()
    parts = {name: part for name, part in (PARTS | MORE).items() if name in (options.only or PARTS)}
    shares = sum(share for _, share in parts.values())
    record: dict[str, Any] = {"format": FORMAT, "kind": "gpu-suite", "figures": "measured", "parts": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = importable(folder)
        if options.tiny and not _has_device(environment):
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
        planned = begin
        for name, (_, share) in parts.items():
            planned += options.minutes * 60 * share / shares
            print(f"{name} (until {planned - begin:.0f} s)", flush=True)
            end = min(planned + _KILL_AFTER, begin + options.minutes * 60 + _KILL_AFTER)
            part = supervise(name, options, environment, folder, planned, end)
            first = part.pop("environment", None)
            record["environment"] = record.get("environment") or first
            record["parts"][name] = part
            record["seconds"] = round(time.time() - begin, 1)
            _save(record, options)
    print((_save(record, options)).with_suffix(".md").read_text(encoding="utf-8"))
    return 0 if any(item for part in record["parts"].values() for item in part["items"]) else 1


def _has_device(environment: dict[str, str]) -> bool:
    """Asked in another process: this one must not hold the device while parts measure."""
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, env=environment, check=False).returncode == 0


def _save(record: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write the record and its page; returns the record's file."""
    from gpu_report import page

    place = record.get("environment") or {"date": time.strftime("%Y-%m-%d"), "machine": {"name": "unknown"}}
    slug = re.sub(r"[^a-z0-9]+", "-", place["machine"]["name"].lower()).strip("-")
    folder = Path(tempfile.gettempdir()) / "igulora-gpu-suite" if options.tiny else RESULTS  # a trial run is no result
    parts = "".join(f"-{part}" for part in options.only or ())
    file = options.output or folder / f"{place['date']}-{slug}{parts}.json"
    _write(file, record)
    file.with_suffix(".md").write_text(page(record), encoding="utf-8")
    return file


if __name__ == "__main__":
    sys.exit(main())
