"""``igulora profile`` from end to end on tiny models, adapters from their folders, and bad input."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import igulora
from igulora.benchmarks.methods import METHODS
from igulora.cli import main
from igulora.cli import profile as command
from igulora.measure.parts import ADAPTER, ALLOCATION, ORTHOGONALITY, PARTS, PATH, SCORES

SMALL = ["--rows", "4", "--length", "8", "--rank", "4", "--warmup", "0"]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _log_level(monkeypatch) -> None:
    """The command sets it for its own process."""
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


def figures(file) -> dict[str, dict]:
    """Profiles of a file of figures by title."""
    return {profile["title"]: profile for profile in json.loads(file.read_text())["profiles"]}


def test_methods_side_by_side(tmp_path, capsys) -> None:
    files = [f"--picture={tmp_path}/p/bars.png", f"--trace={tmp_path}/t.json.gz", f"--json={tmp_path}/p.json"]
    chosen = ["--method", "floor", "--method", "igulora", "--method", "peft-adalora"]
    assert main(["profile", "--model", "tiny", *SMALL, *chosen, "--operators", "1", *files]) == 0
    text = capsys.readouterr().out
    for words in (
        *PARTS,
        "igulora default, path (6% of",
        "peft-adalora; CPU",
        "side by side",
        "aten::addmm_",
        "GFLOP",
    ):
        assert words in text
    assert (tmp_path / "p" / "bars.png").stat().st_size > 1000
    traces = {file.name for file in tmp_path.glob("t-*")}
    assert traces == {
        f"t-{name}.json.gz"
        for name in ("floor", "default-path", "default-plain", "default-plain-score", "peft-adalora")
    }
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["options"]["rank"] == 4
    assert {"igulora", "torch"} <= set(record["versions"])
    found = figures(tmp_path / "p.json")
    assert len(found) == 5
    assert found["floor"]["parts"][ADAPTER]["launches"] == 0
    assert found["igulora default, path (6% of steps)"]["parts"][PATH]["flops"] > 0
    for part in (ORTHOGONALITY, SCORES, ALLOCATION):
        scored = found["igulora default, plain+score (6% of steps)"]["parts"][part]
        assert 0 < scored["launches"] < found["peft-adalora"]["parts"][part]["launches"]


def test_names_of_methods() -> None:
    assert command._known("igulora", METHODS) == "default"
    assert command._known("igulora-on-path", METHODS) == command._known("on-path", METHODS) == "on-path"
    assert all(name in METHODS for name in command.DEFAULT)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "peft-adalor"], "Did you mean 'peft-adalora'?"),
        (["--method", "igulora-peft-lora"], "expected --method to be one of igulora, igulora-"),
        (["--rows", "0"], "expected --rows of at least 1, got 0"),
        (["--length", "1"], "expected --length of at least 2, got 1"),
        (["--rank", "0"], "expected --rank of at least 1, got 0"),
        (["--picture", "bars.gif"], "expected --picture to end in .png or .pdf or .svg, got bars.gif"),
        (["--trace", "trace.txt"], "expected --trace to end in .json or .json.gz, got trace.txt"),
        (["--json", "figures"], "expected --json to end in .json, got figures"),
        (["--device", "nowhere"], "expected a device of this machine such as cpu or cuda, got 'nowhere'"),
        (["--base", "tiny"], "expected an adapter's folder as --model with --base, got 'tiny'"),
    ],
)
def test_bad_input_is_told_in_one_line(args, message, capsys) -> None:
    assert main(["profile", "--model", "tiny", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_without_a_model(tmp_path, capsys) -> None:
    assert main(["profile", "--model", str(tmp_path), *SMALL]) == 2
    assert "expected a model's folder with a config.json" in capsys.readouterr().err


def test_what_is_not_installed_is_skipped(monkeypatch, capsys) -> None:
    reason = "peft is not installed; pip install '.[bench]'"
    monkeypatch.setattr(METHODS["peft-lora"], "available", classmethod(lambda cls: reason))
    assert main(["profile", "--model", "tiny", *SMALL, "--method", "peft-lora", "--method", "floor"]) == 0
    text = capsys.readouterr().out
    assert f"Skipped peft-lora: {reason}" in text
    assert "floor; CPU" in text
    assert main(["profile", "--model", "tiny", *SMALL, "--method", "peft-lora"]) == 2
    assert "expected at least one method that can run here, got none" in capsys.readouterr().err


def test_memory_that_does_not_suffice_is_told_and_the_rest_goes_on(monkeypatch, capsys) -> None:
    def full(self, batch):
        raise torch.OutOfMemoryError("no 9 GiB left")

    monkeypatch.setattr(METHODS["peft-lora"], "step", full)
    assert main(["profile", "--model", "tiny", *SMALL, "--method", "peft-lora", "--method", "floor"]) == 0
    text = capsys.readouterr().out
    assert "Left out, no memory for it: no 9 GiB left" in text
    assert "floor; CPU" in text


@pytest.mark.parametrize("method", ["igu", "lora"])
def test_an_adapter_of_ours(tmp_path, llama_folder, capsys, method) -> None:
    options = {"window": 2, "ig_every": 1, "t_init": 6, "total_steps": 40, "t_final": 10} if method == "igu" else {}
    model = igulora.adapt(
        AutoModelForCausalLM.from_pretrained(llama_folder), igulora.IGUConfig(r=4, method=method, **options)
    )
    igulora.save_adapter(model, tmp_path / "mine")
    command_line = ["profile", "--model", str(tmp_path / "mine"), *SMALL, f"--json={tmp_path}/p.json"]
    assert main(command_line) == 2
    assert "expected --base, the base model of the adapter" in capsys.readouterr().err
    assert main([*command_line, "--base", str(llama_folder)]) == 0
    found = figures(tmp_path / "p.json")
    assert all(title.startswith(f"mine ({method})") for title in found)
    assert all(profile["parts"][ADAPTER]["flops"] > 0 for profile in found.values())
    assert any(profile["parts"][SCORES]["launches"] for profile in found.values()) == (method == "igu")


@pytest.fixture
def adalora(tmp_path, llama_folder):
    """Folder of an AdaLoRA adapter of PEFT's after so many steps."""
    peft = pytest.importorskip("peft")

    def make(steps: int, **options: int):
        options = {"init_r": 8, "target_r": 2, "total_step": 60, "tinit": 3, "tfinal": 40, **options}
        config = peft.AdaLoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        tokens = torch.arange(16).view(2, 8)
        for step in range(1, steps + 1):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    return make


@pytest.mark.parametrize("interval", [2, 7, 30])
def test_of_adalora_steps_only_every_so_manieth_allocates(tmp_path, adalora, interval) -> None:
    """Scored in steps 4 to 19."""
    folder = adalora(0, deltaT=interval)
    assert main(["profile", "--model", str(folder), *SMALL, f"--json={tmp_path}/p.json"]) == 0
    found = {
        title.partition(", ")[2]: profile["parts"][ALLOCATION]["syncs"]
        for title, profile in figures(tmp_path / "p.json").items()
    }
    if interval == 30:
        assert found == {"": 0}
        return
    share = len([step for step in range(4, 20) if step % interval == 0]) / 16
    plain, mask = f"plain ({1 - share:.0%} of steps)", f"mask ({share:.0%} of steps)"
    assert set(found) == {plain, mask}
    assert found[plain] == 0 < found[mask]


@pytest.mark.filterwarnings("ignore:Adapter 'default'", "ignore:The following rank_pattern keys")
def test_an_adalora_adapter_that_was_pruned(tmp_path, adalora) -> None:
    """PEFT loads a quarter of the triplets, warns of matrices that are left without any, and still plans with all."""
    command_line = ["profile", "--model", str(adalora(25)), *SMALL, f"--json={tmp_path}/p.json"]
    assert main(command_line) == 0
    ((_, profile),) = figures(tmp_path / "p.json").items()
    assert profile["parts"][ALLOCATION]["syncs"] > 0


@pytest.mark.parametrize("kind", ["LoraConfig", "AdaLoraConfig"])
def test_an_adapter_of_pefts(tmp_path, llama_folder, kind) -> None:
    peft = pytest.importorskip("peft")
    options = (
        {"init_r": 4, "target_r": 2, "total_step": 100, "tinit": 10, "tfinal": 20}
        if kind == "AdaLoraConfig"
        else {"r": 4}
    )
    config = getattr(peft, kind)(target_modules="all-linear", task_type="CAUSAL_LM", **options)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), config).save_pretrained(tmp_path / "theirs")
    assert main(["profile", "--model", str(tmp_path / "theirs"), *SMALL, f"--json={tmp_path}/p.json"]) == 0
    ((title, profile),) = figures(tmp_path / "p.json").items()
    assert title.startswith("theirs (PEFT ")
    assert profile["parts"][ADAPTER]["flops"] > 0
    assert (profile["parts"][ALLOCATION]["syncs"] > 0) == (kind == "AdaLoraConfig")
