"""Whole runs of tiny models: resume, stopping, early stopping, non-finite losses, reports and pictures."""

import dataclasses
import json
import os
import signal
import threading

import pytest
import torch

from igulora import IGUConfig, adapt, find_bank, read_adapter
from igulora.training import DataSource, Interrupted, NonFiniteLoss, RunSettings, Trainer, finetune
from igulora.training.causal_lm import CausalLM
from igulora.training.data import Example
from igulora.training.loop import checkpoints
from igulora.training.progress import read_metrics
from igulora.training.run import DataOptions, total_steps
from igulora.training.settings import schedule_factor

OPTIONS = {
    "r": 4,
    "target_rank": 2,
    "window": 2,
    "ig_every": 1,
    "t_init": 7,
    "t_final": 8,
    "delta_t": 2,
    "dropout": 0.1,
}
ROWS = [
    Example(f"what colour is the {thing}", colour)
    for thing, colour in (("apple", "red"), ("sky", "blue"), ("grass", "green"))
] * 6


def settings(**changes):
    values = {
        "lr": 5e-3,
        "batch_size": 4,
        "steps": 24,
        "max_length": 32,
        "log_every": 5,
        "eval_every": 0,
        "save_every": 0,
    }
    return RunSettings(**{**values, **changes})


@pytest.fixture
def trainer(tiny_llama, tiny_tokenizer, tmp_path):
    def make(changed=None, options=None, eval_rows=True):
        run = settings(**(changed or {}))
        config = IGUConfig(total_steps=run.steps, **{**OPTIONS, **(options or {})})
        task = CausalLM(tiny_tokenizer, tiny_llama, run.max_length, choices=["blue", "green", "red"])
        adapt(tiny_llama, config)
        rows = task.encode(ROWS)
        return Trainer(tiny_llama, task, rows, rows[:6] if eval_rows else [], run.steps, run, tmp_path)

    return make


def run(folder, data, output, changed=None, **options):
    source = DataOptions(DataSource(str(data)), eval_fraction=0.25)
    return finetune(
        str(folder), source, settings(**(changed or {})), {**OPTIONS, **options.pop("config", {})}, output, **options
    )


def adapter(folder):
    """All tensors of an adapter by name."""
    return {f"{n}.{part}": t for n, parts in read_adapter(folder).modules.items() for part, t in parts.items()}


def interrupt_at(monkeypatch, step):
    """Send a real SIGINT while ``step`` is under way."""
    train_step = Trainer._train_step

    def wrapped(self):
        if self.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        train_step(self)

    monkeypatch.setattr(Trainer, "_train_step", wrapped)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_is_bit_equal(llama_folder, colours, tmp_path, monkeypatch, accumulation):
    changed = {"accumulation_steps": accumulation, "eval_every": 3}
    whole = run(llama_folder, colours, tmp_path / "whole", changed)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 12)  # in the middle of pruning, at a step with an evaluation
        with pytest.raises(Interrupted, match="stopped at step 12 of 24; checkpoint in"):
            run(llama_folder, colours, tmp_path / "cut", changed)
    with pytest.raises(ValueError, match=r"expected the options of the run .*\(lr: 0.005 then, 0.01 now\)"):
        run(llama_folder, colours, tmp_path / "cut", {**changed, "lr": 0.01}, resume=True)
    cut = run(llama_folder, colours, tmp_path / "cut", changed, resume=True)
    first, second = adapter(whole.output), adapter(cut.output)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.report.after == cut.report.after
    assert whole.report.before == cut.report.before
    logged = [[e for e in read_metrics(r.output / "metrics.jsonl") if e["kind"] == "eval"] for r in (whole, cut)]
    assert logged[0] == logged[1]
    assert not checkpoints(cut.output)


def test_what_a_run_leaves(llama_folder, colours, tmp_path):
    result = run(llama_folder, colours, tmp_path / "out", {"save_every": 10})
    names = {path.name for path in result.output.iterdir()}
    assert names == {
        "adapter_model.safetensors", "igulora_config.json", "controller_state.safetensors", "metrics.jsonl", "run.json",
        "report.json", "ranks.png", "budget.png", "series.png",
    }  # fmt: skip
    report = result.report
    live = sum(read_adapter(result.output).meta["ranks"].values())
    assert (report.triplets_before, report.triplets_after) == (14 * 4, 14 * 2) == (56, live)
    assert report.trainable_after < report.trainable_before
    assert report.after["loss"] < report.before["loss"]
    assert report.steps == 24
    assert report.step_seconds > 0
    assert report.peak_memory > 2**20
    assert json.loads((result.output / "report.json").read_text())["metric"] == "accuracy"
    events = read_metrics(result.output / "metrics.jsonl")
    assert [e["step"] for e in events if e["kind"] == "eval"] == [0, 24]
    assert [e["step"] for e in events if e["kind"] == "train"] == [5, 10, 15, 20, 24]
    assert events[1].keys() >= {"loss", "lr", "budget", "live", "phase", "steps_per_second"}
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in result.pictures)


def test_what_is_recorded_of_an_alignment_is_what_was_adapted(llama_folder, colours, tmp_path):
    options = {"method": "ralora", "rank_pattern": {"q_proj": 8}}
    result = run(llama_folder, colours, tmp_path / "out", {"steps": 2}, config=options)
    measured = json.loads((result.output / "alignment.json").read_text())
    assert {layer["rank"] for name, layer in measured.items() if name.endswith("q_proj")} == {8}
    assert {layer["rank"] for name, layer in measured.items() if not name.endswith("q_proj")} == {2}
    ranks = read_adapter(result.output).meta["ranks"]
    assert ranks == {name: layer["blocks"] * layer["rank"] for name, layer in measured.items()}


@pytest.mark.parametrize(
    "method", ["adalora", "lora", "random", "magnitude", "flexlora", "igu-flex", "ralora", "ralora-pro"]
)
def test_every_method_runs(llama_folder, colours, tmp_path, method):
    settings = {"steps": 20}
    bounds = {"align_max_blocks": 2, "align_r_min": 2, "align_r_max": 3}
    if method.startswith("ralora"):
        settings |= bounds
    else:
        with pytest.raises(
            ValueError, match="expected align_max_blocks, align_r_min, align_r_max with method='ralora'"
        ):
            run(llama_folder, colours, tmp_path / "out", settings | bounds, config={"method": method})
    result = run(llama_folder, colours, tmp_path / "out", settings, config={"method": method, "window": 1})
    adapter = read_adapter(result.output)
    if method.startswith("ralora"):
        measured = json.loads((result.output / "alignment.json").read_text())
        assert adapter.config.block_pattern == {name: layer["blocks"] for name, layer in measured.items()}
        expected = {name: layer["blocks"] * layer["rank"] for name, layer in measured.items()}
        assert adapter.meta["ranks"] == expected
        assert {layer["rank"] for layer in measured.values()} == ({2, 3} if method == "ralora-pro" else {2})
        assert {layer["blocks"] for layer in measured.values()} <= {1, 2}
        assert (result.output / "dimensionality.png").read_bytes().startswith(b"\x89PNG")
        return
    assert result.report.triplets_after == 14 * 2
    moves = method in ("flexlora", "igu-flex")
    assert result.report.triplets_before == 14 * (2 if method == "lora" or moves else 4)
    assert (result.output / "moves.png").is_file() == moves


@pytest.mark.parametrize(("task", "metric"), [("classification", "accuracy"), ("regression", "correlation")])
def test_encoders(bert_folder, films, tmp_path, task, metric):
    columns = {"target_column": "score"} if task == "regression" else {}
    source = DataOptions(DataSource(str(films)), eval_fraction=0.25, **columns)
    result = finetune(str(bert_folder), source, settings(task=task, steps=30), OPTIONS, tmp_path / "out")
    assert result.report.metric == metric
    assert result.report.after["loss"] < result.report.before["loss"]
    assert "classifier" in read_adapter(result.output).saved


def test_early_stopping_waits_for_the_final_phase(trainer, monkeypatch, tmp_path):
    made = trainer({"eval_every": 1, "patience": 3, "steps": 40})
    scores = iter([0.1 * i for i in range(32)] + [5.0, 4.0, 5.0, 3.0] + [9.0] * 9)
    monkeypatch.setattr(made.task, "evaluate", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    outcome = made.run()
    # Final phase from step 32 (evaluation 32 scores 3.1, then 5.0 is the best), then three without anything better.
    assert outcome.stopped_early
    assert (outcome.best_step, outcome.step) == (33, 36)
    assert outcome.best == {"accuracy": 5.0, "loss": 1.0}
    assert read_adapter(tmp_path / "best").modules.keys() == set(find_bank(made.model).names)


def test_checkpoints_are_kept_to_the_last_two(trainer, tmp_path):
    trainer({"save_every": 5}).run()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000015", "step-00000020"]
    (
        tmp_path / "checkpoints" / "step-00000020" / "checkpoint.json"
    ).unlink()  # what a crash in the middle of saving leaves
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000015"]


@pytest.mark.parametrize("saved", [True, False])
def test_non_finite_loss_names_the_step_and_keeps_the_checkpoint(trainer, monkeypatch, tmp_path, saved):
    made = trainer({"save_every": 5 if saved else 0, "log_every": 4})
    loss, calls = made.task.loss, []

    def broken(model, batch):
        calls.extend([None] * torch.is_grad_enabled())  # a training step's call, not a check's
        return loss(model, batch) * (float("nan") if len(calls) == 7 else 1.0)

    monkeypatch.setattr(made.task, "loss", broken)
    kept = r"kept in .*step-00000005" if saved else "no checkpoint had been written"
    with pytest.raises(NonFiniteLoss, match=rf"expected a finite loss, got nan at step 7; .*{kept}"):
        made.run()
    assert len(checkpoints(tmp_path)) == int(saved)


def test_runs_outside_the_main_thread(trainer):
    done = []
    made = trainer({"steps": 17})
    thread = threading.Thread(target=lambda: done.append(made.run()))
    thread.start()
    thread.join()
    assert done[0].step == 17


def test_traced_modules_by_ending(trainer):
    assert trainer({"trace": ("v_proj",)}).controller.trace == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]


def test_unknown_traced_module(trainer):
    with pytest.raises(ValueError, match="expected trace to name adapted modules, got 'z_proj'"):
        trainer({"trace": ("z_proj",)})


def test_settings_say_what_they_expect():
    for values, error, message in [
        ({"task": "causal"}, ValueError, "expected task to be one of .*Did you mean 'causal-lm'"),
        ({"lr": -1.0}, ValueError, "expected lr > 0 and finite, got -1.0"),
        ({"batch_size": 0}, ValueError, "expected batch_size >= 1, got 0"),
        ({"steps": 2.5}, TypeError, "expected steps to be an int, got 2.5"),
        ({"warmup": 1.0}, ValueError, r"expected warmup, a fraction of the steps, in \[0, 1\)"),
        ({"lambda_lr_ratio": -1.0}, ValueError, "expected lambda_lr_ratio >= 0"),
        ({"max_grad_norm": -1.0}, ValueError, "expected max_grad_norm >= 0"),
    ]:
        with pytest.raises(error, match=message):
            RunSettings(**values)


def test_schedule_and_steps():
    factors = [schedule_factor(step, 100, 0.1, "linear") for step in range(100)]
    assert factors.index(max(factors)) == 10
    assert factors[10] == 1.0
    assert 0 < factors[99] < 0.02
    assert schedule_factor(55, 100, 0.1, "cosine") == pytest.approx(0.5)
    assert schedule_factor(99, 100, 0.1, "constant") == 1.0
    run_settings = dataclasses.replace(settings(), steps=None, epochs=2.5, accumulation_steps=2)
    assert total_steps(18, run_settings) == 7  # 5 micro-batches an epoch


def test_gradient_clipping_and_checkpointing_run(llama_folder, colours, tmp_path):
    plain = run(llama_folder, colours, tmp_path / "plain", {"steps": 17})
    result = run(
        llama_folder, colours, tmp_path / "out", {"steps": 17, "max_grad_norm": 0.1, "gradient_checkpointing": True}
    )
    assert result.report.before == plain.report.before
    assert result.report.after != plain.report.after


def test_an_interrupted_last_evaluation_keeps_the_adapter(llama_folder, colours, tmp_path, monkeypatch):
    evaluate, calls = Trainer.evaluate, []

    def interrupted(self):
        calls.append(self.step)
        if self.step == self.total_steps:
            raise KeyboardInterrupt
        return evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(llama_folder, colours, tmp_path / "out")
    assert calls == [0, 24]
    assert adapter(tmp_path / "out")


@pytest.mark.parametrize("ruined_at", [10, 24])
def test_ruined_weights_are_not_saved(trainer, monkeypatch, tmp_path, ruined_at):
    """An update can make weights NaN after a finite loss: the checkpoint before it stays the last good one."""
    made = trainer({"save_every": 5})
    step = Trainer._train_step

    def ruin(self):
        step(self)
        if self.step == ruined_at:
            with torch.no_grad():
                find_bank(self.model).weight[0] = float("nan")

    monkeypatch.setattr(Trainer, "_train_step", ruin)
    good = (ruined_at - 1) // 5 * 5
    with pytest.raises(NonFiniteLoss, match=rf"finite weights after step {ruined_at}, .*kept in .*step-{good:08d}"):
        made.run()
    assert checkpoints(tmp_path)[-1].name == f"step-{good:08d}"
