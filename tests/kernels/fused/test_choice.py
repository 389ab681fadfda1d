"""Which form of the base product runs: what is measured and how the fastest is found, what is kept on disk, what runs without it.

Times come from timers of the tests' own; no test looks at a real clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from igulora.kernels import choice_file, settings
from igulora.kernels import tuning as facade
from igulora.kernels.choice_file import ChoiceFileWarning
from igulora.kernels.fused import choice, gemm, product, tuning
from igulora.kernels.fused.choice import LIBRARY, Problem, Product, choose
from igulora.kernels.fused.common import SHARED_MEMORY, block_rank, padded_rank
from igulora.kernels.fused.tuning import Runs, Timing

from .exactness import assert_exact

M, N, K, R = 20, 24, 36, 5
FORWARD = Problem(True, torch.float32, 32, N, K, 16)
TEMPORARY = FORWARD._replace(temporary=True)
BACKWARD = Problem(False, torch.float32, 32, N, K, 16)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of choices of the test's own, and nothing remembered from other tests."""

    def fresh() -> None:
        choice.forget()
        settings.search_asked.cache_clear()
        choice.environment.cache_clear()
        choice_file.warn_once.cache_clear()

    monkeypatch.setenv("IGULORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("IGULORA_TUNE", raising=False)
    fresh()
    yield tmp_path / "cache"
    fresh()


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> None:
    """``IGULORA_TUNE=1``."""
    monkeypatch.setenv("IGULORA_TUNE", "1")


def costs(**by_form: float) -> tuning.Timer:
    """A timer by whose clock every form takes what is said here, and some noise."""

    def timer(runs: Runs) -> dict[Product, list[float]]:
        return {p: [by_form[p.form] * noise for noise in (1.0, 1.001, 0.999, 1.0)] for p in runs}

    return timer


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """Problems that were measured, by a clock that likes ``pointers``."""
    seen: list[Problem] = []

    def timer(runs: Runs) -> dict[Product, list[float]]:
        return costs(library=2.0, pointers=1.0, descriptors=3.0, augmented=3.0)(runs)

    measure = tuning.measure

    def watched(problem: Problem, rows: int, rank: int, device: torch.device) -> tuning.Measurement:
        seen.append(problem)
        return measure(problem, rows, rank, device, timer)

    monkeypatch.setattr(tuning, "measure", watched)
    return seen


def call(device: torch.device, rows: int = M, **options: Any) -> Product:
    """What is chosen for a forward product of this many rows."""
    A, weight, F = (torch.empty(shape, device=device) for shape in ((rows, K), (N, K), (R, N)))
    return choose(A, weight, F, transposed=True, **options)


def pointers(device: torch.device) -> Product:
    return next(p for p in choice.candidates(FORWARD, choice.family(device)) if p.form == "pointers")


# Measuring


@pytest.mark.parametrize(
    ("problem", "times", "expected"),
    [
        (FORWARD, {"library": 3.0, "pointers": 2.0}, "pointers"),
        (FORWARD, {"library": 2.0, "pointers": 3.0}, "library"),
        (BACKWARD, {"library": 3.0, "pointers": 2.0}, "pointers"),
        (BACKWARD._replace(dropout=True), {"library": 3.0, "pointers": 2.0}, "pointers"),
        (TEMPORARY, {"library": 3.0, "pointers": 2.0, "augmented": 1.0}, "augmented"),
        (BACKWARD._replace(temporary=True), {"library": 3.0, "pointers": 2.0, "augmented": 1.0}, "augmented"),
        (TEMPORARY, {"library": 1.0, "pointers": 2.0, "augmented": 1.0}, "library"),
    ],
)
def test_the_fastest_form_is_chosen(
    device: torch.device, problem: Problem, times: dict[str, float], expected: str
) -> None:
    found = tuning.measure(problem, M, R, device, costs(**times, descriptors=9.0))
    assert found.product.form == expected
    assert found.dropped == {}
    assert {p.form for p in found.timings} >= set(times)


def test_the_fastest_tile_is_chosen(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = [
        gemm.config("sm_86", 4, descriptors=False),
        choice.Tile(16, 16, 16, 8, 4, 2),
        choice.Tile(32, 16, 32, 8),
    ]
    monkeypatch.setattr(gemm, "candidates", lambda *args, **options: tiles)

    def timer(runs: Runs) -> dict[Product, list[float]]:
        return {p: [float(p.tile.BLOCK_M or 99)] * 3 for p in runs if p.form != "descriptors"}

    assert tuning.measure(FORWARD, M, R, device, timer).product == Product("pointers", tiles[1])


@pytest.mark.parametrize(
    ("library", "other", "wins"),
    [
        (Timing(1.0, 0.0), Timing(0.995, 0.0), False),  # half a percent is noise anywhere
        (Timing(1.0, 0.0), Timing(0.98, 0.0), True),
        (Timing(1.0, 0.1), Timing(0.95, 0.0), False),  # within the library's spread
        (Timing(1.0, 0.0), Timing(0.95, 0.1), False),  # within its own
        (Timing(1.0, 0.01), Timing(0.95, 0.01), True),
        (Timing(1.0, 0.0), Timing(float("nan"), 0.0), False),
    ],
)
def test_the_library_wins_ties(library: Timing, other: Timing, wins: bool) -> None:
    fused = Product("pointers")
    assert tuning.fastest({LIBRARY: library, fused: other}) == (fused if wins else LIBRARY)


def test_one_slow_run_decides_nothing() -> None:
    timings = {LIBRARY: tuning._timing([1.0] * 9 + [50.0]), Product("pointers"): tuning._timing([0.5] * 9 + [90.0])}
    assert tuning.fastest(timings) == Product("pointers")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda out: out.index_fill(1, torch.tensor([N - 1], device=out.device), 0.0), "differs from the library's"),
        (lambda out: out.index_fill(0, torch.tensor([0], device=out.device), 0.0), "differs from the library's"),
        (lambda out: out.masked_fill(torch.eye(M, N, device=out.device) > 0, torch.nan), "differs from the library's"),
        (lambda out: out[:-1], "gave (19, 24) torch.float32 instead of (20, 24)"),
        (lambda out: out.double(), "gave (20, 24) torch.float64 instead of"),
        (lambda out: 1 // 0, "ZeroDivisionError: integer"),
        (lambda out: (_ for _ in ()).throw(RuntimeError("two\nlines")), "RuntimeError: two"),
    ],
)
def test_a_form_that_is_wrong_or_raises_is_left_out(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], Any], reason: str
) -> None:
    launch = gemm.launch_gemm_rank
    monkeypatch.setattr(product.gemm, "launch_gemm_rank", lambda *a, **k: _broken(fault, launch(*a, **k)))
    found = tuning.measure(FORWARD, M, R, device, costs(library=9.0, pointers=1.0, descriptors=1.0))
    assert found.product == LIBRARY
    assert set(found.timings) == {LIBRARY}
    assert found.dropped
    for text in found.dropped.values():
        assert text.startswith(reason)
        assert "\n" not in text


def _broken(fault: Callable[[Tensor], Any], out: Tensor) -> Any:
    broken = fault(out)
    return next(broken) if hasattr(broken, "__next__") else broken


def test_a_missing_rank_term_is_noticed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = gemm.launch_gemm_rank

    def without(A: Tensor, weight: Tensor, S: Tensor, *rest: Any, **options: Any) -> Tensor:
        return launch(A, weight, torch.zeros_like(S), *rest, **options)

    monkeypatch.setattr(product.gemm, "launch_gemm_rank", without)
    for problem in (FORWARD, BACKWARD, BACKWARD._replace(dropout=True)):
        assert tuning.measure(problem, M, R, device, costs(library=1.0)).timings.keys() == {LIBRARY}


def test_faults_of_the_library_are_nobodys_to_hide(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("no addend")

    monkeypatch.setattr(product.rank_term, "launch_rank_term", fails)
    with pytest.raises(RuntimeError, match="no addend"):
        tuning.measure(FORWARD, M, R, device, costs(library=1.0, pointers=1.0))


def test_measuring_leaves_random_numbers_alone(device: torch.device) -> None:
    state = torch.get_rng_state()
    tuning.measure(FORWARD, M, R, device, costs(library=1.0, pointers=1.0, descriptors=1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_hosts_clock_times_every_form_in_turns() -> None:
    ticks, order = iter(range(100)), []
    runs = {p: lambda p=p: order.append(p.form) for p in (LIBRARY, Product("pointers"))}
    times = tuning.host_times(runs, clock=lambda: next(ticks))  # type: ignore[arg-type]
    assert order == ["library", "pointers"] * 3
    assert times == {p: [1000.0] * 3 for p in runs}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("transposed", [True, False])
def test_a_device_is_timed_by_its_events(device: torch.device, transposed: bool) -> None:
    found = tuning.tune(Problem(transposed, torch.bfloat16, 512, 1024, 2048, 32), 500, 32, device)
    assert all(timing.median > 0 for timing in found.timings.values())
    assert found.timings[found.product].median <= found.timings[LIBRARY].median


# Candidates and defaults


def test_candidates_start_with_the_library() -> None:
    for name in SHARED_MEMORY:
        for dtype in (torch.bfloat16, torch.float32):
            for rank in (16, 32, 64, 128, 256):
                problem = Problem(True, dtype, 2048, 4096, 4096, rank)
                found = choice.candidates(problem, name)
                forms = {p.form for p in found}
                assert found[0] == LIBRARY
                assert "pointers" in forms
                assert ("descriptors" in forms) == (name in gemm.DESCRIPTOR_FAMILIES and dtype == torch.bfloat16)
                assert "augmented" not in forms
                assert len({str(p) for p in found}) == len(found)  # names in the file


def test_a_weight_is_copied_only_where_it_is_a_temporary() -> None:
    copies = Product("augmented")
    assert copies in choice.candidates(TEMPORARY, "sm_80")
    assert copies not in choice.candidates(FORWARD, "sm_80")
    assert copies not in choice.candidates(BACKWARD._replace(temporary=True, dropout=True), "sm_80")


def test_every_family_has_a_default_and_so_has_an_unknown_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for problem in (
        FORWARD,
        FORWARD._replace(rows=8192, columns=4096),
        FORWARD._replace(rows=8192, dtype=torch.float32),
    ):
        for name in SHARED_MEMORY:
            assert choice.default(problem, name) in choice.candidates(problem, name)
    monkeypatch.setattr(choice, "family", lambda device: "sm_990")
    assert call(device) == LIBRARY
    assert choice.candidates(FORWARD, "sm_990")[0] == LIBRARY


def test_nothing_is_measured_unasked(device: torch.device, measured: list[Problem], folder: Path) -> None:
    assert call(device) == LIBRARY
    assert measured == []
    assert not folder.exists()


# Looking up


@pytest.mark.usefixtures("search")
def test_a_shape_is_measured_once_and_kept(device: torch.device, measured: list[Problem], folder: Path) -> None:
    expected = pointers(device)
    assert call(device) == expected
    assert call(device) == expected
    assert call(device, rows=17) == expected  # the same power of two
    assert measured == [FORWARD]
    choice.forget()
    assert call(device) == expected  # from the file
    assert measured == [FORWARD]
    assert call(device, rows=33) == expected
    assert call(device, temporary=True) == expected
    assert measured == [FORWARD, FORWARD._replace(rows=64), TEMPORARY]
    (entries,) = json.loads((folder / "choices.json").read_text())["choices"].values()
    assert set(entries) == {str(problem) for problem in measured}
    assert entries[str(FORWARD)]["product"] == str(expected)
    assert (entries[str(FORWARD)]["rows"], entries[str(FORWARD)]["rank"]) == (M, R)
    assert set(entries[str(TEMPORARY)]["tried_ms"]) >= {"library", str(expected), "augmented"}


def test_the_choice_is_what_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = tuning._operands(FORWARD, M, R, device)
    launched: list[Any] = []
    launch = gemm.launch_gemm_rank
    monkeypatch.setattr(product.gemm, "launch_gemm_rank", lambda *a, **k: (launched.append(a[9]), launch(*a, **k))[1])
    library = product.base_product(*operands, transposed=True)
    assert launched == []
    choice.adopt(operands[0].device, FORWARD, pointers(device))
    fused = product.base_product(*operands, transposed=True)
    assert launched == [pointers(device).tile]
    torch.testing.assert_close(fused, library, rtol=1e-4, atol=1e-4)
    with choice.use_product(LIBRARY):
        assert call(device) == LIBRARY


def test_dropout_and_temporaries_are_problems_of_their_own(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, bool]] = []
    monkeypatch.setattr(product, "choose", lambda *a, **k: (asked.append(k), LIBRARY)[1])
    dropped = tuning._operands(BACKWARD._replace(dropout=True), M, R, device)
    product.base_product(*dropped, transposed=False)
    product.base_product(*dropped[:-1], 0.0, transposed=False, temporary=True)
    assert asked == [
        {"transposed": False, "temporary": False, "dropout": True},
        {"transposed": False, "temporary": True, "dropout": False},
    ]


@pytest.mark.usefixtures("search")
def test_captures_and_traces_are_not_held_up(
    device: torch.device, measured: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert call(device) == LIBRARY
    assert measured == []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not choice._may_measure(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choice._may_measure(torch.device("cuda"))
    assert call(device) == pointers(device)  # nothing was settled by the capture
    assert measured == [FORWARD]


def test_a_capture_runs_what_was_measured_before(
    device: torch.device, measured: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.tune(FORWARD, M, R, device)
    choice.forget()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert call(device) == pointers(device)
    assert measured == [FORWARD]


def test_descriptors_give_way_where_operands_are_not_aligned(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "family", lambda device: "sm_90")
    A, F = torch.empty((M, 64), dtype=torch.float16, device=device), torch.empty((R, 32), device=device)
    weight = torch.empty((32, 64), dtype=torch.float16, device=device)
    described = Product("descriptors", choice.Tile(64, 64, 32))
    choice.adopt(A.device, Problem(True, torch.float16, 32, 32, 64, 16), described)
    assert choose(A, weight, F, transposed=True) == described
    odd = torch.empty((M, 65), dtype=torch.float16, device=device)[:, :64]
    assert choose(odd, weight, F, transposed=True) == LIBRARY


def test_descriptors_are_not_tried_on_rows_they_cannot_describe(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "family", lambda device: "sm_90")
    found = tuning.measure(
        FORWARD._replace(dtype=torch.float16, columns=23, inner=33), 3, R, device, costs(library=1.0, pointers=2.0)
    )
    assert found.dropped
    assert {(p.form, reason) for p, reason in found.dropped.items()} == {
        ("descriptors", "row strides are no multiples of 16 bytes")
    }


@pytest.mark.usefixtures("search")
def test_no_memory_to_measure_is_no_reason_to_stop(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(tuning, "measure", full)
    with pytest.warns(ChoiceFileWarning, match="no memory left to measure .* runs the default, library"):
        assert call(device) == LIBRARY
    assert call(device) == LIBRARY  # and is not tried again


# On disk


def test_choices_hold_for_one_set_of_versions(
    device: torch.device, measured: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.tune(FORWARD, M, R, device)
    names = {choice.environment(device)}
    changes = [
        (torch, "__version__", "9.9"),
        (choice.triton, "__version__", "9.9"),
        (choice, "_sources", lambda: "other"),
    ]
    if device.type == "cuda":
        changes += [(choice, "_driver", lambda: "9.9"), (torch.cuda, "get_device_name", lambda device: "other")]
    for where, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            choice.environment.cache_clear()
            choice.forget()
            names.add(choice.environment(device))
            assert call(device) == LIBRARY
    assert len(names) == len(changes) + 1
    choice.environment.cache_clear()
    choice.forget()
    assert call(device) == pointers(device)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  12",
            "550.54.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build  (dvs@x)\n", "560.35.03"),
        ("something else", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_drivers_version_is_read_from_the_system(
    monkeypatch: pytest.MonkeyPatch, text: str | None, version: str
) -> None:
    def read(self: Path, **options: Any) -> str:
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", None, raising=False)
    assert choice._driver.__wrapped__() == version


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b'{"format": 1}',
        b'{"format": 2, "choices": {}}',
        b'{"format": 1, "choices": []}',
        b'{"format": 1, "choices": {"x": []}}',
        b'{"format": 1, "choices": {"x": {"y": 3}}}',
        b"[" * 100_000,
    ],
    ids=range(10),
)
def test_a_damaged_file_is_replaced_after_one_warning(
    device: torch.device, measured: list[Problem], folder: Path, content: bytes, recwarn: pytest.WarningsRecorder
) -> None:
    folder.mkdir()
    (folder / "choices.json").write_bytes(content)
    assert call(device) == LIBRARY
    choice.forget()
    assert call(device) == LIBRARY
    tuning.tune(FORWARD, M, R, device)
    assert "damaged or cannot be read" in str(recwarn.pop(ChoiceFileWarning).message)
    assert len(recwarn) == 0
    choice.forget()
    assert call(device) == pointers(device)


@pytest.mark.parametrize(
    "entry", [{}, {"product": "pointers 3x5x7 w1 s1"}, {"product": ["library"]}, {"product": None}]
)
def test_a_damaged_entry_is_ignored_after_a_warning(
    device: torch.device, entry: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    choice_file.add(choice.environment(device), {str(FORWARD): entry, str(BACKWARD): {"product": "library"}})
    assert call(device) == LIBRARY
    assert call(device) == LIBRARY
    assert "damaged entry" in str(recwarn.pop(ChoiceFileWarning).message)
    assert len(recwarn) == 0
    assert choice._recall(device, BACKWARD) == LIBRARY


def test_a_folder_that_cannot_be_written_costs_one_warning(
    device: torch.device, measured: list[Problem], folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder.write_text("a file")
    tuning.tune(FORWARD, M, R, device)
    tuning.tune(FORWARD, M, R, device)
    assert "cannot keep measured choices" in str(recwarn.pop(ChoiceFileWarning).message)
    assert len(recwarn) == 0
    assert call(device) == pointers(device)  # in this process it holds


def test_writers_do_not_lose_each_others_entries(folder: Path) -> None:
    """Two processes write at once: this one and another."""
    code = (
        "import sys\n"
        "from igulora.kernels import choice_file\n"
        "sys.stdout.write('ready'); sys.stdout.flush(); sys.stdin.readline()\n"
        "for i in range(25):\n"
        "    assert choice_file.add(f'device {i % 2}', {f'other {i}': {}})\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder.parent
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.read(5) == "ready"
        other.stdin.write("go\n")
        other.stdin.flush()
        for i in range(25):
            assert choice_file.add(f"device {i % 2}", {f"own {i}": {}})
    assert other.returncode == 0
    kept = {name for entries in choice_file.read().values() for name in entries}
    assert kept == {f"{who} {i}" for who in ("own", "other") for i in range(25)}
    assert sorted(path.name for path in folder.iterdir()) == ["choices.json", "choices.lock"]


def test_clearing_forgets_file_and_process(device: torch.device, measured: list[Problem], folder: Path) -> None:
    assert facade.clear() == 0
    assert not folder.exists()
    tuning.tune(FORWARD, M, R, device)
    tuning.tune(BACKWARD, M, R, device)
    assert call(device) == pointers(device)
    assert facade.clear() == 2
    assert facade.kept() == {}
    assert call(device) == LIBRARY
    (folder / "choices.json").write_text("damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert facade.clear() == 0
    assert not (folder / "choices.json").exists()


def test_a_crash_while_writing_leaves_the_old_file(
    device: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice_file.add("x", {"a": {}})

    def crash(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        choice_file.add("x", {"b": {}})
    assert choice_file.read() == {"x": {"a": {}}}
    assert sorted(path.name for path in folder.iterdir()) == ["choices.json", "choices.lock"]


# The environment


@pytest.mark.parametrize(("value", "asked"), [("", False), ("0", False), ("1", True)])
def test_a_search_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, value: str, asked: bool) -> None:
    monkeypatch.setenv("IGULORA_TUNE", value)
    assert settings.search_asked() is asked


def test_other_values_of_the_search_raise(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IGULORA_TUNE", "yes")
    with pytest.raises(ValueError, match="expected IGULORA_TUNE to be 0, 1 or unset, got 'yes'"):
        call(device)


def test_where_choices_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert choice_file.path() == tmp_path / "cache" / "choices.json"
    monkeypatch.delenv("IGULORA_CACHE_DIR")
    assert choice_file.path() == tmp_path / "xdg" / "igulora" / "choices.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choice_file.path() == tmp_path / ".cache" / "igulora" / "choices.json"


# Pieces


def test_buckets() -> None:
    assert [choice.bucket(n) for n in (1, 2, 3, 4, 5, 2048, 2049)] == [1, 2, 4, 4, 8, 2048, 4096]


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("rank", [1, 7, 16, 33])
def test_the_augmented_form_is_exact(device: torch.device, transposed: bool, groups: int, rank: int) -> None:
    problem = Problem(transposed, torch.float32, 32, N, K, block_rank(rank), True)
    A, weight, S, F, coef, *_ = tuning._operands(problem, M, rank, device)
    assert S.shape[1] == padded_rank(rank)
    alpha = torch.rand(groups, device=device) if groups else None
    bias = torch.randn(N, device=device) if transposed else None
    ours = product.base_product(
        A, weight, S, F, coef, alpha, bias, None, 0.0, transposed=transposed, product=Product("augmented")
    )

    def plain(dtype: torch.dtype) -> Tensor:
        a, w, s, f = A.to(dtype), weight.to(dtype), S[:, :rank].to(dtype), F.to(dtype)
        if alpha is not None:
            s = s * alpha.to(dtype).repeat_interleave(M // groups)[:, None]
        if coef is not None:
            f = f * (coef[2] * coef[0] * coef[1]).to(dtype)[:, None]
        y = a @ (w.t() if transposed else w) + s @ f
        return y if bias is None else y + bias.to(dtype)

    assert_exact(ours, plain(torch.float32), plain(torch.float64))


def test_a_forced_form_that_cannot_run_is_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "family", lambda device: "sm_90")
    with (
        choice.use_product(Product("augmented")),
        pytest.raises(ValueError, match="no dropout with the form 'augmented'"),
    ):
        call(device, dropout=True)
    A, weight, F = (torch.empty(shape, device=device) for shape in ((M, K + 1), (N, K + 1), (R, N)))
    with choice.use_product(Product("descriptors")), pytest.raises(ValueError, match="multiples of 16 bytes"):
        choose(A, weight, F, transposed=True)
