"""Damage adapter and checkpoint folders at random and load them.

    python tests/faults/fuzz.py --count 20000 --record     # the last result is kept in tests/faults/results.json

Each case damages a fresh copy of one checkpoint and loads it twice: as an adapter of a plain model, and as a checkpoint of a run that
stands elsewhere. What may happen: a ValueError or FileNotFoundError that names the folder and leaves model, optimizer, controller and
random numbers bit by bit as they were; or a load of exactly what was saved. Where the damage comes with right checksums (somebody made it
on purpose) the load may be another one, but still no crash, no hang and no memory beyond the limit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import igulora
from igulora.checkpoint import load_checkpoint, save_checkpoint
from igulora.files import file_digest, sealed
from igulora.folders import COMPLETE

Run = tuple[nn.Module, torch.optim.Optimizer, igulora.Controller]
JSONS, TENSORS = (
    ("igulora_config.json", "checkpoint.json"),
    ("adapter_model.safetensors", "controller_state.safetensors", "optimizer.safetensors"),
)
FILES = (*TENSORS, *JSONS)
MEMORY = 2**30  # bytes of address space beyond what the process holds at the start
SECONDS = 10.0  # for one load
DEEP = "[" * 100_000


class Hang(BaseException):
    """A load that does not end."""


# -- runs -------------------------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    """The base model, the same one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(5, 6), "b": nn.Linear(6, 4), "head": nn.Linear(4, 2)})


def make(steps: int) -> Run:
    """A run inside a window and inside an accumulation, after ``steps`` steps."""
    model = plain()
    options: dict[str, Any] = {"r": 3, "target_rank": 2, "total_steps": 40, "t_init": 12, "window": 4, "ig_every": 1}
    config = igulora.IGUConfig(modules_to_save=["head"], path_pass="separate", dropout=0.1, **options)
    igulora.adapt(model, config)
    controller = igulora.Controller(model, accumulation_steps=2, trace=["a"])
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model["head"](model["b"](model["a"](x))).square().mean()

    torch.manual_seed(steps)
    for _ in range(steps):
        controller.backward(loss, torch.randn(3, 5))
        controller.backward(loss, torch.randn(3, 5))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    controller.backward(loss, torch.randn(3, 5))
    return model, optimizer, controller


def save(folder: Path, steps: int) -> Run:
    """Save a run; its extra values name it."""
    run = make(steps)
    save_checkpoint(folder, *run, extra={"steps": steps, "best": [math.nan, (1, 2)]})
    return run


def _plain_values(value: Any) -> Any:
    """``value`` with tensors as bytes, so that two are compared bit by bit."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: _plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_values(item) for item in value]
    return value


def state(run: Run) -> Any:
    """Everything that a load may change."""
    model, optimizer, controller = run
    grads = {name: param.grad for name, param in model.named_parameters()}
    scales = [layer.scale for layer in controller.bank.layers]
    own = controller.state_dict()
    numbers = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
    return _plain_values(
        [model.state_dict(), grads, scales, optimizer.state_dict(), own, numbers, controller.bank.live]
    )


def plain_state(model: nn.Module) -> Any:
    """Modules, parameters and flags of a model without adapters."""
    flags = [(name, id(param), param.requires_grad) for name, param in model.named_parameters()]
    return [[(name, id(m)) for name, m in model.named_modules()], flags, hasattr(model, "igulora_bank")]


# -- damage -----------------------------------------------------------------------------------------------------------


def _bytes_of(rng: random.Random, data: bytes) -> bytes:
    """``data`` with one accident of bytes."""
    if not data:
        return rng.randbytes(8)
    at, size = rng.randrange(len(data)), rng.choice((1, 2, 8, 64))
    kind = rng.choice(("bit", "bit", "bits", "insert", "delete", "overwrite", "truncate", "append", "repeat", "zeros"))
    if kind in ("bit", "bits"):
        changed = bytearray(data)
        for _ in range(1 if kind == "bit" else size):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == "insert":
        return data[:at] + rng.randbytes(size) + data[at:]
    if kind == "delete":
        return data[:at] + data[at + size :]
    if kind == "overwrite":
        return data[:at] + rng.randbytes(size) + data[at + size :]
    if kind == "truncate":
        return data[:at]
    if kind == "append":
        return data + rng.randbytes(size)
    if kind == "repeat":
        return data[:at] + data[max(0, at - size) :]
    return data[:at] + bytes(size) + data[at + size :]


def damage_bytes(rng: random.Random, folder: Path, _other: Path) -> None:
    path = folder / rng.choice(FILES)
    path.write_bytes(_bytes_of(rng, path.read_bytes()))


def damage_start(rng: random.Random, folder: Path, _other: Path) -> None:
    """The length of the header, or the header itself."""
    path = folder / rng.choice(TENSORS)
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        data[:8] = struct.pack(
            "<Q", rng.choice((0, 1, 2, len(data), len(data) - 8, 2**26 + 1, 2**31, 2**63, 2**64 - 1))
        )
    else:
        data[8 + rng.randrange(64)] = rng.randrange(256)
    path.write_bytes(bytes(data))


def damage_files(rng: random.Random, folder: Path, other: Path) -> None:
    """Files missing, empty, of another save, exchanged, or no files at all."""
    name = rng.choice(FILES)
    path = folder / name
    kind = rng.choice(
        ("missing", "empty", "other", "exchange", "folder", "dangling", "loop", "fifo", "pending", "sparse")
    )
    if kind == "other":
        shutil.copy(other / name, path)
    elif kind == "exchange":
        twin = folder / rng.choice(FILES)
        one, two = path.read_bytes(), twin.read_bytes()
        path.write_bytes(two)
        twin.write_bytes(one)
    elif kind == "pending":  # as no save of ours leaves it: some files of another one, said to be complete
        (folder / COMPLETE).mkdir(exist_ok=True)
        shutil.copy(other / name, folder / COMPLETE / name)
    elif kind == "sparse":  # a terabyte that takes no room on the disk
        os.truncate(path, 2**40)
    else:
        path.unlink()
        if kind == "empty":
            path.touch()
        elif kind == "folder":
            path.mkdir()
        elif kind in ("dangling", "loop"):
            path.symlink_to(name if kind == "loop" else "nowhere")
        elif kind == "fifo":
            os.mkfifo(path)


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 1.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**30, 10**400),
    *("", "a", "a.lora_P", "../../x", "/etc/passwd", "\u0000", "\ud800", "é", "x" * 10_000),
    *([], {}, [[]], [1, 2], {"a": 1}, {"$tensor": "x"}, {"$tuple": 1}, {"$float": "nan"}, {"$dict": [[[], 1]]}),
)


def _edit(rng: random.Random, value: Any) -> Any:
    """``value`` with one place changed, wherever that is."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(list(value))
        roll = rng.random()
        if roll < 0.05:
            return {k: v for k, v in value.items() if k != key}
        if roll < 0.1:
            return {**value, str(rng.choice(ODD))[:50]: rng.choice(ODD)}
        if roll < 0.15:
            return {(k if k != key else k + "x"): v for k, v in value.items()}
        return {**value, key: _edit(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.1:
            return value[:at] + value[at + 1 :]
        if rng.random() < 0.1:
            return [*value, value[at]]
        return [*value[:at], _edit(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice((1, -1, 0.5, 2**40))
    return rng.choice(ODD)


def _write_json(path: Path, value: Any) -> None:
    sys.set_int_max_str_digits(0)
    try:
        path.write_text(json.dumps(value, indent=2), encoding="utf-8")
    finally:
        sys.set_int_max_str_digits(4300)


def damage_json(rng: random.Random, folder: Path, _other: Path) -> None:
    path = folder / rng.choice(JSONS)
    _write_json(path, _edit(rng, json.loads(path.read_text())))


def damage_json_text(rng: random.Random, folder: Path, _other: Path) -> None:
    """What a JSON text may hold and a value may not: keys twice, NaN, depth, numbers without end."""
    path = folder / rng.choice(JSONS)
    text = path.read_text()
    lines = text.splitlines()
    kind = rng.choice(("twice", "constant", "deep", "digits", "bom", "surrogate", "long", "utf16"))
    if kind == "twice":
        at = rng.randrange(1, len(lines) - 1)
        text = "\n".join([*lines[:at], lines[at], *lines[at:]])
    elif kind == "constant":
        text = text.replace(": 0", f": {rng.choice(('NaN', 'Infinity', '-Infinity'))}", 1)
    elif kind == "deep":
        text = text.replace(": [", ': {"a": ' + DEEP, 1)
    elif kind == "digits":
        text = text.replace(": 0", ": " + "9" * 5000, 1)
    elif kind == "bom":
        text = "\ufeff" + text
    elif kind == "surrogate":
        text = text.replace('"library"', '"\\ud800"', 1)
    elif kind == "long":
        path.write_text(text)
        os.truncate(path, 2**27)
        return
    path.write_text(text, encoding="utf-16" if kind == "utf16" else "utf-8")


def damage_header(rng: random.Random, folder: Path, _other: Path) -> None:
    """A header that says something else of the same bytes."""
    path = folder / rng.choice(TENSORS)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    kind = rng.choice(("dtype", "shape", "offsets", "name", "drop", "twins", "any", "metadata"))
    entry = header[name]
    if kind == "dtype":
        entry["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "C64", "F4", "U64", "x")
        )
    elif kind == "shape":
        entry["shape"] = rng.choice(
            ([], [0], [2**40, 2**40], [-1], [1, *entry["shape"]], entry["shape"][::-1], [2**63], [1.5])
        )
    elif kind == "offsets":
        entry["data_offsets"] = [
            entry["data_offsets"][0],
            entry["data_offsets"][1] + rng.choice((-4, 4, 2**40, -(2**40))),
        ]
    elif kind == "name":
        header[rng.choice(("x", "../x", "", "a.lora_P", "rng.cpu", "\u0000", "a.saved.x"))] = header.pop(name)
    elif kind == "drop":
        del header[name]
    elif kind == "twins":
        twin = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[twin] = header[twin], header[name]
    elif kind == "metadata":
        header["__metadata__"] = rng.choice(({}, {"format": "pt"}, {"stamp": "0" * 16}, None, [], {"stamp": 1}))
    else:
        header = _edit(rng, header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


# As often as named.
DAMAGE: tuple[Callable[[random.Random, Path, Path], None], ...] = (
    *(damage_bytes, damage_bytes, damage_bytes, damage_start, damage_files, damage_files),
    *(damage_json, damage_json, damage_json_text, damage_header, damage_header),
)


def seal(folder: Path) -> bool:
    """Give the damaged files right checksums, where that is possible."""
    try:
        for name, others in zip(JSONS, (TENSORS[:2], TENSORS[2:]), strict=True):
            value = json.loads((folder / name).read_text())
            value["files"] = {other: file_digest(folder / other) for other in others}
            _write_json(folder / name, sealed(value))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False
    return True


# -- cases ------------------------------------------------------------------------------------------------------------


def limited(load: Callable[[], Any]) -> Any:
    """What ``load`` returns, or raises, within the time limit."""

    def late(_signum: int, _frame: Any) -> None:
        raise Hang

    former = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return load()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, former)


class Fuzz:
    """One checkpoint to damage, another one to mix it with, and the run that loads.

    Args:
        folder: takes the checkpoints and the copies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good, self.other = folder / "good", folder / "other"
        save(self.good, 9)
        save(self.other, 8)
        self.run = make(3)
        self.extra = load_checkpoint(self.good, *self.run)
        self.wanted = state(self.run)
        self.model = plain()
        self.wanted_adapter = _plain_values(igulora.load_adapter(plain(), self.good).state_dict())
        self.reset()
        self.counts: Counter[str] = Counter()

    def reset(self) -> None:
        """Put the run elsewhere."""
        load_checkpoint(self.other, *self.run)
        self.before = state(self.run)
        assert self.before != self.wanted

    def case(self, seed: int) -> None:
        """Damage and load once.

        Raises:
            AssertionError: something else happened than may happen.
        """
        rng = random.Random(seed)
        copy = self.folder / f"case-{seed}"
        shutil.copytree(self.good, copy)
        done = []
        for _ in range(1 if rng.random() < 0.8 else 2):
            kind = rng.choice(DAMAGE)
            done.append(kind.__name__)
            try:
                kind(rng, copy, self.other)
            except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error, RecursionError):
                break  # the second kind finds nothing left to damage
            if kind is damage_files:
                break  # what is no file now must not be read
        on_purpose = rng.random() < 0.4 and "damage_files" not in done and seal(copy)
        told = f"seed {seed}: {' and '.join(done)}{', with right checksums' if on_purpose else ''}"
        self._adapter(copy, told, on_purpose)
        self._checkpoint(copy, told, on_purpose)
        shutil.rmtree(copy)

    def _adapter(self, copy: Path, told: str, on_purpose: bool) -> None:
        before, refused = plain_state(self.model), None
        try:
            loaded = limited(lambda: igulora.load_adapter(self.model, copy))
        except (ValueError, FileNotFoundError) as error:
            self._check_message(error, copy, told)
            refused = error
        except BaseException as error:
            raise AssertionError(f"{told}: load_adapter raised {error!r:.500}") from error
        if refused is not None:
            assert plain_state(self.model) == before, f"{told}: the model changed in spite of {refused}"
            self.counts["adapter refused"] += 1
            return
        same = _plain_values(loaded.state_dict()) == self.wanted_adapter
        self.model = plain()
        assert same or on_purpose, f"{told}: another adapter was loaded"
        self.counts["adapter loaded" if same else "adapter loaded as forged"] += 1

    def _checkpoint(self, copy: Path, told: str, on_purpose: bool) -> None:
        refused = None
        try:
            extra = limited(lambda: load_checkpoint(copy, *self.run))
        except (ValueError, FileNotFoundError) as error:
            self._check_message(error, copy, told)
            refused = error
        except BaseException as error:
            raise AssertionError(f"{told}: load_checkpoint raised {error!r:.500}") from error
        if refused is not None:
            assert state(self.run) == self.before, f"{told}: the run changed in spite of {refused}"
            self.counts["checkpoint refused"] += 1
            return
        same = state(self.run) == self.wanted and repr(extra) == repr(self.extra)
        assert same or on_purpose, f"{told}: another checkpoint was loaded"
        self.counts["checkpoint loaded" if same else "checkpoint loaded as forged"] += 1
        if not same:
            self.run = make(3)
        self.reset()

    @staticmethod
    def _check_message(error: Exception, copy: Path, told: str) -> None:
        text = str(error)
        assert text.startswith("expected "), f"{told}: what is wrong? {text!r:.500}"
        assert str(copy) in text, f"{told}: where? {text!r:.500}"
        assert len(text) < 3000, f"{told}: a message of {len(text)} characters"


def fuzz(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run cases ``seed`` to ``seed + count - 1``; returns how they ended."""
    torch.set_num_threads(1)
    cases = Fuzz(folder)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))
    for i in range(seed, seed + count):
        cases.case(i)
    return {"cases": count, "seed": seed, "ended": dict(sorted(cases.counts.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; a failure names the seed of its case")
    parser.add_argument("--folder", type=Path, help="where to damage; the system's temporary folder by default")
    parser.add_argument("--record", action="store_true", help="keep the result in results.json")
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = fuzz(args.count, args.seed, Path(folder))
    result["seconds"] = round(time.perf_counter() - started, 1)
    sys.stdout.write(f"{result}\n")
    if args.record:
        sys.path.insert(0, str(Path(__file__).parent))
        from record import record

        record("fuzz", result)


if __name__ == "__main__":
    main()
