"""The compile report: its parsers and arithmetic on examples small enough to check by hand, its judgement, and the shipped kernels."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "benchmarks"
RESULTS = FOLDER / "results" / "compile"
SCRIPTS = ("assembly", "compiled", "compile_report", "render_compiled")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The report's modules, imported as the scripts import one another."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield {name: importlib.import_module(name) for name in SCRIPTS}
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def report(
    *arguments: str, output: Path | None = None, interpret: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The command, in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"TRITON_INTERPRET": interpret} if interpret else {}
    command = [sys.executable, str(FOLDER / "compile_report.py"), *arguments]
    command += ["--output", str(output)] if output else []
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_widths_of_accesses(scripts: dict[str, ModuleType]) -> None:
    ptx = """
    ld.param.b64 %rd1, [_kernel_param_0];
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_first.v2.b64 { %rd2, %rd3 }, [ %rd1 + 0 ];
    ld.global.nc.b16 %rs1, [ %rd1 ];
    ld.acquire.gpu.global.b32 %r5, [ %rd1 ];
    ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6;
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x4, %r6;
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd3, {%r2, %r3}], [%r4];
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd5, {%r2, %r3}], [%r1];
    @%p2 st.global.v8.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 };
    st.global.b8 [ %rd1 ], %rs2;
    st.shared.v4.b32 [ %r9 ], { %r1, %r2, %r3, %r4 };
    """
    loads, stores = scripts["assembly"].accesses(ptx)
    assert loads == {"16": 3, "2": 1, "4": 2, "tma": 1}
    assert stores == {"32": 1, "1": 1, "tma": 1}
    assert scripts["assembly"].widest({"2": 64, "8": 1}) == 8
    assert scripts["assembly"].widest({}) == 0
    assert (
        scripts["assembly"].atomics("atom.global.gpu.acq_rel.add.f32 %r1; redux.sync.add.s32 %r1; red.global.add.f32")
        == 2
    )


def test_widths_of_accesses_of_amd(scripts: dict[str, ModuleType]) -> None:
    assembly = """
    global_load_dwordx4 v[0:3], v4, s[0:1]
    buffer_load_dword v1, v2, s[0:3], 0 offen
    buffer_load_ushort v1, v2, s[0:3], 0 offen
    global_load_b128 v[0:3], v4, s[0:1]
    global_store_dwordx2 v0, v[2:3], s[0:1]
    ds_read_b128 v[0:3], v4
    global_atomic_add_f32 v0, v1, s[0:1]
    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
    """
    loads, stores = scripts["assembly"].accesses_amd(assembly)
    assert loads == {"16": 2, "4": 1, "2": 1}
    assert stores == {"8": 1}
    assert scripts["assembly"].atomics(assembly) == 1
    assert scripts["assembly"].tensor_instructions_amd(assembly) == {"mfma bf16": 1}


def test_tensor_instructions(scripts: dict[str, ModuleType]) -> None:
    ptx = """
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
    wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%r1}, %rd1, %rd2, p, 1, 1, 0, 0;
    tcgen05.mma.cta_group::1.kind::tf32 [%r1], %rd1, %rd2, %r2, p;
    wgmma.commit_group.sync.aligned;
    """
    found = scripts["assembly"].tensor_instructions(ptx)
    assert found == {"mma.sync bf16": 1, "mma.sync tf32": 1, "wgmma.mma_async f16": 1, "tcgen05.mma tf32": 1}
    dot = "%a = tt.dot %x, %w, %c : tensor<64x32xf32, #ttg.dot_op<{opIdx = 0, parent = #mma}>> * t -> tensor<64x64xf32, #{}>"
    ttgir = "\n".join(dot.replace("{}", layout) for layout in ("mma", "mma1", "blocked", "blocked2"))
    assert scripts["assembly"].scalar_dots(ttgir) == 2


def test_lines_that_move_tiles_in_narrow_accesses(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("load\nload  # narrow: a gather\nload\nload\nstore\nload\n", encoding="utf-8")
    tile = "%x = tt.load %p, %m, %o : tensor<{}x!tt.ptr<bf16>> loc(#loc{})"
    ttir = "\n".join(
        [
            tile.format("64x32", 11),  # line 1, by a name: 4096 bytes in accesses of 2: 32 a thread
            tile.format("64x32", 2),  # line 2 gives a reason
            tile.format("64x32", 13),  # line 3, by a call: wide once, narrow in its other form
            tile.format("64x8", 4),  # line 4: 1024 bytes, too few to give 16 to each of 128 threads
            "tt.store %p, %x, %m : tensor<512x!tt.ptr<f32>> loc(#loc5)",
            tile.format("64x32", 6),  # line 6: wide, though the assembly's second line is numbered 7
            *(f'#loc{n} = loc("{source}":{n}:4)' for n in range(1, 7)),
            '#loc11 = loc("x"(#loc1))',
            "#loc13 = loc(callsite(#loc3 at #loc1))",
        ]
    )
    lines = [f'.file 1 "{source}"']
    for number, accesses in enumerate(
        ("ld.global.b16", "ld.global.b16", "ld.global.b32;ld.global.v4.b32", "ld.global.b16")
    ):
        lines += [f".loc 1 {number + 1} 4", *(f"{access} x, [y];" for access in accesses.split(";"))]
    lines += [".loc 1 5 4, function_name $L__info_string0, inlined_at 1 1 1", "st.global.v2.b32 [y], x;"]
    lines += [
        "// begin inline asm",
        ".loc 1 6 4",
        "ld.global.b32 x, [y];",
        ".loc 1 7 4",
        "ld.global.v4.b32 x, [y];",
        "// end inline asm",
    ]
    assert scripts["assembly"].narrow_lines(ttir, "\n".join(lines), threads=128) == [
        "load at kernel.py:1: 2 bytes, tiles of 4096",
        "store at kernel.py:5: 8 bytes, tiles of 2048",
    ]


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "percent", "bound"),
    [
        ("sm_80", 32, 0, 4, 100, "warps"),
        # 96 registers * 32 lanes = 3072 of a file of 16384: 5 warps a file, 20 in all, 2 programs of 8.
        ("sm_80", 96, 0, 8, 25, "registers"),
        # 97 take 104: 3328, 4 warps a file, still 2 programs; 129 take 136: 3 warps a file, 1 program.
        ("sm_80", 97, 0, 8, 25, "registers"),
        ("sm_80", 129, 0, 8, 12.5, "registers"),
        # 164 KiB for all, 1 KiB more for each: 3 programs of 50 KiB.
        ("sm_80", 32, 50 * 1024, 4, 18.75, "shared memory"),
        ("sm_90", 32, 50 * 1024, 4, 25, "shared memory"),
        ("sm_86", 32, 0, 2, 200 / 3, "programs"),
        ("sm_80", 32, 166_912, 8, 12.5, "shared memory"),
        ("sm_80", 32, 167_000, 8, 0, "shared memory"),
        # 512 vector registers a lane and file: 4 waves of 128 in each of 4 files.
        ("gfx942", 128, 0, 4, 50, "registers"),
    ],
)
def test_occupancy(
    scripts: dict[str, ModuleType], arch: str, registers: int, shared: int, warps: int, percent: float, bound: str
) -> None:
    assert scripts["compiled"].occupancy(arch, registers, shared, warps) == (pytest.approx(percent), bound)


def test_tensor_memory_bounds_occupancy(scripts: dict[str, ModuleType]) -> None:
    assert scripts["compiled"].occupancy("sm_100", 32, 0, 4, tensor_columns=256) == (12.5, "tensor memory")


def test_a_specimen_names_every_argument(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    specimen = importlib.import_module("toy_kernels").double("short", stride=1)
    del specimen.types["N"]
    with pytest.raises(ValueError, match="expected specimen 'short' to give each argument of its kernel once.* N"):
        scripts["compiled"].source(specimen)


def test_labels_differ(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    toys = importlib.import_module("toy_kernels")
    module: Any = ModuleType("toys")
    module.specimens = lambda family: [toys.double("same", stride=1), toys.double("same", stride=2)]
    with pytest.raises(ValueError, match="expected labels that differ.*same"):
        scripts["compile_report"].specimens(module, "sm_80")


@pytest.mark.long
def test_faults_are_found(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    done = report("--module", "toy_faults", "--arch", "sm_80", "--check", output=output)
    assert done.returncode == 1, done.stderr
    record = json.loads(output.read_text(encoding="utf-8"))
    found = {(breach["label"], breach["rule"].partition(".py:")[0]) for breach in record["breaches"]}
    rows = {row["label"]: row for row in record["rows"]}
    assert found == {
        ("_unlisted_kernel of toy_faults", "every kernel in a specimen"),
        ("spills", "nothing on the stack"),
        ("too much shared memory", "shared memory within the limit"),
        ("scalar product", "products on tensor cores"),
        ("strided", "loads of 16 bytes"),
        ("strided", "16 bytes in each load at toy_kernels"),
        ("atomic", "no atomic access"),
        ("wrong", "it compiles"),
        ("ends", "it compiles"),
    }
    assert rows["spills"]["stack"] > 0
    assert rows["contiguous"]["stack"] == rows["contiguous"]["reloads"] == 0
    assert "name_that_is_nowhere" in done.stdout
    assert "the compiler ended the process" in done.stdout


@pytest.mark.long
def test_kernels_without_fault_pass(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    done = report("--module", "toy_kernels", "--arch", "sm_80", "sm_90", "sm_100", "gfx942", "--check", output=output)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(output.read_text(encoding="utf-8"))
    rows = {(row["label"], row["arch"]): row for row in record["rows"]}
    names = {arch: next(iter(rows["product bf16", arch]["tensor"])) for arch in ("sm_80", "sm_90", "sm_100", "gfx942")}
    assert names["sm_80"] == "mma.sync bf16"
    assert names["sm_90"] == "wgmma.mma_async bf16"
    assert names["sm_100"].startswith("tcgen05.mma")
    assert names["gfx942"] == "mfma bf16"
    assert rows["double", "sm_80"]["loads"].keys() == rows["double", "sm_80"]["stores"].keys() == {"16"}
    assert rows["product fp32", "gfx942"]["tensor"].keys() == {"mfma f32"}
    assert record["failed"] == []


def test_the_page_shows_what_the_reports_hold(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    row = {
        "kernel": "_product_kernel",
        "label": "product bf16",
        "arch": "sm_90",
        "warps": 4,
        "stages": 3,
        "shared": 49152,
        "tensor": {"wgmma.mma_async bf16": 4},
        "loads": {"tma": 4, "2": 1},
        "stores": {"16": 4},
        "occupancy": 25.0,
        "bound": "shared memory",
    }
    for triton, registers, stack in (("3.10.0", 70, 8), ("3.9.0", 64, 0)):
        record = {
            "date": "2026-01-02",
            "versions": {"triton": triton, "commit": "abc"},
            "breaches": [],
            "failed": [{"label": "product fp32", "arch": "gfx942", "reason": "no such precision"}],
            "rows": [row | {"registers": registers, "stack": stack}],
        }
        (tmp_path / f"{triton}.json").write_text(scripts["compile_report"].dump(record), encoding="utf-8")
    text = scripts["render_compiled"].page(scripts["render_compiled"].read(tmp_path))
    assert "| 3.10.0 | 2026-01-02 | abc | 1 | 1 | 0 | 70 | `wgmma.mma_async` |" in text
    assert "| product bf16 | 4/3 | 64/70+8 | 48.0 | wgmma.mma_async bf16 ×4 | TMA | 16 | 25 (shared memory) |" in text
    assert "registers, 3.9.0/3.10.0" in text
    assert "no such precision: product fp32 on gfx942" in text


def test_a_whole_report_only_is_kept() -> None:
    done = report("--keep", "--arch", "sm_80")
    assert done.returncode == 2
    assert "--keep is for whole reports" in done.stderr


def test_nothing_is_reported_of_interpreted_kernels() -> None:
    done = report("--check", interpret="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_a_filter_that_leaves_nothing_is_an_error() -> None:
    done = report("--kernel", "no such kernel", "--arch", "sm_80", "--check")
    assert done.returncode == 2
    assert "found none" in done.stderr


def test_the_digest_is_of_code_alone(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    module: Any = ModuleType("kernels")
    module.__file__ = str(tmp_path / "kernels.py")
    texts = (
        "@triton.jit\ndef f(x):\n    return x + 1\n",
        '@triton.jit\ndef f(x):\n    """Adds."""\n    return x + 1  # one\n\ndef launch():\n    f(1)\n',
        "@triton.jit\ndef f(x):\n    return x + 2\n",
    )
    digests = []
    for text in texts:
        Path(module.__file__).write_text(text, encoding="utf-8")
        digests.append(scripts["compile_report"].digest([module]))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.long
def test_shipped_kernels_break_no_rule(scripts: dict[str, ModuleType]) -> None:
    """A few configurations: all of them take minutes and are in the kept reports, which are held against the shipped kernels below."""
    archs = [name for name in scripts["compiled"].ARCHITECTURES if name.startswith("sm_")]
    done = report("--arch", *archs, "--check", "--every", "48")
    assert done.returncode == 0, done.stdout.partition("rules broken")[2] + done.stderr


def test_kept_reports_are_clean_and_of_the_shipped_kernels(scripts: dict[str, ModuleType]) -> None:
    """Of all configurations on all architectures, by the lowest Triton that we support, the pinned one and newer ones."""
    script = scripts["compile_report"]
    loaded = [importlib.import_module(name) for name in script.module_names(None)]
    kinds = [name for name in scripts["compiled"].ARCHITECTURES if name.startswith("sm_")]
    shipped = {(label, arch) for module in loaded for arch in kinds for label in script.specimens(module, arch)}
    records = scripts["render_compiled"].read(RESULTS)
    assert records, "run `make compile-report` with the lowest, the pinned and the newest Triton"
    for record in records:
        kept = {(row["label"], row["arch"]) for row in record["rows"] if row["arch"] in kinds}
        assert (record["kernels"], kept, record["breaches"]) == (script.digest(loaded), shipped, []), (
            f"run `make compile-report TRITON={record['versions']['triton']}`: kernels or configurations have changed"
        )
    releases = [record["versions"]["triton"] for record in records]
    pinned = re.search(r"^triton==(.+)$", (FOLDER.parent / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert pinned is not None
    assert releases[0].startswith("3.6.")
    assert pinned[1] in releases
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == scripts["render_compiled"].page(records)
