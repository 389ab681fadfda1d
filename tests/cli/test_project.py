"""``igulora project``: a table and a file that say what they are, and errors that help."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("triton")

from igulora.cli import main
from igulora.measure.roofline import PROJECTION

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def model(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(tmp_path)


def test_table_and_file(model, tmp_path, capsys) -> None:
    file = tmp_path / "deep" / "made.json"
    options = ["--rows", "2", "--length", "16", "--rank", "4", "--methods", "floor,instantaneous", "--json", str(file)]
    assert main(["project", model, *options]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert PROJECTION.capitalize() in text
    assert f"Projected step ({PROJECTION})" in text
    assert "H100 SXM" in text
    made = json.loads(file.read_text(encoding="utf-8"))
    assert made["what"] == PROJECTION
    assert made["methods"]["instantaneous"]["over"]["floor"] > 1
    assert made["case"] == {"rows": 2, "length": 16, "rank": 4, "target_rank": 2}
    # The table's figures are those of the file.
    assert f"{made['methods']['floor']['mean']['launches']:,.0f}" in text


def test_a_host_that_is_slow_and_a_card_of_ones_own(model, tmp_path) -> None:
    def step(*options: str) -> dict[str, float]:
        file = tmp_path / "made.json"
        base = [
            "project",
            model,
            "--rows",
            "2",
            "--length",
            "16",
            "--rank",
            "4",
            "--methods",
            "floor",
            "--json",
            str(file),
        ]
        assert main([*base, *options]) == 0
        return json.loads(file.read_text(encoding="utf-8"))["methods"]["floor"]["mean"]

    plain = step()
    assert step("--host-cost", "1000")["step_s"] == pytest.approx(1e-3 * plain["launches"])
    slow = step("--bandwidth", "0.001", "--rate", "0.01", "--launch-cost", "0", "--host-cost", "0")
    assert slow["step_s"] == slow["device_s"] > (plain["read"] + plain["written"]) / 1e9
    assert step("--card", "4090")["device_s"] > plain["device_s"]


def test_a_model_that_no_method_adapts_is_refused_in_one_line(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "n_layer": 3, "n_embd": 64, "n_head": 4}', encoding="utf-8"
    )
    assert main(["project", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "expected blocks of GPT2LMHeadModel that keep all matrices in nn.Linear" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lama-3-8b"], "Did you mean 'llama-3-8b'"),
        (["llama-3-8b", "--card", "H10"], "Did you mean 'h100'"),
        (["llama-3-8b", "--methods", "peft-lorra"], "Did you mean 'peft-lora'"),
        (["llama-3-8b", "--rank", "0"], "expected --rank of at least 1"),
        (["llama-3-8b", "--target-rank", "64"], "expected --target-rank from 1 to the rank of 32"),
        (["llama-3-8b", "--length", "100000"], "expected --length of at most 8192"),
        (["llama-3-8b", "--bandwidth", "0"], "expected bandwidth > 0"),
        (["llama-3-8b", "--host-cost", "-1"], "expected --host-cost"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(arguments: list[str], message: str, capsys) -> None:
    assert main(["project", *arguments]) == 2
    assert message in capsys.readouterr().err
