"""The page of tables of a GPU suite's record. Every figure in it was measured; fractions are of the floors of the same run.

python benchmarks/gpu_report.py results/gpu/FILE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pages import table

Items = dict[str, dict[str, Any]]


def _items(record: dict[str, Any], part: str) -> Items:
    return record["parts"].get(part, {}).get("items", {})


def _ms(value: dict[str, float]) -> str:
    return f"{value['median']:.3f} [{value['q1']:.3f}–{value['q3']:.3f}]" if value else "–"


def _ratio(value: dict[str, float] | None) -> str:
    return "–" if value is None else f"{value['median']:.2f} [{value['q1']:.2f}–{value['q3']:.2f}]"


def _reason(item: dict[str, Any]) -> str:
    """Why there is no figure, in one line."""
    for key in ("skipped", "cut"):
        if key in item:
            return f"{key}: {item[key]}"
    lines = [line.strip() for line in item.get("error", "not measured").strip().splitlines() if line.strip()]
    return f"error: {lines[-1][:160]}".replace("|", "\\|")


def floors(record: dict[str, Any]) -> tuple[float | None, float | None]:
    """Measured bytes per second of a copy, and the best measured FLOPs per second of a library product."""
    items = _items(record, "floors")
    bandwidth = items.get("copy", {}).get("bytes_per_s")
    rates = [
        rate for name, item in items.items() if name.startswith("gemm") for rate in item.get("flops_per_s", {}).values()
    ]
    return bandwidth, max(rates, default=None)


def least_ms(entry: dict[str, Any], bandwidth: float | None, rate: float | None) -> float | None:
    """Milliseconds that the bytes or the FLOPs of an entry take at the measured floors, whichever is longer."""
    if bandwidth is None or rate is None or "bytes" not in entry:
        return None
    return 1e3 * max(entry["bytes"] / bandwidth, entry["flops"] / rate)


def head(record: dict[str, Any]) -> str:
    """What was measured, on what, and what is missing."""
    place = record.get("environment") or {}
    machine, versions = place.get("machine", {}), place.get("versions", {})
    lines = ["# GPU suite\n"]
    if place.get("tiny"):
        lines.append("**A trial run on tiny shapes: its times mean nothing.**\n")
    if machine.get("interpreted"):
        lines.append("**No device: Triton's interpreter ran the kernels.**\n")
    runs = place.get("backend", {})
    if runs.get("runs") != "triton":
        lines.append(
            f"**No Triton kernel ran: igulora falls back to its {runs.get('runs', 'reference')} here "
            f'({runs.get("reason", "unknown")}). Figures of "ours" are the fallback\'s.**\n'
        )
    smi = machine.get("nvidia_smi", {})
    facts = [
        machine.get("name", "unknown device"),
        f"capability {machine['capability']}" if "capability" in machine else "",
        f"{machine['memory_gib']} GiB" if "memory_gib" in machine else "",
        f"driver {smi['driver_version']}" if smi else "",
        f"power limit {smi['power.limit']}" if smi else "",
        f"clocks up to {smi['clocks.max.sm']} / {smi['clocks.max.mem']}" if smi else "",
        *(f"{name} {version}" for name, version in versions.items()),
        place.get("dtype", ""),
        place.get("time", ""),
    ]
    lines.append(
        "Measured: " + ", ".join(fact for fact in facts if fact) + f"; {record.get('seconds', 0):.0f} s in all.\n"
    )
    rows = [[name, f"{part['seconds']:.0f}", part["status"]] for name, part in record["parts"].items()]
    lines.append(table(["part", "seconds", "state"], rows))
    return "\n".join(lines)


def floors_table(record: dict[str, Any]) -> str:
    """Bandwidth and product rates."""
    rows = []
    for name, item in _items(record, "floors").items():
        if "bytes_per_s" in item:
            rows.append(["copy", _ms(item["ms"]), f"{item['bytes_per_s'] / 1e9:.0f} GB/s"])
            rows.append(["fill", _ms(item["fill_ms"]), f"{item['fill_bytes_per_s'] / 1e9:.0f} GB/s"])
        elif "flops_per_s" in item:
            for direction, rate in item["flops_per_s"].items():
                rows.append([f"{name} {direction}", _ms(item["ms"][direction]), f"{rate / 1e12:.1f} TFLOP/s"])
        else:
            rows.append([name, _reason(item), "–"])
    return table(["floor", "ms", "rate"], rows)


def tests_table(record: dict[str, Any]) -> str:
    """Counts per file, failures, and why tests were skipped."""
    item = _items(record, "tests").get("pytest", {})
    if "files" not in item:
        return _reason(item) + "\n"
    rows, notes = [], []
    for name, file in item["files"].items():
        counts = [str(file.get(key, "–")) for key in ("passed", "failed", "skipped")]
        note = _reason(file) if "cut" in file or "error" in file else ""
        rows.append([name, *counts, note])
        notes += [
            f"- failed: `{failure['test']}`: {failure['message'].splitlines()[0][:160] if failure['message'] else ''}"
            for failure in file.get("failures", [])
        ]
        notes += [f"- skipped in {name}: {reason}" for reason in file.get("skip_reasons", [])]
    total = ["all", *(str(item[key]) for key in ("passed", "failed", "skipped")), ""]
    return table(["tests", "passed", "failed", "skipped", ""], [*rows, total]) + "\n" + "\n".join(notes) + "\n"


def kernels_table(record: dict[str, Any]) -> str:
    """Every kernel beside what it must move and compute at the floors."""
    bandwidth, rate = floors(record)
    parts = []
    for name, item in _items(record, "kernels").items():
        if "error" in item or "cut" in item:
            parts.append(f"### {name}\n\n{_reason(item)}\n")
            continue
        rows = []
        for kernel, entry in item.items():
            if kernel == "bank":
                continue
            if "ms" not in entry:
                rows.append([kernel, _reason(entry), *["–"] * 5])
                continue
            ms, least = entry["ms"]["median"], least_ms(entry, bandwidth, rate)
            moved = entry.get("bytes")
            rows.append(
                [
                    kernel,
                    _ms(entry["ms"]),
                    f"{moved / 1e6:.1f}" if moved else "–",
                    f"{moved / ms / 1e6:.0f}" if moved else "–",
                    f"{entry['flops'] / ms / 1e9:.1f}" if entry.get("flops") else "–",
                    f"{100 * least / ms:.0f}%" if least else "–",
                    _ratio(entry.get("over_product")),
                ]
            )
        header = ["", "ms", "must move, MB", "GB/s", "TFLOP/s", "of the floor", "over the product alone"]
        parts.append(f"### {name}\n\n{table(header, rows)}")
    return "\n".join(parts)


def layers_table(record: dict[str, Any]) -> str:
    """Whole layers, one table per shape."""
    parts = []
    for name, item in _items(record, "layers").items():
        if "variants" not in item:
            parts.append(f"### {name}\n\n{_reason(item)}\n")
            continue
        rows, missing = [], []
        for variant, entry in item["variants"].items():
            if "forward" not in entry and "both" not in entry:
                missing.append(f"- {variant}: {_reason(entry)}")
                continue
            cells = [variant]
            for key in ("forward", "both"):
                found = entry.get(key)
                cells += [_ms(found["ms"]), _ratio(found.get("over_base"))] if found else [_reason(entry), "–"]
            called = entry.get("both", {}).get("called_ms")
            rows.append([*cells, f"{called:.3f}" if called else "–"])
        header = ["layer", "forward, ms", "over base", "forward + backward, ms", "over base", "called from Python, ms"]
        parts.append(f"### {name}\n\n{table(header, rows)}" + "".join(f"\n{line}" for line in missing) + "\n")
    return "\n".join(parts)


def _batch(shape: list[int]) -> str:
    return f"{shape[0]}×{shape[1]} tokens"


def steps_table(record: dict[str, Any]) -> str:
    """Whole training steps: eager on both batches, where their time goes, and captured."""
    items = _items(record, "steps")
    build = items.get("methods", {})
    if "methods" not in build:
        return "\n".join(f"- {name}: {_reason(item)}" for name, item in items.items()) + "\n"
    model, methods = build["model"], build["methods"]
    parts = [
        f"A randomly initialised Llama of {model['parameters'] / 1e6:.0f} million parameters, all {model['linears']} linear layers but the "
        f"head, r = {build['case']['r']}.\n"
    ]
    parts += [f"- {name}: {_reason(method)}" for name, method in methods.items() if "title" not in method]
    for name, write in (
        ("eager", _eager_table),
        ("eager, long", _eager_table),
        ("profile", _profile_table),
        ("graphs", _replays_table),
    ):
        item = items.get(name)
        if item is not None:
            title = "As CUDA graphs" if name == "graphs" else name.capitalize()
            broken = item.keys() & {"error", "cut", "skipped"}
            parts.append(f"### {title}\n\n" + (_reason(item) + "\n" if broken else write(item, methods)))
    return "\n".join(parts) + "\n"


def compiled_table(record: dict[str, Any]) -> str:
    """Steps whose models are compiled."""
    items = _items(record, "compiled")
    item = items.get("compiled", {})
    if "step" not in item:
        return "\n".join(f"- {name}: {_reason(found)}" for name, found in items.items()) + "\n"
    return _replays_table(item, items["methods"]["methods"])


def _eager_table(item: dict[str, Any], methods: Items) -> str:
    rows = []
    for name, step in item["step"].items():
        memory = item["memory"].get(name)
        rows.append(
            [
                methods[name]["title"],
                _ms({key: 1e3 * value for key, value in step.items()}),
                *(_ratio(item["ratios"].get(f"{name}/{other}")) for other in ("floor", "peft-lora", "peft-adalora")),
                *(f"{memory[key] / 2**20:.0f}" if memory else "–" for key in ("peak", "held")),
            ]
        )
    head = f"{_batch(item['batch'])}, blocks of {item['steps_in_block']} steps, {item['rounds']} rounds.\n\n"
    others = ("over floor", "over PEFT LoRA", "over PEFT AdaLoRA")
    return head + table(["method", "step, ms", *others, "peak, MiB", "held, MiB"], rows)


def _profile_table(item: dict[str, Any], methods: Items) -> str:
    """Milliseconds of the device and of the host by part, and launches."""
    found = {name: p for name, p in item["methods"].items() if "parts" in p}
    shown = [
        part
        for part in next(iter(found.values()), {"parts": {}})["parts"]
        if any(p["parts"][part]["launches"] or p["parts"][part]["seconds"] for p in found.values())
    ]
    rows = []
    for name, profile in found.items():
        for key, what, scale in (
            ("seconds", "device, ms", 1e3),
            ("host_seconds", "host, ms", 1e3),
            ("kernels", "kernels", 1),
        ):
            values = [scale * profile["parts"][part][key] for part in shown]
            total = scale * sum(part[key] for part in profile["parts"].values())
            wall = profile["profiled_seconds"] if key == "host_seconds" else profile["wall_seconds"]
            cells = [f"{v:,.0f}" if key == "kernels" else f"{v:.1f}" for v in (*values, total)]
            rows.append([methods[name]["title"], what, *cells, "–" if key == "kernels" else f"{1e3 * wall:.1f}"])
    note = (
        f"{_batch(item['batch'])}, one step each. *Device*: what the kernels take that a part launched; *step* beside it: the same step "
        "undisturbed. Where the device's sum is far below that, the step waits for the host. *Host*: under the profiler, which slows every "
        "operator and launch down; so is the step beside it.\n\n"
    )
    missing = [f"- {name}: {_reason(p)}" for name, p in item["methods"].items() if "parts" not in p]
    return note + table(["method", "", *shown, "sum", "step, ms"], rows) + "\n" + "\n".join(missing)


def _replays_table(item: dict[str, Any], methods: Items) -> str:
    rows = [
        [
            methods[name]["title"],
            _ms({key: 1e3 * value for key, value in step.items()}),
            *(_ratio(item["ratios"].get(f"{name}/{other}")) for other in ("floor", "peft-lora")),
        ]
        for name, step in item["step"].items()
    ]
    missing = [
        f"- {name}: {_reason(m)}" for name, m in item["methods"].items() if m.keys() & {"error", "cut", "skipped"}
    ]
    return table(["method", "step, ms", "over floor", "over PEFT LoRA"], rows) + "\n" + "\n".join(missing) + "\n"


def compile_table(record: dict[str, Any]) -> str:
    """How much was compiled ahead."""
    item = _items(record, "compile").get("workers", {})
    if "compiled" not in item:
        return _reason(item) + "\n"
    note = f"; {_reason(item)}" if "cut" in item or "error" in item else ""
    return f"{len(item['compiled'])} of {item['tasks']} tasks in {item['workers']} processes{note}\n"


SECTIONS = {
    "floors": ("What the device can do", floors_table),
    "tests": ("GPU tests", tests_table),
    "compile": ("Compiled ahead", compile_table),
    "kernels": (
        "Kernels, each alone, cold L2 cache. *Of the floor*: the time that the bytes or FLOPs it must move or compute take at the copy "
        "bandwidth and the best product rate above, over its own",
        kernels_table,
    ),
    "steps": ("Training steps; ratios are paired", steps_table),
    "layers": ("Layers; ratios to the bare frozen layer are paired", layers_table),
    "compiled": ("Training steps of compiled models, CUDA graphs of their passes (reduce-overhead)", compiled_table),
}


def page(record: dict[str, Any]) -> str:
    """The whole text."""
    parts = [head(record)]
    parts += [f"## {title}\n\n{write(record)}" for name, (title, write) in SECTIONS.items() if name in record["parts"]]
    return "\n".join(parts)


def main() -> int:
    """Write the page beside a record."""
    file = Path(sys.argv[1])
    file.with_suffix(".md").write_text(page(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
