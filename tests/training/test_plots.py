"""Names into grids, series into statistics, and pictures that open."""

import math

import pytest

from igulora.training.plots import (
    layer_and_kind,
    module_grid,
    plot_adapter,
    plot_budget,
    plot_ranks,
    plot_series,
    running_statistics,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.self_attn.q_proj", (12, "self_attn.q_proj")),
        ("bert.encoder.layer.0.output.dense", (0, "output.dense")),
        ("h.3.mlp", (3, "mlp")),
        ("pooler.dense", (None, "pooler.dense")),
        ("fc1", (None, "fc1")),
    ],
)
def test_layer_and_kind(name, expected):
    assert layer_and_kind(name) == expected


def test_grid_places_every_module():
    ranks = {"m.0.q": 1, "m.0.v": 2, "m.1.q": 3, "pooler": 4}
    kinds, layers, grid = module_grid(ranks)
    assert kinds == ["q", "v", "pooler"]
    assert layers == [0, 1, None]
    assert grid == [[1, 3, None], [2, None, None], [None, None, 4]]


def test_stacks_with_equal_layers_keep_their_names_apart():
    ranks = {"encoder.0.q": 1, "decoder.0.q": 2}
    assert module_grid(ranks) == (["encoder.0.q", "decoder.0.q"], [None], [[1], [2]])


def test_running_statistics():
    alternating = running_statistics([1.0, -1.0] * 6, window=4)
    assert alternating["mean"][-1] == 0.0
    assert alternating["variance"][-1] == 1.0
    assert alternating["autocorrelation"][-1] == pytest.approx(-0.75)
    constant = running_statistics([2.0] * 4)
    assert all(math.isnan(value) for value in constant["autocorrelation"])


def test_pictures_are_written(tmp_path):
    ranks = {f"m.{i}.{kind}": i for i in range(3) for kind in ("q", "v")}
    start = dict.fromkeys(ranks, 4)
    history = [{"step": 5, "budget": 8, "ranks": ranks}]
    events = [{"kind": "eval", "step": 0, "loss": 3.0}, {"kind": "train", "step": 5, "loss": 2.0, "budget": 9}]
    point = {"y": 1e-6, "mean": 1e-7, "deviation": 1e-7, "snr": 0.5}
    paths = [
        plot_ranks(ranks, start, tmp_path / "sub" / "ranks.png"),
        plot_budget(events, history, tmp_path / "budget.svg"),
        plot_budget(events, [], tmp_path / "no-history.png"),
        plot_adapter(ranks, start, {**dict.fromkeys(ranks, 1.0), "m.0.q": math.nan}, history, tmp_path / "adapter.pdf"),
        plot_adapter({"fc": 0}, {"fc": 0}, {}, [], tmp_path / "bare.png"),
        plot_series({"m.0.q": [{"step": s, **point} for s in range(4)], "m.1.q": []}, tmp_path / "series.png"),
    ]
    assert all(path.stat().st_size > 1000 for path in paths)
    with pytest.raises(ValueError, match="expected a score series, got none; name modules with --trace"):
        plot_series({"m.0.q": []}, tmp_path / "none.png")
