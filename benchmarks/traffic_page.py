"""Writes the tables of kernels/README.md: what the adapters move, as a share of the base product's time on published peaks.

    python benchmarks/traffic_page.py          # rewrite the page between its markers
    python benchmarks/traffic_page.py --check  # exit code 1 if it is not up to date

A projection, not a measurement: bytes over bandwidth against FLOPs over rate.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from igulora.kernels.fused.layer_traffic import backward_traffic, forward_traffic
from igulora.kernels.traffic import Traffic
from igulora.measure import roofline
from igulora.measure.roofline import SUSTAINED, Card

PAGE = Path(__file__).resolve().parents[1] / "kernels" / "README.md"
BEGIN, END = "<!-- traffic:begin -->", "<!-- traffic:end -->"
M, WIDTH, RANK, ITEMSIZE = 8192, 4096, 32, 2
LIMITS = {"forward": 0.06, "backward": 0.12}


CARDS = tuple(roofline.CARDS[name] for name in ("A100 SXM 80 GB", "H100 SXM", "H200 SXM", "RTX 4090"))


def launches(card: Card, form: str, sharing: int) -> dict[str, dict[str, Traffic]]:
    """Traffic beyond the base products of one layer, by direction and launch."""
    where = (M, WIDTH, WIDTH, RANK, ITEMSIZE, card.family, card.processors)
    return {
        "forward": forward_traffic(*where, form=form, sharing=sharing),
        "backward": backward_traffic(*where, form=form, sharing=sharing),
    }


def share(card: Card, moved: int) -> float:
    """Time of moved bytes over the time of one base product of 2 M N K FLOPs."""
    return moved / (card.bandwidth * 1e12) / (2 * M * WIDTH * WIDTH / (SUSTAINED * card.rate * 1e12))


def totals(card: Card, form: str, sharing: int, *, partial: bool) -> dict[str, float]:
    """Share by direction, with or without the partial sums that are meant to stay in the L2 cache."""
    return {
        direction: share(card, sum(t.moved for name, t in parts.items() if partial or name != "partial sums"))
        for direction, parts in launches(card, form, sharing).items()
    }


def _verdict(value: float, limit: float) -> str:
    return f"{100 * value:.1f}%" + ("" if value <= limit else f", missed by {100 * (value / limit - 1):.0f}%")


def render() -> str:
    """The tables between the markers."""
    card = CARDS[1]
    lines = [
        f"One layer of {WIDTH}×{WIDTH}, M = {M}, r = {RANK}, bf16, {card.name}, megabytes moved beyond the base products, fused form:",
        "",
        "| launch | direction | read | written |",
        "| --- | --- | ---: | ---: |",
    ]
    for direction, parts in launches(card, "pointers", 1).items():
        lines += [f"| {name} | {direction} | {t.read / 1e6:.1f} | {t.written / 1e6:.1f} |" for name, t in parts.items()]
    lines += [
        "",
        f"Share of one base product's time: bytes at the published bandwidth, {2 * M * WIDTH * WIDTH / 1e12:.3f} TFLOP at "
        f"{SUSTAINED:.0%} of the published dense rate. Partial sums stay in the L2 cache, or (last column) all go to memory. "
        f"Targets: forward ≤ {LIMITS['forward']:.0%}, backward ≤ {LIMITS['backward']:.0%}. A projection: nothing here was measured.",
        "",
        "| card | form | layers on one x | forward | backward | backward, partial sums in memory |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for card in CARDS:
        for form, sharing in (("pointers", 1), ("pointers", 3), ("library", 1)):
            cached = totals(card, form, sharing, partial=False)
            memory = totals(card, form, sharing, partial=True)
            name = "fused" if form == "pointers" else "library"
            lines.append(
                f"| {card.name} | {name} | {sharing} | {_verdict(cached['forward'], LIMITS['forward'])} "
                f"| {_verdict(cached['backward'], LIMITS['backward'])} | {100 * memory['backward']:.1f}% |"
            )
    return "\n".join(lines)


def page(old: str) -> str:
    """The page with its tables made anew."""
    head, rest = old.split(BEGIN)
    return f"{head}{BEGIN}\n{render()}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if options.check:
        print("up to date" if new == old else f"{PAGE.name} is out of date: run python benchmarks/traffic_page.py")
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
