"""Writes results/compile/README.md from the compile reports beside it: python benchmarks/render_compiled.py"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from assembly import shown

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "compile"
INTRODUCTION = """# What the kernels compile to

Written by `benchmarks/render_compiled.py` from the reports in this folder (`make compile-report`), one for each Triton. Nothing here
ran on a device: these are properties of the compiled code. *Occupancy* is the upper bound that registers, shared memory and the limits
of the architecture set for resident warps; a tuned product needs few. *Load* and *store* are the widest global accesses in bytes, TMA
being copies of whole tiles. Tensor-core instructions are counted in the code, not as executed.

No kernel for sm_80 to sm_120 may keep anything on the stack, take more shared memory than the architecture allows, compute a product
elsewhere than on tensor cores, move tiles of aligned inputs in accesses narrower than 16 bytes (but for lines that state a reason), or
use atomic accesses. Registers are per thread; `+8` are bytes of stack, which count as a fault only if they are read: for sm_120, the
assembler of Triton 3.6 stores a zero there at each tile copy and never reads it. `*`: assembled again with all registers, as launches
are, because the assembler had used the stack for an occupancy of its choice. Of gfx942 each third configuration is compiled to see what
is missing, and held to nothing.
"""


def read(folder: Path) -> list[dict[str, Any]]:
    """The reports of a folder, oldest Triton first."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    return sorted(records, key=lambda record: [int(n) for n in re.findall(r"\d+", record["versions"]["triton"])])


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]) + "\n"


def summary(records: list[dict[str, Any]]) -> str:
    """One line per Triton."""
    lines = []
    for record in records:
        rows = [row for row in record["rows"] if row["arch"].startswith("sm_")]
        tensor = {name.split()[0] for row in rows for name in row["tensor"]}
        lines.append(
            [
                record["versions"]["triton"],
                record["date"],
                record["versions"]["commit"],
                str(len({row["kernel"] for row in rows})),
                str(len(rows)),
                str(len(record["breaches"])),
                str(max(row["registers"] for row in rows)),
                ", ".join(f"`{name}`" for name in sorted(tensor)) or "–",
            ]
        )
    header = ["Triton", "date", "commit", "kernels", "compiled", "rules broken", "most registers", "tensor cores"]
    return table(header, lines)


def _registers(row: dict[str, Any]) -> str:
    return f"{row['registers']}{'*' * row.get('again', False)}" + (f"+{row['stack']}" if row["stack"] else "")


def of_architecture(records: list[dict[str, Any]], arch: str) -> str:
    """All configurations on one architecture: registers with every Triton, the rest with the newest."""
    by_version = [{row["label"]: row for row in record["rows"] if row["arch"] == arch} for record in records]
    lines = []
    for label, row in by_version[-1].items():
        lines.append(
            [
                label,
                f"{row['warps']}/{row['stages']}",
                "/".join(_registers(rows[label]) if label in rows else "–" for rows in by_version),
                f"{row['shared'] / 1024:.1f}",
                ", ".join(f"{name} ×{n}" for name, n in row["tensor"].items()) or "–",
                shown(row["loads"]),
                shown(row["stores"]),
                f"{row['occupancy']:.0f} ({row['bound']})",
            ]
        )
    registers = "registers, " + "/".join(record["versions"]["triton"] for record in records)
    return table(["", "warps/stages", registers, "shared, KiB", "tensor cores", "load", "store", "occupancy, %"], lines)


def page(records: list[dict[str, Any]]) -> str:
    """The whole text; details are those of the newest Triton."""
    newest = records[-1]
    parts = [
        INTRODUCTION,
        summary(records),
        f"Details with Triton {newest['versions']['triton']}.\n",
    ]
    for arch in dict.fromkeys(row["arch"] for row in newest["rows"]):
        parts += [f"## {arch}\n", of_architecture(records, arch)]
    for record in records:
        reasons: dict[str, list[str]] = {}
        for failure in record["failed"]:
            reasons.setdefault(failure["reason"], []).append(f"{failure['label']} on {failure['arch']}")
        if reasons:
            lines = [f"- {reason}: {', '.join(labels)}\n" for reason, labels in reasons.items()]
            parts.append(f"Not compiled with Triton {record['versions']['triton']}:\n" + "".join(lines))
    return "\n".join(parts)


def main() -> int:
    """Write the page."""
    records = read(RESULTS)
    if not records:
        print(f"expected reports in {RESULTS}, found none; `make compile-report` writes them", file=sys.stderr)
        return 2
    (RESULTS / "README.md").write_text(page(records), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
