"""IGUTrainer against the plain loop on the same batches, and against the stock Trainer where nothing is added to it."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from torch import nn

import igulora
from igulora.trainer import IGUCallback, IGUTrainer

transformers = pytest.importorskip("transformers")

ESTIMATORS = [
    {"estimator": "gauss", "path_pass": "mixed"},
    {"estimator": "gauss", "path_pass": "separate"},
    {"estimator": "trapezoid", "path_pass": "mixed", "include_f0": True},
    {"estimator": "trapezoid", "path_pass": "separate", "include_f0": True},
    {"estimator": "on-path"},
    {"estimator": "on-path-stratified"},
    {"estimator": "instantaneous"},
    {"method": "adalora"},
]


def replay(trainer: Any, model: nn.Module, whole: bool) -> tuple[igulora.Controller, list[float]]:
    """The plain loop over the micro-batches that ``trainer`` saw; ``whole`` divides by the items of the accumulation, as it did."""
    args = trainer.args
    optimizer = torch.optim.AdamW(
        igulora.param_groups(model, args.learning_rate, weight_decay=args.weight_decay), fused=True
    )
    model.train()
    controller = igulora.Controller(model, accumulation_steps=args.gradient_accumulation_steps)
    losses = []
    for _, group in groupby(trainer.seen, key=lambda entry: entry[0]):
        micro = list(group)
        for _, batch, items in micro:
            if whole:
                loss = controller.backward(
                    lambda b, n=items: model(**b, num_items_in_batch=n).loss,
                    batch,
                    scale=1.0,
                    items=items,
                    step_scale=1.0,
                )
            else:
                loss = controller.backward(lambda b: model(**b).loss, batch, scale=1 / len(micro), step_scale=1.0)
            losses.append(float(loss))
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    return controller, losses


class FirstStep(transformers.TrainerCallback):
    """Keeps a flat buffer of the bank as it is before the first optimizer step, clipping done, and ends training there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.found = torch.empty(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.found = getattr(igulora.find_bank(model), self.name).clone()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


class Plain:
    """What ``state_of`` reads, of a plain loop."""

    def __init__(self, controller: igulora.Controller) -> None:
        self.igu_controller = controller


@pytest.mark.parametrize(
    "options", [*ESTIMATORS[:3], *ESTIMATORS[4:6], ESTIMATORS[7]], ids=lambda o: "-".join(map(str, o.values()))
)
def test_a_run_is_the_plain_loops_bit_by_bit(
    llama, rows, arguments, config, recording, state_of, assert_same, options
) -> None:
    """37 sequences: the last batch of an epoch is short; of ten micro-batches the last makes a step alone."""
    options = config(orthogonality=0.1, window=3, t_init=9, **options)
    trainer = recording(
        model=igulora.adapt(llama(), options),
        args=arguments(gradient_accumulation_steps=3, weight_decay=0.01),
        train_dataset=rows(),
    )
    trainer.train()
    controller, losses = replay(trainer, igulora.adapt(llama(), options), whole=True)
    assert trainer.losses == losses
    assert_same(state_of(trainer), state_of(Plain(controller)))
    history = controller.history
    assert history[-1]["step"] == 15
    assert sum(history[-1]["ranks"].values()) == history[-1]["budget"] == 14


@pytest.mark.parametrize("options", [ESTIMATORS[0], ESTIMATORS[3]], ids=lambda o: "-".join(map(str, o.values())))
def test_a_loss_over_the_items_of_its_own_batch_is_a_mean(
    llama, rows, arguments, config, recording, state_of, assert_same, options
) -> None:
    """Without accumulation the plain loop over mean losses, which knows nothing of items, is the same run up to rounding."""
    options = config(window=3, t_init=9, **options)
    trainer = recording(model=igulora.adapt(llama(), options), args=arguments(), train_dataset=rows())
    trainer.train()
    controller, _ = replay(trainer, igulora.adapt(llama(), options), whole=False)
    assert_same(state_of(trainer), state_of(Plain(controller)), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("options", ESTIMATORS[:6], ids=lambda o: "-".join(map(str, o.values())))
def test_path_samples_are_means_over_their_own_terms(llama, rows, arguments, config, recording, options) -> None:
    """The loss is divided by the tokens of the whole accumulation; the samples of its micro-batches are a plain loop's all the same."""
    options = config(window=6, t_init=14, t_final=2, **options)
    model = igulora.adapt(llama(), options)
    with torch.no_grad():
        for layer in model.igulora_bank.layers:
            layer.lora_E.fill_(0.3)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    look = FirstStep("path")
    trainer = recording(
        model=model, args=arguments(gradient_accumulation_steps=3), train_dataset=rows(), callbacks=[look]
    )
    trainer.train()
    twin = igulora.adapt(llama(), options)
    twin.load_state_dict(start)
    twin.train()
    controller = igulora.Controller(twin, accumulation_steps=3)
    for _, batch, _ in trainer.seen[:3]:
        controller.backward(lambda b: twin(**b).loss, batch)
    assert float(controller.bank.path.abs().max()) > 0
    torch.testing.assert_close(look.found, controller.bank.path, rtol=1e-4, atol=1e-7)


def losses_and_weights(trainer: Any) -> tuple[list[float], torch.Tensor]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, igulora.find_bank(trainer.model).weight.detach().clone()


@pytest.mark.parametrize("extra", [{}, {"label_smoothing_factor": 0.1}, {"max_grad_norm": 0.05}], ids=str)
@pytest.mark.parametrize("options", [{"method": "lora"}, {"path_pass": "separate"}], ids=str)
def test_without_path_rows_in_the_batch_training_is_the_stock_trainers(
    llama, rows, arguments, config, options, extra
) -> None:
    """Bit by bit, up to the first allocation."""
    ends = []
    args = {"max_steps": 8, "gradient_accumulation_steps": 2, "logging_steps": 1, **extra}
    for ours in (True, False):
        plain = {"method": "lora"} if options.get("method") == "lora" else {"estimator": "instantaneous"}
        settings = config(total_steps=8, t_init=7, t_final=0, **(options if ours else plain))
        model = igulora.adapt(llama(), settings)
        if ours:
            trainer = IGUTrainer(model=model, args=arguments(**args), train_dataset=rows(), lambda_lr_ratio=1.0)
        else:
            trainer = transformers.Trainer(
                model=model, args=arguments(**args), train_dataset=rows(), callbacks=[IGUCallback()]
            )
        ends.append(losses_and_weights(trainer))
    assert ends[0][0] == ends[1][0]
    if options.get("method") == "lora":  # step 8 allocates
        assert torch.equal(ends[0][1], ends[1][1])


def of_outputs(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return total / num_items_in_batch


class OwnMean(IGUTrainer):
    """compute_loss of the user's own: a mean over the micro-batch, whatever the Trainer counts."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")  # takes its inputs apart, as subclasses do
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
        return (loss, None) if return_outputs else loss


@pytest.mark.parametrize("path_pass", ["mixed", "separate"])
@pytest.mark.parametrize("kind", ["smoother", "function", "own"])
def test_losses_of_other_makes(llama, rows, arguments, config, kind, path_pass) -> None:
    """Label smoothing, compute_loss_func, a compute_loss that ignores the items: path rows leave each one's gradient as it is."""
    grads = []
    for estimator in ("gauss", "instantaneous"):
        model = igulora.adapt(llama(), config(estimator=estimator, path_pass=path_pass, total_steps=15, t_init=7))
        with torch.no_grad():
            for layer in model.igulora_bank.layers:
                layer.lora_E.fill_(0.3)
        args = arguments(
            gradient_accumulation_steps=2, max_steps=15, max_grad_norm=0.0,
            label_smoothing_factor=0.1 if kind == "smoother" else 0.0,
        )  # fmt: skip
        trainer = (OwnMean if kind == "own" else IGUTrainer)(
            model=model, args=args, train_dataset=rows(), compute_loss_func=of_outputs if kind == "function" else None
        )
        look = FirstStep("grad")
        trainer.add_callback(look)
        trainer.train()
        grads.append(look.found)
        if estimator == "gauss":
            assert trainer._divides_by_items is (kind != "own")
            assert float(trainer.igu_controller.importance.mean.abs().max()) > 0
    assert float(grads[0].abs().max()) > 0
    if path_pass == "separate":
        assert torch.equal(*grads)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_regression_ignores_the_number_of_items(rows, arguments, config) -> None:
    """A model that takes the number and makes nothing of it: squared errors are a mean. Found out, not assumed."""
    options = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    shape = transformers.LlamaConfig(
        **options, num_attention_heads=2, pad_token_id=0, num_labels=1, problem_type="regression"
    )
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(shape)
    igulora.adapt(model, config(modules_to_save=["score"]))
    data = [{"input_ids": row["input_ids"], "labels": torch.tensor(float(i % 3))} for i, row in enumerate(rows())]
    trainer = IGUTrainer(model=model, args=arguments(gradient_accumulation_steps=2), train_dataset=data)
    trainer.train()
    assert trainer._divides_by_items is False
    assert sum(trainer.igu_controller.live_ranks().values()) == trainer.igu_controller.budget


def test_the_logged_loss_is_not_raised_by_path_rows(llama, rows, arguments, config) -> None:
    """In these mixed batches every row is there twice; the log still shows a loss per term."""
    logged = []
    for estimator in ("gauss", "instantaneous"):
        model = igulora.adapt(llama(), config(estimator=estimator, ig_fraction=1.0))
        trainer = IGUTrainer(
            model=model, args=arguments(logging_steps=1, gradient_accumulation_steps=2), train_dataset=rows()
        )
        logged.append(losses_and_weights(trainer)[0])
    assert logged[0][0] == pytest.approx(logged[1][0], rel=1e-5)  # lambda starts at 0: every alpha gives one loss
    assert logged[0] == pytest.approx(logged[1], rel=0.05)
