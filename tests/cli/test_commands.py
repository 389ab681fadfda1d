"""The command end to end on tiny models: every subcommand, every message, every exit status."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from igulora import read_adapter
from igulora.cli import main
from igulora.training.loop import checkpoints

SMALL = ["--r", "4", "--target-rank", "2", "--window", "2", "--ig-every", "1", "--t-init", "7", "--t-final", "8", "--delta-t", "2",
         "--batch-size", "4", "--steps", "20", "--max-length", "32", "--log-every", "5"]  # fmt: skip


@pytest.fixture
def finetune(llama_folder, colours, tmp_path):
    """Run ``igulora finetune`` on a tiny model; later options win."""

    def run(*args, output="out"):
        base = ["finetune", "--model", str(llama_folder), "--train", str(colours), "--output", str(tmp_path / output)]
        return main([*base, *SMALL, *args])

    return run


def test_finetune_inspect_export(finetune, llama_folder, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    assert finetune() == 0
    text = capsys.readouterr().out
    assert "held-out accuracy" in text
    assert "step 20/20" in text
    for word in ("live triplets", "trainable parameters", "optimizer step, median", "peak memory"):
        assert word in text

    picture = tmp_path / "adapter.png"
    assert main(["inspect", str(tmp_path / "out"), "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "28 of 56 triplets live" in text
    for title in ("Live triplets by layer and module", "Scores by kind of module", "Budget history"):
        assert title in text
    assert picture.read_bytes().startswith(b"\x89PNG")

    assert main(["export", str(tmp_path / "out"), "--output", str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama_folder)
    ids = torch.tensor([[2, 5, 6, 7]])
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        plain = base(ids).logits
        exported = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()(ids).logits
        from igulora import load_adapter

        ours = (
            load_adapter(transformers.AutoModelForCausalLM.from_pretrained(llama_folder), tmp_path / "out")
            .eval()(ids)
            .logits
        )
    torch.testing.assert_close(exported, ours, rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3

    assert main(["export", str(tmp_path / "out"), "--output", str(tmp_path / "served"), "--uniform-rank"]) == 0
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["r"] == config["lora_alpha"]


@pytest.mark.parametrize("kind", ["LORA", "ADALORA"])
def test_import_of_what_peft_saved(kind, llama_folder, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    targets = ["q_proj", "down_proj"]
    options = {
        "LORA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False),
        "ADALORA": lambda: peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=targets, init_lora_weights=False),
    }
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(llama_folder), options[kind]()
    ).eval()
    theirs.save_pretrained(tmp_path / "peft")
    assert main(["import", str(tmp_path / "peft"), "--output", str(tmp_path / "ours")]) == 0
    ids = torch.tensor([[2, 5, 6, 7]])
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    from igulora import load_adapter

    with torch.no_grad():
        plain = base(ids).logits
        ours = load_adapter(base, tmp_path / "ours").eval()(ids).logits
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3
    assert main(["inspect", str(tmp_path / "ours")]) == 0
    assert "q_proj" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "peft"), "--output", str(tmp_path / "ours")]) == 2
    assert main(["import", str(tmp_path / "ours"), "--output", str(tmp_path / "new")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("igulora: error: expected an empty or new folder")
    assert second.startswith("igulora: error: expected adapter_config.json")
    assert not (tmp_path / "new").exists()


def test_inspect_without_scores_and_history(finetune, tmp_path, capsys):
    assert finetune("--method", "lora", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert main(["inspect", str(tmp_path / "out"), "--picture", str(tmp_path / "p.svg")]) == 0
    text = capsys.readouterr().out
    assert "No scores" in text
    assert "No budget history" in text


@pytest.mark.parametrize(("task", "column"), [("classification", "label"), ("regression", "score")])
def test_encoders_with_named_columns(bert_folder, films, tmp_path, capsys, task, column):
    base = ["finetune", "--model", str(bert_folder), "--train", str(films), "--eval", str(films), "--task", task]
    columns = ["--text-column", "text", "--label-column", column]
    assert main([*base, *columns, *SMALL, "--output", str(tmp_path / "out")]) == 0
    assert ("accuracy" if task == "classification" else "pearson") in capsys.readouterr().out
    assert read_adapter(tmp_path / "out").saved


def test_a_full_output_folder_needs_overwrite(finetune, tmp_path, capsys):
    assert finetune("--quiet") == 0
    assert finetune("--quiet") == 2
    message = capsys.readouterr().err
    assert message.startswith("igulora: error: expected an empty or new folder for --output, found files in")
    assert message.count("\n") == 1
    assert finetune("--quiet", "--overwrite") == 0
    assert finetune("--quiet", "--resume") == 2
    assert "found a finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train", "none.csv"], "expected a data file, found nothing at none.csv"),
        (["--response-column", "answer"], "expected a column 'answer' in"),
        (["--task", "classification"], "expected a column called 'text' or"),
        (
            ["--task", "regression", "--text-column", "prompt", "--label-column", "response"],
            "expected numbers in the column",
        ),
        (
            ["--task", "classification", "--prompt-column", "prompt"],
            "expected --text-column and --label-column for --task",
        ),
        (["--label-column", "response"], "expected --prompt-column and --response-column for --task causal-lm"),
        (["--model", "/nowhere/model"], "expected a model's folder, found nothing at /nowhere/model"),
        (["--target-rank", "5"], "expected target_rank <= r"),
        (["--t-final", "13"], "expected total_steps > t_init + t_final"),
        (["--t-init", "3"], "expected at least 3 score updates before the first allocation"),
        (["--target-modules", "z_proj"], "z_proj"),
        (["--preset", "MNLLI"], "expected a preset out of"),
        (["--trace", "z_proj"], "expected trace to name adapted modules"),
        (["--max-length", "5"], "expected max_length of at least"),
        (["--eval-fraction", "2"], r"expected the held-out fraction in (0, 1), got 2.0"),
        (["--limit-train", "0"], "expected --limit-train of at least 1, got 0"),
        (["--lr", "0"], "expected lr > 0"),
        (["--device", "meta"], "expected a device of this machine such as cpu or cuda, got 'meta'"),
    ],
)
def test_bad_input_is_told_in_one_line_and_nothing_is_written(finetune, tmp_path, capsys, args, message):
    assert finetune("--quiet", *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_traceback_on_request(finetune):
    with pytest.raises(ValueError, match="found nothing at none.csv"):
        finetune("--train", "none.csv", "--traceback")


def test_faults_are_not_dressed_up_as_user_errors(finetune, monkeypatch):
    monkeypatch.setattr("igulora.training.run.adapt", lambda model, config: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        finetune("--quiet")
    monkeypatch.setattr("igulora.training.run.adapt", lambda model, config: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting property name"):
        finetune("--quiet")


def test_a_model_needs_data_and_an_output(llama_folder, tmp_path, capsys):
    assert main(["finetune", "--model", str(llama_folder), "--output", str(tmp_path / "out")]) == 2
    assert "expected training data for the model" in capsys.readouterr().err
    assert main(["finetune", "--model", str(llama_folder), "--train", "x.csv"]) == 2
    assert "expected --output" in capsys.readouterr().err
    assert main(["finetune", "--eval", "x.csv"]) == 2
    assert "expected --train with --eval" in capsys.readouterr().err


def test_bad_adapters(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "x")]) == 2
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "x")]) == 2
    assert main(["inspect", str(tmp_path), "--picture", "picture.bmp"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("igulora: error: expected") for line in lines)


def test_ctrl_c_writes_a_checkpoint_and_exits_130(llama_folder, colours, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["finetune", "--model", str(llama_folder), "--train", str(colours), "--output", str(output), *SMALL,
               "--steps", "100000", "--log-every", "1", "--seed", "3"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "igulora", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "igulora: stopped at step" in error
    assert "Traceback" not in error
    (saved,) = checkpoints(output)
    step = int(saved.name.split("-")[1])
    assert step >= 3

    process = subprocess.Popen(
        [sys.executable, "-m", "igulora", *command, "--resume"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith(f"step {step + 2}/"):
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_ctrl_c_before_training_exits_130(finetune, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("igulora.training.run.load_model", stop)
    assert finetune("--quiet") == 130
    assert capsys.readouterr().err == "igulora: stopped\n"


def test_no_command_shows_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert "igulora " in capsys.readouterr().out


def test_running_from_the_repository_root_registers_operators_once():
    """transformers imports a top-level ``kernels`` where it finds one; ours must then be empty."""
    from pathlib import Path

    root = Path(__file__).parents[2]
    code = (
        "import igulora, transformers.integrations.hub_kernels, torch, igulora.kernels as k;"
        "y = k.svd_linear(torch.ones(2, 4), torch.ones(3, 4), None, torch.ones(1, 3), torch.ones(1), torch.ones(1, 4),"
        " torch.ones(1), torch.ones(()));"
        "print(y.sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "48.0"
