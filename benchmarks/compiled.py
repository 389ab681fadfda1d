"""What the compiler makes of a kernel, without a device: registers, memory, tensor-core instructions, widths of global accesses.

:func:`compile_specimen` compiles for one architecture and reads the PTX (or AMD assembly), Triton's own IR, and what ``cuobjdump`` says of
the binary; :func:`breaches` holds the result against what every kernel of ours must satisfy.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from assembly import (
    WIDE,
    accesses,
    accesses_amd,
    atomics,
    narrow_lines,
    scalar_dots,
    tensor_instructions,
    tensor_instructions_amd,
    widest,
    width_bytes,
)

from igulora.kernels.fused.common import SHARED_MEMORY, Specimen
from igulora.kernels.fused.launch import all_registers

_FILES = 4  # register files of a multiprocessor; each serves the warps of one scheduler
_UNIT = 8  # registers per thread come in multiples of this


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor (CUDA programming guide, technical specifications by compute capability; AMD's CDNA 3 guide).

    Attributes:
        warps, programs: how many may be resident.
        shared: bytes of shared memory for all of them, of which each takes ``reserved`` beyond what it asks for.
        tensor_columns: columns of tensor memory.
        family: what a kernel's ``specimens`` is asked for.
    """

    warps: int
    programs: int
    shared: int
    family: str
    registers: int = 65_536
    reserved: int = 1024
    warp_size: int = 32
    tensor_columns: int = 0


def _nvidia(family: str, warps: int, programs: int, *, tensor_columns: int = 0) -> Architecture:
    """One program may take all shared memory but what is reserved for it."""
    shared = SHARED_MEMORY[family] + Architecture.reserved
    return Architecture(warps, programs, shared, family, tensor_columns=tensor_columns)


ARCHITECTURES = {
    "sm_80": _nvidia("sm_80", 64, 32),
    "sm_86": _nvidia("sm_86", 48, 16),
    "sm_90": _nvidia("sm_90", 64, 32),
    "sm_100": _nvidia("sm_100", 64, 32, tensor_columns=512),
    "sm_120": _nvidia("sm_120", 48, 24),
    "gfx942": Architecture(32, 16, 65_536, "sm_86", registers=131_072, reserved=0, warp_size=64),
}


@dataclass(frozen=True)
class Row:
    """One specimen on one architecture.

    Attributes:
        registers: per thread.
        stack: bytes per thread that went to memory: spills and arrays.
        reloads: number of instructions that read the stack. There may be none: for sm_120, the assembler of Triton 3.6 stores a zero to the
            stack at each tile copy and never reads it.
        shared: bytes per program, asked for at the launch and static together.
        tensor: number of tensor-core instructions in the code, by instruction and operand type.
        scalar_dots: products that were left to ordinary arithmetic.
        loads, stores: number of global accesses in the code by width in bytes, or ``"tma"``.
        narrow: source lines that move a tile large enough for 16 bytes per thread in narrower accesses, and say no reason.
        atomics: number of atomic global accesses in the code.
        occupancy: upper bound of resident warps, percent of the architecture's; ``bound`` is what sets it.
        again: whether it was assembled a second time, with all registers, because of the stack.
        seconds: what compiling took.
    """

    kernel: str
    label: str
    arch: str
    warps: int
    stages: int
    registers: int
    stack: int
    reloads: int
    shared: int
    tensor: dict[str, int]
    scalar_dots: int
    loads: dict[str, int]
    stores: dict[str, int]
    narrow: list[str]
    atomics: int
    occupancy: float
    bound: str
    again: bool = False
    seconds: float = field(compare=False, default=0.0)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def occupancy(arch: str, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> tuple[float, str]:
    """Upper bound of resident warps in percent, and the resource that sets it.

    Args:
        arch: a key of :data:`ARCHITECTURES`.
        registers: per thread.
        shared: bytes per program.
        warps: per program.
        tensor_columns: columns of tensor memory per program.
    """
    a = ARCHITECTURES[arch]
    per_warp = max(_up(registers, _UNIT), _UNIT) * a.warp_size
    limits = {"warps": a.warps // warps, "programs": a.programs}
    # A program's warps spread over the register files evenly, so that a lone warp blocks as much as four.
    limits["registers"] = a.registers // _FILES // per_warp * _FILES // _up(warps, _FILES)
    if shared + a.reserved:
        limits["shared memory"] = a.shared // (_up(shared, 128) + a.reserved)
    if tensor_columns and a.tensor_columns:
        limits["tensor memory"] = a.tensor_columns // tensor_columns
    bound = min(limits, key=lambda name: limits[name])
    return 100 * limits[bound] * warps / a.warps, bound


def _tool(name: str, *arguments: str, binary: bytes) -> str:
    """What a tool that comes with Triton says of a binary."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a binary with one kernel, and the number of reads of its stack."""
    text = _tool("cuobjdump", "-res-usage", binary=cubin)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    found["STACK"] = max(found["STACK"], found["LOCAL"])
    return found | {
        "RELOADS": len(re.findall(r"\bLDL\b", _tool("nvdisasm", "-c", binary=cubin))) if found["STACK"] else 0
    }


def _of_nvidia(compiled: Any, arch: str) -> dict[str, Any]:
    ptx, resources = compiled.asm["ptx"], _resources(compiled.asm["cubin"])
    loads, stores = accesses(ptx)
    # From sm_90 on the binary's static part includes what the system reserves.
    static = max(resources["SHARED"] - ARCHITECTURES[arch].reserved, 0) if int(arch[3:]) >= 90 else resources["SHARED"]
    return {
        "registers": resources["REG"],
        "stack": resources["STACK"],
        "reloads": resources["RELOADS"],
        "shared": compiled.metadata.shared + static,
        "tensor": dict(sorted(tensor_instructions(ptx).items())),
        "loads": loads,
        "stores": stores,
        "atomics": atomics(ptx),
    }


def _of_amd(compiled: Any, arch: str) -> dict[str, Any]:
    assembly = compiled.asm["amdgcn"]
    loads, stores = accesses_amd(assembly)
    counts = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly)}
    return {
        "registers": counts["vgpr_count"],
        "stack": counts["private_segment_fixed_size"],
        "reloads": len(re.findall(r"\bscratch_load_", assembly)),
        "shared": compiled.metadata.shared,
        "tensor": dict(sorted(tensor_instructions_amd(assembly).items())),
        "loads": loads,
        "stores": stores,
        "atomics": atomics(assembly),
    }


def source(specimen: Specimen, amd: bool = False) -> Any:
    """The specimen as Triton's compiler takes it.

    AMD's products of float32 are exact, "ieee", and know no split TF32.

    Raises:
        ValueError: the specimen and the kernel disagree about the arguments.
    """
    from triton.compiler import ASTSource

    kernel = specimen.kernel
    given = [*specimen.types, *specimen.constants]
    if sorted(given) != sorted(kernel.arg_names):
        raise ValueError(
            f"expected specimen {specimen.label!r} to give each argument of its kernel once, as type or as constant: "
            f"{', '.join(sorted(kernel.arg_names))}; got {', '.join(sorted(given))}"
        )
    signature = {name: specimen.types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {}
    for i, parameter in enumerate(kernel.params):
        kind = signature[parameter.name]
        fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if not fixed and (kind.startswith("*") or kind in ("i32", "i64", "u32", "u64")):
            aligned[(i,)] = [["tt.divisibility", 16]]
    replaced = {"tf32x3": "ieee"} if amd else {}
    constants = {
        (kernel.arg_names.index(name),): replaced.get(value, value) if isinstance(value, str) else value
        for name, value in specimen.constants.items()
    }
    return ASTSource(kernel, signature, constants, aligned)


def compile_specimen(specimen: Specimen, arch: str) -> Row:
    """Compile for an architecture (a key of :data:`ARCHITECTURES`) and read the result.

    Raises:
        Exception: whatever the compiler raises. It may also end the process: Triton's wheels check their invariants.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    started = time.perf_counter()
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    read: Callable[[Any, str], dict[str, Any]] = _of_amd if amd else _of_nvidia
    compiled = triton.compile(source(specimen, amd), target=target, options=options)
    found = read(compiled, arch)
    again = False
    if found["stack"] and not amd:  # as `launch` does
        options["maxnreg"] = all_registers(compiled.metadata.num_warps)
        other = triton.compile(source(specimen), target=target, options=options)
        if (less := read(other, arch))["stack"] < found["stack"]:
            compiled, found, again = other, less, True
    seconds = time.perf_counter() - started
    warps = compiled.metadata.num_warps  # warp specialisation adds some
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    percent, bound = occupancy(arch, found["registers"], found["shared"], warps, columns)
    for side in ("loads", "stores"):
        found[side] = dict(sorted(found[side].items(), key=lambda item: -width_bytes(item[0])))
    return Row(
        kernel=specimen.kernel.__name__,
        label=specimen.label,
        arch=arch,
        warps=warps,
        stages=specimen.num_stages,
        scalar_dots=scalar_dots(compiled.asm["ttgir"]),
        narrow=[] if amd else narrow_lines(compiled.asm["ttir"], compiled.asm["ptx"], 32 * specimen.num_warps),
        occupancy=round(percent, 1),
        bound=bound,
        again=again,
        seconds=round(seconds, 2),
        **found,
    )


def breaches(row: Row, specimen: Specimen) -> list[tuple[str, str]]:
    """The rules for kernels of ours that this one breaks: name of the rule and by how much."""
    limit = SHARED_MEMORY[ARCHITECTURES[row.arch].family]
    found = []
    if row.reloads:
        found.append(("nothing on the stack", f"{row.stack} bytes per thread, read {row.reloads} times"))
    if row.shared > limit:
        found.append(("shared memory within the limit", f"{row.shared} bytes of {limit}"))
    if specimen.dots and not row.tensor:
        found.append(("products on tensor cores", "no such instruction"))
    elif specimen.dots and row.scalar_dots:
        found.append(("products on tensor cores", f"{row.scalar_dots} are not"))
    if row.atomics:
        found.append(("no atomic access", f"{row.atomics}"))
    sides = (("load", row.loads, specimen.narrow_loads), ("store", row.stores, specimen.narrow_stores))
    for what, counts, excuse in sides:
        if not excuse and counts and widest(counts) < WIDE:
            found.append((f"{what}s of {WIDE} bytes", f"{widest(counts)} bytes at most"))
        if not excuse:
            lines = (line.partition(": ") for line in row.narrow if line.startswith(what))
            found += [(f"{WIDE} bytes in each {place}", size) for place, _, size in lines]
    return found
