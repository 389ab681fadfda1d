"""Writes the GPU tables of README.md and kernels/README.md from the newest record of the GPU suite, between markers.

The whole of a record is on the page beside it.

python benchmarks/render_gpu.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pages import replace, table

from igulora.benchmarks.record import newest_of

HERE = Path(__file__).resolve().parent
README, KERNELS = HERE.parent / "README.md", HERE.parent / "kernels" / "README.md"
LAYER = "8192x4096x4096 r32"
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
    """The newest record of whole steps."""
    return newest_of(HERE / "results" / "gpu", "steps")


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
    """Whole training steps, by batch and by how they are run."""
    items = record["parts"].get("steps", {}).get("items", {})
    ran = {name: items[name] for name in ("eager", "graphs", "eager, long") if "step" in items.get(name, {})}
    if "eager" not in ran:
        return ""
    header, columns = [], []
    for name, item in ran.items():
        eager = name.startswith("eager")
        batch = f"{item['batch'][0]}×{item['batch'][1]}, " if eager else ""
        header.append(f"{batch}{'eager' if eager else 'as a CUDA graph'}, ms")
        columns.append({m: f"{1e3 * step['median']:.1f}" for m, step in item["step"].items()})
        if eager:
            header.append("peak, GiB")
            columns.append({m: f"{memory['peak'] / 2**30:.2f}" for m, memory in item["memory"].items()})
    rows = [
        [title, *(column.get(name, "–") for column in columns)]
        for name, title in STEPS.items()
        if any(name in column for column in columns)
    ]
    model = items["methods"]["model"]
    title = f"step of a {model['parameters'] / 1e6:.0f}M Llama, {model['linears']} linears, r = {items['methods']['case']['r']}"
    return table([title, *header], rows)


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


def launches(file: Path | None) -> str:
    """The launches of one layer beside its base products."""
    record = json.loads(file.read_text(encoding="utf-8")) if file is not None else {"parts": {}}
    items = record["parts"].get("kernels", {}).get("items", {})
    found, products = (items.get(f"{kind} {LAYER}", {}) for kind in ("layer", "products"))
    alone = {way: products.get(f"{way} product alone") for way in ("forward", "backward")}
    if "gemm_rank" not in found or None in alone.values():
        return NOTHING
    ms = {name: entry["ms"]["median"] for name, entry in found.items() if "ms" in entry}
    base = {way: entry["ms"]["median"] for way, entry in alone.items()}
    added = {
        "forward": ms["project"] + ms["gemm_rank"] - base["forward"],
        "backward": sum(ms[n] for n in ("dy_pass", "ds_sum", "dq_pass", "sum_partials", "gemm_rank 2"))
        - base["backward"],
    }
    rows = [
        [f"`{name}`", f"{1e3 * ms[name]:.1f}", f"{entry['bytes'] / 1e6:.1f}", f"{entry['bytes'] / ms[name] / 1e6:.0f}"]
        for name, entry in found.items()
        if name in ms
    ]
    rows += [[f"the library's {way} product alone", f"{1e3 * value:.1f}", "–", "–"] for way, value in base.items()]
    copy = record["parts"]["floors"]["items"]["copy"]["bytes_per_s"] / 1e9
    place, date = record["environment"]["machine"]["name"], record["environment"]["date"]
    share = {way: f"{100 * added[way] / base[way]:.0f}%" for way in added}
    head = (
        f"Measured: {place}, {date}, rows × out × in {LAYER}, bfloat16, each launch alone and with a cold L2 cache (a copy moves "
        f"{copy:.0f} GB/s). Over the products alone the forward takes {share['forward']} more, the backward {share['backward']}.\n"
    )
    return f"{head}\n{table(['launch', 'µs', 'must move, MB', 'GB/s'], rows)}"


def main() -> int:
    """Rewrite the tables."""
    replace(README, summary(newest()), MARKERS)
    replace(KERNELS, launches(newest()), MARKERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
