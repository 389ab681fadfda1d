"""Medians and quartiles of times, and of their ratios taken round by round."""

from __future__ import annotations

import numpy as np

Times = dict[str, list[float]]


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "q1": float(low), "q3": float(high)}


def paired_ratios(
    times: Times, denominators: tuple[str, ...] = ("floor", "peft-lora", "peft-adalora", "release")
) -> dict[str, dict[str, float]]:
    """Quartiles of the ratios, round by round, of every series to every baseline, as ``"a/b"``."""
    pairs = [(a, b) for b in denominators if b in times for a in times if a != b]
    pairs += [(a, f"{a}:plain") for a in times if f"{a}:plain" in times]
    return {
        f"{a}/{'without-path' if b.endswith(':plain') else b}": quartiles(
            [x / y for x, y in zip(times[a], times[b], strict=True)]
        )
        for a, b in pairs
    }
