"""IGUTrainer among the Trainer's other machinery: loss scalers, 16 bits, compilation, checkpointed activations, optimizers, the log."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import igulora
from igulora.optim import DEFAULT_LAMBDA_LR_RATIO
from igulora.trainer import IGUCallback, IGUTrainer

transformers = pytest.importorskip("transformers")


def with_scaler(trainer: Any, factor: float) -> None:
    """A gradient scaler as fp16 has one on CUDA; here without autocast."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=factor, growth_interval=5)


class Overflows(IGUTrainer):
    """The loss of one micro-batch is infinite: the scaler skips that step."""

    at: tuple[int, ...] = ()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * torch.inf if self.model.training and self.state.global_step in self.at else loss


OPTIONS = [{"path_pass": "mixed"}, {"estimator": "trapezoid", "path_pass": "separate"}, {"method": "adalora"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_loss_scale_changes_nothing(llama, rows, arguments, config, state_of, assert_same, options) -> None:
    """A power of two that doubles on the way: the same bits of weights, scores and masks."""
    states = []
    for factor in (None, 2.0**7):
        model = igulora.adapt(llama(), config(orthogonality=0.1, **options))
        # Clipping would unscale first, which accelerate does where it made the scaler itself.
        args = arguments(max_grad_norm=0.0)
        trainer = IGUTrainer(model=model, args=args, train_dataset=rows())
        if factor:
            with_scaler(trainer, factor)
        trainer.train()
        states.append(state_of(trainer))
    assert_same(*states, rtol=1e-5, atol=1e-7)


def test_the_callbacks_penalty_takes_the_loss_scale(llama, rows, arguments, config) -> None:
    ends = []
    for factor in (None, 2.0**7):
        model = igulora.adapt(llama(), config(method="adalora", init="gaussian", orthogonality=0.5))
        args = arguments(max_grad_norm=0.0)
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows(), callbacks=[IGUCallback()])
        if factor:
            with_scaler(trainer, factor)
        trainer.train()
        ends.append(igulora.find_bank(model).weight.clone())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_skipped_step_leaves_scores_untouched(llama, rows, arguments, config, options) -> None:
    """And the weights; the schedule goes on, in step with the Trainer's."""
    model = igulora.adapt(llama(), config(orthogonality=0.1, window=2, **options))
    trainer = Overflows(model=model, args=arguments(gradient_accumulation_steps=2), train_dataset=rows())
    trainer.args.max_grad_norm = 0.0
    trainer.at = (5,)
    with_scaler(trainer, 2.0**7)
    kept: dict[int, tuple[torch.Tensor, ...]] = {}

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bank, scores = trainer.igu_controller.bank, trainer.igu_controller.importance
            kept[state.global_step] = (bank.weight.clone(), scores.mean.clone(), scores.deviation.clone())

    trainer.add_callback(Look())
    trainer.train()
    for before, after in zip(kept[5], kept[6], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(kept[4][1], kept[5][1])
    assert not torch.equal(kept[6][1], kept[7][1])
    assert trainer.igu_controller.global_step == 20
    assert all(bool(torch.isfinite(t).all()) for t in kept[20])
    assert sum(trainer.igu_controller.live_ranks().values()) == 14


def losses(trainer: Any) -> list[float]:
    trainer.train()
    assert sum(igulora.find_bank(trainer.model).ranks().values()) == 14
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("changes", "path_pass"),
    [
        ({"bf16": True}, "mixed"),
        ({"bf16": True}, "separate"),
        ({"gradient_checkpointing": True}, "mixed"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "separate"),
        ({"optim": "sgd", "learning_rate": 0.1}, "mixed"),
    ],
    ids=["bf16-mixed", "bf16-separate", "checkpointing", "reentrant", "sgd"],
)
# The older name works with every version; from 5.20 or so it is deprecated.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning:transformers")
def test_arguments_of_the_trainer(llama, rows, arguments, config, changes, path_pass) -> None:
    """The same losses as with plain arguments (and the same optimizer)."""
    runs = []
    base = {"logging_steps": 1}
    for extra in (changes, {k: v for k, v in changes.items() if k in ("optim", "learning_rate")}):
        model = igulora.adapt(llama(), config(path_pass=path_pass))
        runs.append(losses(IGUTrainer(model=model, args=arguments(**{**base, **extra}), train_dataset=rows())))
    assert runs[0] == pytest.approx(runs[1], rel=1e-2 if "bf16" in changes else 1e-4)


class Regressor(nn.Module):
    """Not a PreTrainedModel: any module that returns a loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.net(x) - labels).square().mean()}


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own look
@pytest.mark.parametrize("path_pass", ["mixed", "separate"])
def test_a_compiled_model_that_is_no_pretrained_one(net, arguments, config, path_pass, tmp_path) -> None:
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(3)
    data = [{"x": torch.randn(8, generator=g), "labels": torch.randn(3, generator=g)} for _ in range(40)]
    runs = []
    for extra in ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}):
        model = igulora.adapt(Regressor(net()), config(path_pass=path_pass))
        args = arguments(logging_steps=1, save_strategy="steps", save_steps=20, **extra)
        trainer = IGUTrainer(model=model, args=args, train_dataset=data)
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert sum(igulora.read_adapter(tmp_path / "out" / "checkpoint-20").meta["ranks"].values()) == 8
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_lambda_has_groups_of_its_own(llama, rows, arguments, config) -> None:
    """By the arguments' optimizer, learning rate and decay; the scheduler moves all of them."""
    model = igulora.adapt(llama(), config(modules_to_save=["lm_head"]))
    args = arguments(weight_decay=0.1, lr_scheduler_type="linear", learning_rate=1e-3, optim="adamw_torch_fused")
    trainer = IGUTrainer(model=model, args=args, train_dataset=rows())
    optimizer = trainer.create_optimizer()
    assert optimizer.defaults["fused"]
    lambdas = {id(layer.lora_E) for layer in igulora.find_bank(model).layers}
    found = {"lambda": 0, "other": 0}
    for group in optimizer.param_groups:
        of_lambda = {id(p) in lambdas for p in group["params"]}
        assert len(of_lambda) <= 1
        kind = "lambda" if of_lambda == {True} else "other"
        found[kind] += len(group["params"])
        if kind == "lambda":
            assert (group["lr"], group["weight_decay"]) == (pytest.approx(1e-3 * DEFAULT_LAMBDA_LR_RATIO), 0.0)
        else:
            assert group["lr"] == 1e-3
    assert found == {"lambda": 7, "other": 15}
    assert {g["weight_decay"] for g in optimizer.param_groups if g["params"]} == {0.1, 0.0}
    trainer.train()
    assert all(g["lr"] == pytest.approx(0.0) for g in optimizer.param_groups)


def test_an_optimizer_of_the_users_is_left_alone(llama, rows, arguments, config) -> None:
    model = igulora.adapt(llama(), config())
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = IGUTrainer(model=model, args=arguments(), train_dataset=rows(), optimizers=(own, None))
    trainer.train()
    assert len(own.param_groups) == 1
    assert sum(trainer.igu_controller.live_ranks().values()) == 14


def test_the_ratio_of_lambda_can_be_chosen(llama, rows, arguments, config) -> None:
    model = igulora.adapt(llama(), config())
    trainer = IGUTrainer(model=model, args=arguments(learning_rate=1e-3), train_dataset=rows(), lambda_lr_ratio=5.0)
    assert {g["lr"] for g in trainer.create_optimizer().param_groups} == {1e-3, 5e-3}
    with pytest.raises(ValueError, match="expected lambda_lr_ratio >= 0"):
        IGUTrainer(model=model, args=arguments(), train_dataset=rows(), lambda_lr_ratio=-1.0).create_optimizer()


def test_the_log_shows_the_ranks(llama, rows, arguments, config) -> None:
    """Every entry with a loss, and no other, carries what the controller says at that step."""
    model = igulora.adapt(llama(), config(orthogonality=0.1))
    args = arguments(logging_steps=2, eval_strategy="steps", eval_steps=10)
    trainer = IGUTrainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(8, seed=3))
    trainer.train()
    entries = {e["step"]: e for e in trainer.state.log_history if "loss" in e}
    assert list(entries) == list(range(2, 21, 2))
    assert [entries[step]["igu/phase"] for step in (6, 8, 14, 16)] == [0, 1, 1, 2]
    for event in trainer.igu_controller.history:
        if event["step"] in entries:
            entry, ranks = entries[event["step"]], list(event["ranks"].values())
            assert entry["igu/live"] == entry["igu/budget"] == sum(ranks)
            assert (entry["igu/rank_min"], entry["igu/rank_max"]) == (min(ranks), max(ranks))
            assert entry["igu/rank_mean"] == pytest.approx(sum(ranks) / len(ranks))
    last = entries[20]
    assert last["igu/score_min"] <= last["igu/score_mean"] <= last["igu/score_max"]
    assert last["igu/penalty"] == pytest.approx(float(trainer.igu_controller.penalty), rel=1e-6)
    others = [e for e in trainer.state.log_history if "loss" not in e]
    assert others
    assert not any(key.startswith("igu/") for e in others for key in e)


def test_steps_that_do_not_log_read_nothing(llama, rows, arguments, config, monkeypatch) -> None:
    """A host waits for the device where a tensor becomes a number: nothing of ours does that past the checks of the first sample."""
    calls: list[int] = []
    ours = [Path(module.__file__).parent for module in (igulora, igulora.kernels)]
    model = igulora.adapt(llama(), config(orthogonality=0.1))
    args = arguments(logging_strategy="no", logging_nan_inf_filter=False, gradient_accumulation_steps=2)
    trainer = IGUTrainer(model=model, args=args, train_dataset=rows())
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(self: torch.Tensor, *rest: Any, original: Any = original) -> Any:
            caller = Path(traceback.extract_stack(limit=2)[0].filename)
            # What quadrature draws, it draws on the host.
            if any(caller.is_relative_to(folder) for folder in ours) and caller.name != "quadrature.py":
                calls.append(trainer.state.global_step)
            return original(self, *rest)

        monkeypatch.setattr(torch.Tensor, name, spy)
    trainer.train()
    assert set(calls) == {0}  # the spy works: the checks at the first sample


def test_what_the_adapters_cannot_do_is_refused(llama, rows, arguments, config, monkeypatch) -> None:
    args = arguments()
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 2))
    model: nn.Module = igulora.adapt(llama(), config())
    with pytest.raises(ValueError, match="expected one process per device .* got nn.DataParallel"):
        IGUTrainer(model=model, args=args, train_dataset=rows())


def test_a_callback_of_the_users_is_taken_over(llama, rows, arguments, config) -> None:
    """With options of its own: a trace of one module."""
    model = igulora.adapt(llama(), config())
    name = igulora.find_bank(model).names[0]
    trainer = IGUTrainer(model=model, args=arguments(), train_dataset=rows(), callbacks=[IGUCallback(trace=[name])])
    trainer.train()
    assert sum(isinstance(c, IGUCallback) for c in trainer.callback_handler.callbacks) == 1
    assert len(trainer.igu_controller.series[name]) > 3
