"""``igulora tune`` on products so small that Triton's interpreter measures them; which form wins there is left open."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

import igulora
from igulora.cli import main, tune
from igulora.kernels import choice_file

SMALL = ["--rows", "12", "--rank", "4", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A file of choices of the test's own."""
    monkeypatch.setenv("IGULORA_CACHE_DIR", str(tmp_path / "cache"))
    choice_file.warn_once.cache_clear()
    return tmp_path / "cache"


def test_measure_show_clear(folder, capsys):
    assert main(["tune", "--layer", "24x16", "--layer", "24x16", *SMALL, "--rows", "20", "--dropout"]) == 0
    text = capsys.readouterr().out
    problems = ["forward fp32 16x24x16 r16", "forward fp32 32x24x16 r16"]
    problems += [f"backward fp32 {rows}x16x24 r16 dropout" for rows in (16, 32)]
    for problem in problems:
        assert text.count(problem) == 1
    for word in ("form and tile", "share", "Kept in"):
        assert word in text
    (entries,) = json.loads((folder / "choices.json").read_text())["choices"].values()
    assert set(entries) == set(problems)

    assert main(["tune", "--show"]) == 0
    shown = capsys.readouterr().out
    assert f"torch {torch.__version__}" in shown
    for problem in problems:
        assert problem in shown

    assert main(["tune", "--clear"]) == 0
    assert "Dropped 4 measured choices" in capsys.readouterr().out
    assert main(["tune", "--show"]) == 0
    assert "No measured choices in" in capsys.readouterr().out


def test_a_second_run_keeps_what_the_first_measured(capsys):
    for layer in ("8x8", "8x16"):
        assert main(["tune", "--layer", layer, *SMALL]) == 0
    capsys.readouterr()
    assert main(["tune", "--clear"]) == 0
    assert "Dropped 4" in capsys.readouterr().out


def test_a_form_that_was_left_out_is_told(monkeypatch, capsys):
    from igulora.kernels.fused import product

    def fails(*args, **options):
        raise RuntimeError("does not compile\nat all")

    monkeypatch.setattr(product.gemm, "launch_gemm_rank", fails)
    assert main(["tune", "--layer", "8x8", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "left out for forward fp32 16x8x8 r16: pointers" in text
    assert "RuntimeError: does not compile\n" in text


def test_layers_of_a_model_and_of_an_adapter(llama_folder, net, config, tmp_path, capsys):
    pytest.importorskip("transformers")
    shapes = tune.layers_of(str(llama_folder))
    settings = json.loads((llama_folder / "config.json").read_text())
    hidden, wide = settings["hidden_size"], settings["intermediate_size"]
    assert {(hidden, hidden), (wide, hidden), (hidden, wide)} <= set(shapes)
    assert len(shapes) == len(set(shapes))
    assert (settings["vocab_size"], hidden) not in shapes

    igulora.save_adapter(igulora.adapt(net(), config()), tmp_path / "adapter")
    assert tune.layers_of(str(tmp_path / "adapter")) == [(12, 8), (10, 12), (12, 10), (3, 12)]
    assert main(["tune", "--model", str(tmp_path / "adapter"), "--layer", "12x8", *SMALL]) == 0
    assert "forward fp32 16x3x12 r16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected layers to measure, got none; give --layer OUTxIN"),
        (["--show", "--layer", "8x8"], "expected --show or --clear alone"),
        (["--layer", "8x8", "--rows", "0"], "expected rows of at least 1, got [0]"),
        (["--layer", "8x8", "--rank", "0"], "expected a rank from 1 to 256, got 0"),
        (["--layer", "8x8", "--rank", "257"], "expected a rank from 1 to 256, got 257"),
        (["--model", "/nowhere/model"], "expected a model or an igulora adapter at '/nowhere/model'"),
    ],
)
def test_bad_input_is_told_in_one_line(args, message, capsys):
    assert main(["tune", "--dtype", "float32", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("layer", ["8", "8x", "8x8x8", "0x8", "8x00", "-8x8", "axb"])
def test_a_layer_is_two_sizes(layer, capsys):
    with pytest.raises(SystemExit):
        main(["tune", f"--layer={layer}"])
    assert f"expected OUTxIN such as 11008x4096, got '{layer}'" in capsys.readouterr().err


def test_without_a_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    assert main(["tune", "--layer", "8x8"]) == 2
    assert "expected a CUDA device to measure on, got none" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes these")
def test_what_the_interpreter_cannot_do_is_told(capsys):
    assert main(["tune", "--layer", "8x8"]) == 2
    assert "Triton's interpreter computes products of bfloat16 wrongly" in capsys.readouterr().err
    assert main(["tune", "--layer", "4096x4096", "--dtype", "float32"]) == 2
    assert "take a small layer and few rows" in capsys.readouterr().err


def test_memory_that_does_not_suffice_is_told(monkeypatch, capsys):
    from igulora.kernels.fused import tuning

    def full(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(tuning, "tune", full)
    assert main(["tune", "--layer", "8x8", *SMALL]) == 2
    assert "got none left after 0 of 2 (those are kept); take fewer --rows" in capsys.readouterr().err


def test_an_edited_file_is_shown_as_far_as_it_goes(folder, capsys):
    choice_file.add(
        "a device", {"forward": {"product": "library", "ms": "fast"}, "backward": {"ms": 1, "library_ms": 0}}
    )
    assert main(["tune", "--show"]) == 0
    text = capsys.readouterr().out
    assert "a device" in text
    assert "forward" in text
