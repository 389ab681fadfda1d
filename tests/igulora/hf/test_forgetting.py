"""Ranks that would never be allocated, a penalty never applied, a schedule that never ends: each is said before or while it happens."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import igulora
from igulora.trainer import IGUCallback, IGUTrainer

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("accumulation", [1, 2, 16])
def test_st_3842_a_stock_trainer_does_not_silently_train_lora(llama, rows, arguments, config, accumulation) -> None:
    """sentence-transformers#3842, peft#1327: nobody steps the ranks."""
    model = igulora.adapt(llama(), config())
    before = igulora.find_bank(model).ranks()
    trainer = transformers.Trainer(
        model=model, args=arguments(gradient_accumulation_steps=accumulation), train_dataset=rows()
    )
    with pytest.raises(ValueError, match=r"got 8 training passes without one.*IGUTrainer.*IGUCallback"):
        trainer.train()
    assert trainer.state.global_step <= 8
    assert igulora.find_bank(model).ranks() == before


def test_peft_1327_the_trainer_changes_ranks(llama, rows, arguments, config) -> None:
    """Also peft#1801: a rank pattern that differs between modules, and the budget met exactly."""
    model = igulora.adapt(llama(), config(normalize="none"))
    IGUTrainer(model=model, args=arguments(), train_dataset=rows()).train()
    ranks = igulora.find_bank(model).ranks()
    assert sum(ranks.values()) == 2 * len(ranks)
    assert len(set(ranks.values())) > 1


@pytest.mark.parametrize("kind", ["callback", "trainer"])
def test_peft_432_the_orthogonality_penalty_is_applied(llama, rows, arguments, config, kind) -> None:
    """Directions that start far from orthonormal come nearer, in the stock Trainer with the callback too."""
    ends = []
    for gamma in (0.0, 0.5):
        model = igulora.adapt(llama(), config(method="adalora", init="gaussian", orthogonality=gamma))
        args = arguments(learning_rate=2e-2)
        if kind == "trainer":
            trainer = IGUTrainer(model=model, args=args, train_dataset=rows())
        else:
            trainer = transformers.Trainer(model=model, args=args, train_dataset=rows(), callbacks=[IGUCallback()])
        trainer.train()
        P = igulora.find_bank(model).layers[0].lora_P.detach()
        ends.append(float((P @ P.T - torch.eye(4)).norm()))
    assert ends[1] < 0.8 * ends[0]


def test_the_callback_refuses_an_estimator_with_path_passes(llama, rows, arguments, config) -> None:
    trainer = transformers.Trainer(
        model=igulora.adapt(llama(), config()), args=arguments(), train_dataset=rows(), callbacks=[IGUCallback()]
    )
    with pytest.raises(ValueError, match=r"expected IGUTrainer .* for estimator='gauss'"):
        trainer.train()


@pytest.mark.parametrize("method", ["random", "magnitude", "lora", "adalora"])
def test_a_callback_suffices_without_path_passes(llama, rows, arguments, config, method) -> None:
    model = igulora.adapt(llama(), config(method=method, orthogonality=0.1 if method != "lora" else 0.0))
    trainer = transformers.Trainer(
        model=model, args=arguments(logging_steps=5), train_dataset=rows(), callbacks=[IGUCallback()]
    )
    trainer.train()
    assert sum(igulora.find_bank(model).ranks().values()) == 14
    assert all("igu/live" in entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("kind", [IGUTrainer, transformers.Trainer])
def test_a_schedule_longer_than_the_training_is_an_error(llama, rows, arguments, config, kind) -> None:
    model = igulora.adapt(llama(), config(method="adalora"))
    callbacks = [] if kind is IGUTrainer else [IGUCallback()]
    trainer = kind(model=model, args=arguments(max_steps=14), train_dataset=rows(), callbacks=callbacks)
    with pytest.raises(ValueError, match=r"expected at least 15 optimizer steps.*got 14.*IGUConfig\(total_steps=14\)"):
        trainer.train()


@pytest.mark.parametrize("steps", [15, 30])
def test_another_length_that_still_ends_is_a_warning(llama, rows, arguments, config, caplog, steps) -> None:
    model = igulora.adapt(llama(), config())
    IGUTrainer(model=model, args=arguments(max_steps=steps), train_dataset=rows()).train()
    assert f"training takes {steps} steps: they are final from step 15 on" in caplog.text
    assert sum(igulora.find_bank(model).ranks().values()) == 14


def test_epochs_count_as_the_trainer_counts_them(llama, rows, arguments, caplog) -> None:
    """total_steps left out of igu_config: ten micro-batches an epoch, four steps, three epochs."""
    options = {"r": 4, "t_init": 7, "window": 2, "ig_every": 1}
    args = arguments(max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=3)
    trainer = IGUTrainer(model=llama(), args=args, train_dataset=rows(), igu_config=options)
    assert trainer.model.igulora_config.total_steps == 12
    trainer.train()
    assert trainer.state.global_step == 12
    assert not caplog.records
    assert sum(trainer.igu_controller.live_ranks().values()) == trainer.igu_controller.budget == 14


def test_training_that_ends_early_says_so(llama, rows, arguments, config, caplog) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 9

    model = igulora.adapt(llama(), config())
    IGUTrainer(model=model, args=arguments(), train_dataset=rows(), callbacks=[Stop()]).train()
    assert "ended at step 9, before the ranks became final (step 15): " in caplog.text


def test_models_that_are_not_adapted_or_twice(llama, rows, arguments, config) -> None:
    with pytest.raises(ValueError, match="expected a model adapted by igulora.adapt"):
        IGUTrainer(model=llama(), args=arguments(), train_dataset=rows())
    with pytest.raises(ValueError, match="got one adapted already"):
        IGUTrainer(model=igulora.adapt(llama(), config()), args=arguments(), igu_config=config())
    trainer = transformers.Trainer(model=llama(), args=arguments(), train_dataset=rows(), callbacks=[IGUCallback()])
    with pytest.raises(ValueError, match="expected a model adapted by igulora.adapt"):
        trainer.train()
    with pytest.raises(ValueError, match="expected igu_config with a model alone"):
        IGUTrainer(model_init=lambda: llama(), args=arguments(), train_dataset=rows(), igu_config=config())


def test_a_model_init_adapts_every_model(llama, rows, arguments, config) -> None:
    trainer = IGUTrainer(model_init=lambda: igulora.adapt(llama(), config()), args=arguments(), train_dataset=rows())
    for _ in range(2):
        trainer.train()
        assert trainer.igu_controller.bank is trainer.model.igulora_bank
        assert sum(trainer.igu_controller.live_ranks().values()) == 14


def test_a_loss_scaled_in_another_way_is_found(llama, rows, arguments, config) -> None:
    class Doubles(IGUTrainer):
        """Its training_step changes the loss after compute_loss, which path samples would follow."""

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            backward = self.accelerator.backward
            self.accelerator.backward = lambda loss, **options: backward(2 * loss, **options)
            try:
                return super().training_step(*args, **kwargs)
            finally:
                self.accelerator.backward = backward

    model = igulora.adapt(llama(), config())
    with pytest.raises(ValueError, match="expected the loss to go backward times 1 .* got 2"):
        Doubles(model=model, args=arguments(), train_dataset=rows()).train()


def test_a_loss_that_half_heeds_the_items_is_refused(llama, rows, arguments, config) -> None:
    class Root(IGUTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = model(**inputs).loss
            return loss / kwargs["num_items_in_batch"] ** 0.5

    model = igulora.adapt(llama(), config())
    with pytest.raises(ValueError, match="expected a loss that is a mean .* when num_items_in_batch doubles"):
        Root(model=model, args=arguments(), train_dataset=rows()).train()


def test_importing_igulora_does_not_import_transformers() -> None:
    code = "import igulora, sys; assert not {'transformers', 'accelerate', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert igulora.IGUTrainer is IGUTrainer
    with pytest.raises(AttributeError, match="IGUTrianer"):
        igulora.IGUTrianer  # noqa: B018
