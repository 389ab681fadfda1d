"""Writes the short GPU table of README.md from the newest record of the GPU suite, between markers; the whole is on the record's own page.

python benchmarks/render_gpu.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from render import replace, table

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
MARKERS = ("<!-- gpu:begin -->", "<!-- gpu:end -->")
LAYERS = {
    "ours": "igulora",
    "ours, reference": "igulora, PyTorch reference",
    "PyTorch LoRA": "LoRA in PyTorch",
    "torch.compile LoRA": "the same, compiled",
    "PEFT LoRA": "PEFT LoRA",
    "PEFT AdaLoRA": "PEFT AdaLoRA",
}
STEPS = {
    "floor": "frozen model, forward and input gradient",
    "instantaneous": "igulora, no path rows",
    "default": "igulora, default estimator",
    "peft-lora": "PEFT LoRA",
    "peft-adalora": "PEFT AdaLoRA",
}
NOTHING = "No GPU time has been measured yet: `make gpu-suite` does.\n"


def newest() -> Path | None:
    """The newest record."""
    files = (HERE / "results" / "gpu").glob("*.json")
    dated = [(json.loads(file.read_text(encoding="utf-8"))["environment"]["time"], file) for file in files]
    return max(dated)[1] if dated else None


def layers(record: dict[str, Any]) -> str:
    """Forward and backward of whole layers, over the bare frozen layer."""
    found = record["parts"].get("layers", {}).get("items", {})
    shown = {n: item["variants"] for n, item in found.items() if "variants" in item and item["shape"]["r"] == 32}
    if not shown:
        return ""
    rows = []
    for key, title in LAYERS.items():
        values = [v.get(key, {}).get("both", {}).get("over_base") for v in shown.values()]
        if any(values):
            rows.append([title, *("–" if v is None else f"{v['median']:.2f}" for v in values)])
    return table(["layer and rows, r = 32", *(name.removesuffix(" r32") for name in shown)], rows)


def steps(record: dict[str, Any]) -> str:
    """Whole training steps, by how they are run."""
    items = record["parts"].get("steps", {}).get("items", {})
    ways = [items.get(name, {}).get("step", {}) for name in ("eager", "compiled", "graphs")]
    memory = {n: m.get("memory", {}).get("peak") for n, m in items.get("methods", {}).get("methods", {}).items()}
    rows = [
        [
            title,
            *(f"{1e3 * way[name]['median']:.1f}" if name in way else "–" for way in ways),
            f"{memory[name] / 2**30:.2f}" if memory.get(name) else "–",
        ]
        for name, title in STEPS.items()
        if any(name in way for way in ways)
    ]
    if not rows:
        return ""
    model, case = items["methods"]["model"], items["methods"]["case"]
    title = (
        f"step of a {model['parameters'] / 1e6:.0f}M Llama, {model['linears']} linears, r = {case['r']}, "
        f"{case['rows']}×{case['length']} tokens"
    )
    return table([title, "eager, ms", "torch.compile, ms", "as a CUDA graph, ms", "peak, GiB"], rows)


def summary(file: Path | None) -> str:
    """What stands between the markers."""
    if file is None:
        return NOTHING
    record = json.loads(file.read_text(encoding="utf-8"))
    place, versions = record["environment"]["machine"], record["environment"]["versions"]
    head = (
        f"{place['name']}, {record['environment']['date']}, bfloat16, torch {versions['torch']}, Triton {versions['triton']}, PEFT "
        f"{versions['peft']}, commit {versions['commit']}; medians, [all of it](benchmarks/results/gpu/{file.stem}.md). Layers: device "
        "time of forward and backward over that of the bare frozen layer, cold cache, as tuned. Steps: from a device at rest to a device "
        "at rest; where the device waits for Python (eager), the host's speed decides.\n"
    )
    return "\n".join(part for part in (head, layers(record), steps(record)) if part)


def main() -> int:
    """Rewrite the table."""
    replace(README, summary(newest()), MARKERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
