"""Kill a process at random moments while it saves checkpoints, and load what it left.

    python tests/faults/kill.py --count 200 --record     # the last result is kept in tests/faults/results.json

The child saves generation after generation: every tensor of generation g, and every count, is g. After SIGKILL the parent loads: all must
be of one generation, the last that the child said it had saved or the one after. The folders are kept from kill to kill. Then a save dies
before each of its calls that touch the file system, one after the other.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

import igulora
from igulora.adapter_file import TRAINER_FILE
from igulora.bank import find_bank
from igulora.checkpoint import load_checkpoint, save_checkpoint
from igulora.folders import COMPLETE, PARTIAL, place
from igulora.training.loop import CHECKPOINTS, keep_newest, latest_checkpoint

Run = tuple[nn.Module, torch.optim.Optimizer, igulora.Controller]
LAYOUTS = ("one folder", "a folder per step")


def make() -> Run:
    """A tiny adapted model after one step, so that the optimizer has states."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 2))
    config = igulora.IGUConfig(
        r=4, target_rank=2, total_steps=10**6, window=2, ig_every=1, modules_to_save=["2"], path_pass="separate"
    )
    igulora.adapt(model, config)
    controller = igulora.Controller(model)
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-3))
    controller.backward(lambda x: model(x).square().mean(), torch.ones(2, 6))
    optimizer.step()
    controller.step()
    optimizer.zero_grad()
    return model, optimizer, controller


def numbers(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor that a checkpoint of ``run`` holds and that may be any number."""
    model, optimizer, controller = run
    found = {name: param for name, param in model.named_parameters() if param.requires_grad}
    found |= {"mean": controller.importance.mean, "deviation": controller.importance.deviation}
    found |= {"terms": controller.importance.terms, "path": find_bank(model).path}
    for i, state in enumerate(optimizer.state.values()):
        found |= {f"{i}.{key}": value for key, value in state.items()}
    return found


@torch.no_grad()
def become(run: Run, generation: int) -> None:
    """Make every number of ``run`` its generation."""
    for tensor in numbers(run).values():
        tensor.fill_(generation)
    run[2].global_step = generation


def generation_of(run: Run, extra: dict[str, Any]) -> int:
    """The one generation that ``run`` is of.

    Raises:
        AssertionError: it is of several.
    """
    seen = {name: tensor.unique().tolist() for name, tensor in numbers(run).items()}
    values = {value for found in seen.values() for value in found}
    values |= {float(run[2].global_step), float(extra["generation"])}
    if len(values) != 1:
        raise AssertionError(f"expected one generation, got {sorted(values)}: {seen}")
    return int(values.pop())


def save(run: Run, output: Path, layout: str, generation: int) -> None:
    """Save as a training loop of that layout does."""
    model, optimizer, controller = run
    extra = {"generation": generation}
    if layout == LAYOUTS[0]:
        save_checkpoint(output, model, optimizer, controller, extra)
        return
    save_checkpoint(output / CHECKPOINTS / f"step-{generation:08d}", model, optimizer, controller, extra)
    keep_newest(output, 2)


def child(run: Run, output: Path, layout: str, first: int, pipe: int) -> None:
    """Save generation after generation until killed; report each that is saved."""
    generation = first
    try:
        while True:
            become(run, generation)
            save(run, output, layout, generation)
            os.write(pipe, generation.to_bytes(8, "little"))
            generation += 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def kill_once(run: Run, output: Path, layout: str, first: int, longest: float, rng: random.Random) -> int:
    """Fork, kill, and return the last generation that was reported; ``first - 1`` if none was."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        child(run, output, layout, first, send)
    os.close(send)
    time.sleep(rng.uniform(0.0, longest))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(receive, "rb") as pipe:
        reported = pipe.read()
    if not os.WIFSIGNALED(status):
        raise AssertionError("the saving process ended by itself")
    return int.from_bytes(reported[-8:], "little") if reported else first - 1


def left_behind(output: Path) -> str:
    """Where the kill fell: while files were written, while they were moved, or elsewhere (between saves, while computing or removing)."""
    if any(output.rglob(COMPLETE)):
        return "moving"
    return "writing" if any(output.rglob(f"{PARTIAL}*")) else "elsewhere"


def kills(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill ``count`` times, in all layouts in turn; returns counts.

    Raises:
        AssertionError: what was left could not be loaded, or was of several generations, or an old one.
    """
    torch.set_num_threads(1)  # a fork copies one thread
    rng, run, reader = random.Random(seed), make(), make()
    began = time.perf_counter()
    for _ in range(3):
        save(run, folder / "timed", LAYOUTS[0], 1)
    longest = 2.5 * (time.perf_counter() - began) / 3
    last = dict.fromkeys(LAYOUTS, 0)
    fell = dict.fromkeys(("writing", "moving", "elsewhere"), 0)
    saved = empty = 0
    for i in range(count):
        layout = LAYOUTS[i % len(LAYOUTS)]
        output = folder / layout.replace(" ", "-")
        before = last[layout]
        reported = kill_once(run, output, layout, before + 1, longest, rng)
        fell[left_behind(output)] += 1
        newest = output if layout == LAYOUTS[0] else latest_checkpoint(output)
        if reported == 0 and (newest is None or not place(newest, TRAINER_FILE).exists()):
            empty += 1  # nothing had ever been saved
            continue
        found = load(reader, output, layout)
        assert found in (reported, reported + 1), f"kill {i} of seed {seed}: {found} loaded, {reported} was saved"
        saved += found - before
        last[layout] = found
    leftovers = [p for p in folder.rglob(f"{PARTIAL}*") if p.parent.name == "one-folder"]
    assert len(leftovers) <= 1, f"killed saves are not cleaned up: {leftovers}"
    return {"kills": count, "seed": seed, "fell": fell, "saves": saved, "before_any_save": empty}


def kill_at(run: Run, output: Path, layout: str, generation: int, event: int) -> bool:
    """Save in a child that dies right before its ``event``-th call that touches the file system; whether it came to that."""
    pid = os.fork()
    if pid == 0:
        left = event

        def count(name: str, _args: Any) -> None:
            nonlocal left
            if name == "open" or name.startswith(("os.", "shutil.")):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            become(run, generation)
            sys.addaudithook(count)
            save(run, output, layout, generation)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise AssertionError("the save failed")
    return os.WIFSIGNALED(status)


def every_point(folder: Path) -> dict[str, Any]:
    """Die before each call of a save that touches the file system, in all layouts; then load, save once more and load that.

    Raises:
        AssertionError: what was left could not be loaded, was of several generations, or older than what an earlier death had left; or a
            later save left something of the dead one's.
    """
    torch.set_num_threads(1)
    run, reader = make(), make()
    points = {}
    for layout in LAYOUTS:
        newest, event, more = 1, 1, True
        while more:
            output = folder / f"{layout.replace(' ', '-')}-{event}"
            for generation in (0, 1):  # in a folder per step two are kept, and the third save removes one
                become(run, generation)
                save(run, output, layout, generation)
            more = kill_at(run, output, layout, 2, event)
            found = load(reader, output, layout)
            assert newest <= found <= 2, (
                f"{layout}, {event}: {found} loaded after a death at an earlier call had left {newest}"
            )
            newest = found
            become(run, 3)
            save(run, output, layout, 3)
            assert load(reader, output, layout) == 3
            names = [path.name for path in output.rglob(".*")]
            assert not names, f"{layout}, {event}: {names} is left"
            points[layout] = event
            event += 1
        assert newest == 2, f"{layout}: the last save never counted"
    return {"points": points}


def load(reader: Run, output: Path, layout: str) -> int:
    """The generation of the newest checkpoint."""
    newest = output if layout == LAYOUTS[0] else latest_checkpoint(output)
    assert newest is not None
    become(reader, 99)
    return generation_of(reader, load_checkpoint(newest, reader[0], reader[1], reader[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to save; the system's temporary folder by default")
    parser.add_argument("--part", choices=("random", "every"), help="only random moments, or only every call")
    parser.add_argument("--record", action="store_true", help="keep the result in results.json")
    args = parser.parse_args()
    started = time.perf_counter()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.part != "every":
            result |= kills(args.count, args.seed, Path(folder, "random"))
        if args.part != "random":
            result |= every_point(Path(folder, "every"))
    result["seconds"] = round(time.perf_counter() - started, 1)
    sys.stdout.write(f"{result}\n")
    if args.record:
        sys.path.insert(0, str(Path(__file__).parent))
        from record import record

        record("kill", result)


if __name__ == "__main__":
    main()
