"""The parts of one or several profiled steps as stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..training.extras import require
from .parts import PARTS
from .profiling import StepProfile

# One colour per part everywhere; what cannot be saved is grey.
COLOURS = dict(
    zip(
        PARTS,
        ("#9aa5b1", "#1f77b4", "#17becf", "#d62728", "#ff7f0e", "#bcbd22", "#9467bd", "#d9dee4"),
        strict=True,
    )
)
_LABELLED = 0.06  # share of the longest bar from which a part shows its time
ENDINGS = (".png", ".pdf", ".svg")


def plot_profiles(profiles: Sequence[StepProfile], path: Path, title: str = "") -> Path:
    """One bar for each profile, its parts stacked in the order of ``PARTS``; a mark where the undisturbed step ends.

    Args:
        profiles: of steps on one device; their times are compared.
        path: png, pdf or svg file; its folder is made.

    Raises:
        ValueError: no profile, profiles of several devices, or a file of another kind.
    """
    if not profiles:
        raise ValueError("expected profiles to draw, got none")
    devices = sorted({profile.device for profile in profiles})
    if len(devices) > 1:
        raise ValueError(f"expected profiles of one device, got {', '.join(devices)}; draw one picture for each")
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"expected a picture that ends in {', '.join(ENDINGS)}, got {path}")
    # A figure of its own on the Agg canvas: neither pyplot's state nor a display is touched.
    height = 1.6 + 0.5 * len(profiles)
    figure = require("matplotlib.figure", "demo", "drawing pictures").Figure((9.0, height), layout="constrained")
    require("matplotlib.backends.backend_agg", "demo", "drawing pictures").FigureCanvasAgg(figure)
    axis = figure.subplots()
    places = list(range(len(profiles)))
    ends = [0.0] * len(profiles)
    longest = max(1e3 * profile.total.seconds for profile in profiles) or 1.0
    for name in PARTS:
        widths = [1e3 * profile.parts[name].seconds for profile in profiles]
        if not any(widths):
            continue
        axis.barh(places, widths, left=ends, color=COLOURS[name], label=name, height=0.62)
        for place, end, width in zip(places, ends, widths, strict=True):
            if width > _LABELLED * longest:
                axis.text(end + width / 2, place, f"{width:.3g}", ha="center", va="center", fontsize=7)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    walls = [1e3 * profile.wall_seconds for profile in profiles]
    axis.plot(walls, places, linestyle="", marker="|", markersize=22, color="black", label="undisturbed step")
    axis.set_yticks(places, [profile.title for profile in profiles], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.05 * max(longest, *walls))
    axis.set_xlabel(f"ms of one profiled step, {devices[0]}", fontsize=8)
    axis.set_title(title or "Where the time of a training step goes", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=5, fontsize=7, markerscale=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path
