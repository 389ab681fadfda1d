"""Trainers over PEFT's models: the same run as over an adapted one, checkpoints that PEFT loads, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import igulora
from igulora.trainer import IGUCallback, IGUTrainer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SCHEDULE = {
    "r": 4, "target_rank": 2, "total_steps": 20, "t_init": 9, "t_final": 5, "delta_t": 2, "window": 3, "ig_every": 1,
    "orthogonality": 0.1, "seed": 2, "target_modules": "all-linear",
}  # fmt: skip


@pytest.fixture
def build(llama: Any, rows: Any, arguments: Any) -> Any:
    """``build(kind, by_peft, callbacks, method, **arguments)``: a trainer over a PEFT model, or over one of igulora.adapt."""

    def make(
        kind: Any = IGUTrainer, by_peft: bool = True, callbacks: Any = (), method: str = "igu", **changes: Any
    ) -> Any:
        options = {**SCHEDULE, "method": method, **({"window": 1} if method == "adalora" else {})}
        if by_peft:
            model = peft.get_peft_model(llama(), igulora.IGULoraConfig(task_type="CAUSAL_LM", **options))
        else:
            model = igulora.adapt(llama(), igulora.IGUConfig(**options))
        args = arguments(
            **{
                "gradient_accumulation_steps": 2,
                "save_strategy": "steps",
                "save_steps": 4,
                "logging_steps": 1,
                **changes,
            }
        )
        return kind(model=model, args=args, train_dataset=rows(), callbacks=list(callbacks))

    return make


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_peft_model_trains_as_an_adapted_one(build: Any, tmp_path: Path) -> None:
    ends = []
    for by_peft in (True, False):
        trainer = build(by_peft=by_peft, output_dir=str(tmp_path / str(by_peft)))
        trainer.train()
        ends.append((trainer, igulora.find_bank(trainer.model)))
    (mine, bank), (other, theirs) = ends
    assert losses(mine) == losses(other)
    assert torch.equal(bank.weight, theirs.weight)
    assert torch.equal(bank.mask, theirs.mask)
    assert 0 < bank.mask.sum() < bank.triplets


def test_a_checkpoint_is_pefts_and_is_resumed_bit_by_bit(build: Any, llama: Any, tmp_path: Path) -> None:
    whole = build(output_dir=str(tmp_path))
    whole.train()
    checkpoint = tmp_path / "checkpoint-12"
    assert {p.name for p in checkpoint.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "igulora"}
    resumed = build(output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    ends = [igulora.find_bank(t.model) for t in (whole, resumed)]
    assert torch.equal(ends[0].weight, ends[1].weight)
    assert torch.equal(ends[0].mask, ends[1].mask)

    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-20").eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, whole.model.eval()(input_ids=ids).logits)


def test_a_callback_suffices_for_adalora(build: Any, tmp_path: Path) -> None:
    stock = build(transformers.Trainer, callbacks=[IGUCallback()], method="adalora", output_dir=str(tmp_path / "stock"))
    stock.train()
    bank = igulora.find_bank(stock.model)
    assert bank.mask.sum() == bank.triplets // 2
    checkpoint = str(tmp_path / "stock" / "checkpoint-12")
    callback = IGUCallback(resume_from=checkpoint)
    again = build(transformers.Trainer, callbacks=[callback], method="adalora", output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=checkpoint)
    assert losses(again) == losses(stock)


def test_st_3842_a_stock_trainer_over_a_peft_model_raises(build: Any, tmp_path: Path) -> None:
    trainer = build(transformers.Trainer, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="expected an igulora.Controller"):
        trainer.train()


def test_what_does_not_fit_is_said(llama: Any, rows: Any, arguments: Any) -> None:
    options = {**SCHEDULE, "total_steps": 20}
    args = arguments()
    with pytest.raises(TypeError, match="expected igu_config to be an IGUConfig.*got IGULoraConfig"):
        IGUTrainer(model=llama(), args=args, train_dataset=rows(), igu_config=igulora.IGULoraConfig(**options))
    with pytest.raises(ValueError, match="or give the trainer igu_config"):
        IGUTrainer(model=llama(), args=args, train_dataset=rows())
    by_peft = peft.get_peft_model(llama(), igulora.IGULoraConfig(**options))
    with pytest.raises(ValueError, match="whose igulora adapters PEFT keeps"):
        igulora.adapt(by_peft, igulora.IGUConfig(**options))
    with pytest.raises(ValueError, match="got one adapted already"):
        peft.get_peft_model(igulora.adapt(llama(), igulora.IGUConfig(**options)), igulora.IGULoraConfig(**options))


def test_an_adapter_that_peft_saved_is_named(llama: Any, tmp_path: Path) -> None:
    by_peft = peft.get_peft_model(llama(), igulora.IGULoraConfig(**SCHEDULE))
    by_peft.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="got an adapter that PEFT saved"):
        igulora.load_adapter(llama(), tmp_path)
    with pytest.raises(ValueError, match="got 'IGULORA'; load it with peft.PeftModel"):
        igulora.import_peft(llama(), tmp_path)


def test_a_controller_stays_with_its_adapter(llama: Any) -> None:
    model = peft.get_peft_model(llama(), igulora.IGULoraConfig(**SCHEDULE)).train()
    first = igulora.Controller(model)
    model.add_adapter("other", igulora.IGULoraConfig(**SCHEDULE))
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.arange(12).reshape(2, 6)}
    before = first.bank.weight.clone()
    first.backward(lambda b: model(**b).loss, batch)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="expected the adapter active that this controller was made for"):
        first.backward(lambda b: model(**b).loss, batch)
    with pytest.raises(ValueError, match="expected the adapter active"):
        first.step()
    assert torch.equal(first.bank.weight, before)
    igulora.Controller(model).backward(lambda b: model(**b).loss, batch)
    model.set_adapter("default")
    first.step()
