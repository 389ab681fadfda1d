"""Reads what a compiler wrote: global accesses, atomics and tensor-core instructions in PTX and AMD assembly, products and tiles in
Triton's IR. Everything here takes text."""

from __future__ import annotations

import linecache
import math
import re
from collections import Counter

WIDE = 16  # bytes of the widest access that every architecture has
TMA = "tma"  # a copy of a whole tile by the tensor memory accelerator
SMALL = 2048  # bytes below which a tile costs next to nothing however it is moved: a vector over ranks has at most 1024

_ACCESS = re.compile(r"(?<![\w.])(ld|st)\.([\w.:]+)")
_COPY = re.compile(
    r"(?<![\w.])cp\.async\.c[ag]\.shared[\w:]*\.global[\w.:]*\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-fA-F]+|\d+)"
)
_BULK = re.compile(r"(?<![\w.])cp\.async\.bulk\.tensor\.[\w.:]*?(global\.shared|shared::\w+\.global)")
_ATOMIC = re.compile(
    r"(?<![\w.])(?:(?:atom|red)\.[\w.:]*global|cp\.reduce\.async\.bulk|(?:global|buffer|flat)_atomic_)"
)
_TENSOR = re.compile(r"(?<![\w.])(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.([\w.:]+)")
_AMD_WORDS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32, "b": 1}
_AMD_ACCESS = re.compile(rf"\b(?:global|buffer|flat)_(load|store)_({'|'.join(_AMD_WORDS)})x?(\d*)")
_AMD_TENSOR = re.compile(r"\bv_mfma_f32_\d+x\d+x\d+_(?:\d+b_)?(\w+)")
# A load or store of a tile in Triton's IR: shape, bits of an element, name of its place in the source.
_TILE = re.compile(r"\btt\.(load|store) .*: tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)[\w]*>> loc\(#(loc\d*)\)")
# A product in Triton's IR and the layout of its result, named after the attribute: #mma is a tensor-core layout, #blocked is not.
_DOT = re.compile(r"= tt\.dot(?:_scaled)? .*-> tensor<[^#\n]*#(\w+)>")


def width_bytes(width: str) -> int:
    """A width as a number; a tile copy counts as a whole line of 128 bytes."""
    return 128 if width == TMA else int(width)


def _access(line: str) -> tuple[str, str] | None:
    """("load" or "store", bytes) of a line of PTX that accesses global memory."""
    if match := _ACCESS.search(line):
        *parts, last = match[2].split(".")
        if "global" in parts:
            vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
            return "load" if match[1] == "ld" else "store", str(vector * int(last.lstrip("bsuf")) // 8)
    if match := _COPY.search(line):
        return "load", str(int(match[1], 0))
    if match := _BULK.search(line):
        return "store" if match[1].startswith("global") else "load", TMA
    return None


def accesses(ptx: str) -> tuple[Counter[str], Counter[str]]:
    """Global loads and stores in PTX by bytes per thread; tile copies count under :data:`TMA`."""
    found = Counter(access for line in ptx.splitlines() if (access := _access(line)))
    loads, stores = (Counter({w: n for (kind, w), n in found.items() if kind == side}) for side in ("load", "store"))
    return loads, stores


def _widest_by_line(ptx: str) -> dict[tuple[str, str, int], int]:
    """Bytes of the widest access of each direction that a source line (file name and number) compiled to."""
    files = {
        number: name.rpartition("/")[2] for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.M)
    }
    found: dict[tuple[str, str, int], int] = {}
    place = ("", 0)
    block = fixed = False  # inside a block of inline assembly; its place is known
    for text in ptx.splitlines():
        if "inline asm" in text:
            block, fixed = "begin" in text, False
        elif match := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", text):
            # Only the first counts in a block: Triton 3.9 goes on to number the block's own lines.
            place = place if fixed else (files.get(match[1], ""), int(match[2]))
            fixed = block
        elif access := _access(text):
            key = access[0], *place
            found[key] = max(found.get(key, 0), width_bytes(access[1]))
    return found


def narrow_lines(ttir: str, ptx: str, threads: int) -> list[str]:
    """Source lines that move a tile of at least 16 bytes per thread, and 2 KiB in all, in narrower accesses.

    Below that size a tile cannot occupy every thread with a wide access. A line that compiled several
    times (a function with a fast and a general form) counts by its widest. A comment ``# narrow: why`` on the line excuses it.
    """
    places = {
        name: (file, int(line))
        for name, file, line in re.findall(r'^#(loc\d*) = loc\("([^"]+)":(\d+):\d+\)', ttir, re.M)
    }
    inner = dict(re.findall(r"^#(loc\d*) = loc\((?:callsite\(|\"[^\"]*\"\()#(loc\d*)", ttir, re.M))
    widths = _widest_by_line(ptx)
    found = []
    for kind, shape, bits, name in dict.fromkeys(_TILE.findall(ttir)):
        size = math.prod(int(n) for n in shape.split("x") if n) * max(int(bits), 8) // 8
        while name in inner:
            name = inner[name]
        file, line = places.get(name, ("", 0))
        width = widths.get((kind, file.rpartition("/")[2], line), WIDE)
        if size >= max(WIDE * threads, SMALL) and width < WIDE and "# narrow: " not in linecache.getline(file, line):
            found.append(f"{kind} at {file.rpartition('/')[2]}:{line}: {width} bytes, tiles of {size}")
    return list(dict.fromkeys(found))


def accesses_amd(assembly: str) -> tuple[Counter[str], Counter[str]]:
    """Global loads and stores in AMD assembly by bytes per thread."""
    found: dict[str, Counter[str]] = {"load": Counter(), "store": Counter()}
    for kind, word, count in _AMD_ACCESS.findall(assembly):
        found[kind][str(_AMD_WORDS[word] * int(count or 1) // 8)] += 1
    return found["load"], found["store"]


def tensor_instructions(ptx: str) -> Counter[str]:
    """Tensor-core instructions in PTX by name and operand type: ``{"mma.sync bf16": 64}``."""
    found: Counter[str] = Counter()
    for name, qualifiers in _TENSOR.findall(ptx):
        parts = qualifiers.split(".")
        kind = next((part.removeprefix("kind::") for part in parts if part.startswith("kind::")), None)
        # Otherwise the types follow the shape: result, first factor, ...
        shape = next((i for i, part in enumerate(parts) if re.fullmatch(r"m\d+n\d+k\d+", part)), None)
        if kind is None and shape is not None:
            kind = [part for part in parts[shape + 1 :] if re.fullmatch(r"[a-z]+\d\w*", part)][1]
        found[f"{name} {kind}"] += 1
    return found


def tensor_instructions_amd(assembly: str) -> Counter[str]:
    """Matrix instructions in AMD assembly by operand type."""
    return Counter(f"mfma {kind}" for kind in _AMD_TENSOR.findall(assembly))


def atomics(text: str) -> int:
    """Atomic accesses to global memory in PTX or AMD assembly."""
    return len(_ATOMIC.findall(text))


def scalar_dots(ttgir: str) -> int:
    """Matrix products in Triton's GPU IR that do not run on tensor cores."""
    return sum(not layout.startswith("mma") for layout in _DOT.findall(ttgir))


def widest(counts: dict[str, int]) -> int:
    """Bytes of the widest access; 0 if there is none."""
    return max(map(width_bytes, counts), default=0)


def shown(counts: dict[str, int]) -> str:
    """The widest access as tables show it."""
    return "–" if not counts else "TMA" if TMA in counts else str(widest(counts))
