"""The Trainer's checkpoints: what lies in them, and that a run goes on from them as if it had never stopped."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import igulora
from igulora.adapter_file import CONFIG_FILE, CONTROLLER_FILE
from igulora.trainer import IGUCallback, IGUTrainer

transformers = pytest.importorskip("transformers")


class StopAfter(transformers.TrainerCallback):
    """Ends training after a step, as a killed job does after its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.fixture
def build(llama, rows, arguments, config):
    """``build(callbacks, options, **arguments)``: a fresh trainer that saves and logs at every third step."""

    def make(
        callbacks: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
        kind: Any = IGUTrainer,
        **changes: Any,
    ) -> Any:
        settings = config(**{"orthogonality": 0.1, "window": 3, "t_init": 9, "dropout": 0.2, **(options or {})})
        args = arguments(
            **{
                "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1,
                "save_total_limit": 2, **changes,
            }
        )  # fmt: skip
        model = igulora.adapt(llama(), settings)
        return kind(
            model=model, args=args, train_dataset=rows(), eval_dataset=rows(6, seed=2), callbacks=list(callbacks)
        )

    return make


def losses(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.parametrize(
    ("options", "step"),
    [({}, 4), ({}, 11), ({"path_pass": "separate"}, 17), ({"method": "igu-flex", "moves": 3}, 12)],
    ids=["warmup-in-a-window", "pruning", "final", "igu-flex"],
)
def test_a_resumed_run_is_the_uninterrupted_one(build, state_of, assert_same, tmp_path, options, step) -> None:
    """In the middle of an epoch (ten micro-batches, five steps), with dropout: losses, weights, masks, scores, bit by bit."""
    whole = build(options=options, output_dir=str(tmp_path / "whole"), save_strategy="no")
    whole.train()
    build(callbacks=(StopAfter(step),), options=options).train()
    resumed = build(options=options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 20
    assert losses(resumed) == losses(whole)
    assert_same(state_of(resumed), state_of(whole))


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"method": "adalora"}, 4),
        ({"estimator": "instantaneous", "aggregate": "absolute"}, 17),
        ({"method": "flexlora", "window": 1, "moves": 3}, 11),
    ],
    ids=["adalora", "absolute", "flexlora"],
)
def test_so_it_is_with_the_callback_alone(build, state_of, assert_same, tmp_path, options, step) -> None:
    whole = build(
        (IGUCallback(),), options, transformers.Trainer, output_dir=str(tmp_path / "whole"), save_strategy="no"
    )
    whole.train()
    build((IGUCallback(), StopAfter(step)), options, transformers.Trainer).train()
    resumed = build((IGUCallback(),), options, transformers.Trainer)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    states = []
    for trainer in (resumed, whole):
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, IGUCallback))
        trainer.igu_controller = callback.controller
        states.append(state_of(trainer))
    assert_same(*states)


def test_a_checkpoint_holds_the_adapter_and_no_base(build, llama, tmp_path) -> None:
    trainer = build(save_steps=10)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-20"
    names = {path.name for path in folder.iterdir()}
    assert {
        CONFIG_FILE,
        CONTROLLER_FILE,
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    } <= names
    assert {"trainer_state.json", "training_args.bin"} <= names
    assert not {"model.safetensors", "config.json"} & names
    model = igulora.load_adapter(llama(), folder)
    ids = torch.arange(1, 10)[None]
    trainer.model.eval()
    assert torch.equal(model.eval()(ids).logits, trainer.model(ids).logits)


def test_save_model_writes_the_adapter_and_its_history_and_exports(build, llama, tmp_path) -> None:
    trainer = build(save_strategy="no", options={"dropout": 0.0})
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    assert not (tmp_path / "end" / CONTROLLER_FILE).exists()
    file = igulora.read_adapter(tmp_path / "end")
    assert file.meta["history"] == trainer.igu_controller.history
    assert file.meta["ranks"] == trainer.igu_controller.live_ranks()
    igulora.export_peft(trainer.model, tmp_path / "lora")
    ranks = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert ranks["peft_type"] == "LORA"
    peft = pytest.importorskip("peft")
    ids = torch.arange(1, 10)[None]
    exported = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(exported(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    igulora.remove(igulora.merge(trainer.model))  # a plain model again: saved as the Trainer saves models
    trainer.save_model(str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", [IGUTrainer, transformers.Trainer])
def test_the_best_model_comes_back_with_its_masks(build, caplog, kind) -> None:
    """Evaluation during pruning: the best checkpoint has more triplets than the end, which is said."""

    class Falls(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            metrics["eval_loss"] = float(abs(state.global_step - 12))  # step 12 is best

    callbacks = (Falls(),) if kind is IGUTrainer else (IGUCallback(), Falls())
    changes = {
        "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True, "save_only_model": True,
    }  # fmt: skip
    options = {"estimator": "instantaneous"} if kind is not IGUTrainer else {}
    trainer = build(callbacks, options, kind, **changes)
    trainer.train()
    assert trainer.state.best_global_step == 12
    file = igulora.read_adapter(trainer.state.best_model_checkpoint)
    bank = igulora.find_bank(trainer.model)
    assert file.meta["ranks"] == bank.ranks()
    assert sum(bank.ranks().values()) == file.meta["history"][-1]["budget"] > 14
    assert "from before the ranks became final (step 15)" in caplog.text
    for name, layer in zip(bank.names, bank.layers, strict=True):
        assert torch.equal(layer.mask, file.modules[name]["mask"])
        assert torch.equal(layer.lora_P, file.modules[name]["lora_P"])


def test_a_checkpoint_without_the_controller_is_refused(build) -> None:
    build((StopAfter(5),), save_only_model=True).train()
    with pytest.raises(ValueError, match="expected the state of a controller.*save_only_model"):
        build().train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_adapter_is_refused(build) -> None:
    build((StopAfter(5),)).train()
    with pytest.raises(ValueError, match="expected the modules and ranks of the model"):
        build(options={"r": 3}).train(resume_from_checkpoint=True)


def test_a_checkpoint_whose_writing_was_cut_off_is_refused(build, tmp_path) -> None:
    build((StopAfter(5),)).train()
    folder = tmp_path / "out" / "checkpoint-5"
    other = igulora.read_adapter(tmp_path / "out" / "checkpoint-4")
    assert other.meta["controller"] is not None
    (folder / CONTROLLER_FILE).write_bytes((tmp_path / "out" / "checkpoint-4" / CONTROLLER_FILE).read_bytes())
    with pytest.raises(ValueError, match="of another save"):
        build().train(resume_from_checkpoint=True)


def test_the_callback_misses_its_files(build, tmp_path) -> None:
    """A checkpoint of a Trainer that had no callback."""
    options = {"method": "adalora"}
    build((IGUCallback(), StopAfter(5)), options, transformers.Trainer).train()
    (tmp_path / "out" / "checkpoint-5" / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=r"expected the adapter and controller of step 5.*IGUCallback\(resume_from"):
        build((IGUCallback(),), options, transformers.Trainer).train(resume_from_checkpoint=True)


def test_training_twice_starts_the_schedule_anew(build) -> None:
    trainer = build(save_strategy="no")
    trainer.train()
    first = trainer.igu_controller
    trainer.train()
    assert trainer.igu_controller is not first
    assert trainer.igu_controller.global_step == 20
    assert [event["step"] for event in trainer.igu_controller.history] == [event["step"] for event in first.history]


def test_a_head_is_saved_and_resumed(rows, arguments, config, tmp_path) -> None:
    """modules_to_save are part of the adapter; what else is trainable no checkpoint would hold."""

    def make(saved: list[str], **changes: Any) -> IGUTrainer:
        torch.manual_seed(0)
        shape = transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
        )  # fmt: skip
        model: nn.Module = transformers.LlamaForSequenceClassification(shape)
        igulora.adapt(model, config(modules_to_save=saved, target_modules=["q_proj", "v_proj"]))
        if not saved:
            model.score.requires_grad_(True)
        data = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(rows())]
        args = arguments(**{"save_strategy": "steps", "save_steps": 5, **changes})
        return IGUTrainer(model=model, args=args, train_dataset=data, callbacks=[StopAfter(10)])

    with pytest.raises(ValueError, match=r"got also score.weight.*modules_to_save"):
        make([]).train()
    trainer = make(["score"])
    trainer.train()
    again = make(["score"])
    again._load_from_checkpoint(str(tmp_path / "out" / "checkpoint-10"))
    for (name, one), other in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name
