"""A small language model, sequences for it, and trainers that note what they did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import igulora

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from igulora.trainer import IGUTrainer  # noqa: E402  (needs transformers)

VOCABULARY = 40


class Recording(IGUTrainer):
    """Keeps every micro-batch with its optimizer step, its number of items and the loss that came back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, dict[str, Tensor], Any]] = []
        self.losses: list[float] = []

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.seen.append((self.state.global_step, {k: v.clone() for k, v in inputs.items()}, num_items_in_batch))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(float(loss))
        return loss


@pytest.fixture
def recording() -> type[Recording]:
    """Class of an IGUTrainer with ``seen`` and ``losses``."""
    return Recording


@pytest.fixture
def llama() -> Callable[..., nn.Module]:
    """``llama(**changes)``: a causal language model, the same weights every time."""

    def make(**changes: Any) -> nn.Module:
        options = {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            **changes,
        }
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))

    return make


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Tensor]]]:
    """``rows(count)``: sequences of nine tokens, with none to four of their first labels ignored."""

    def make(count: int = 37, seed: int = 1) -> list[dict[str, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        out = []
        for i in range(count):
            ids = torch.randint(1, VOCABULARY, (9,), generator=g)
            labels = ids.clone()
            labels[: i % 5] = -100
            out.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
        return out

    return make


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    """``arguments(**changes)``: twenty steps of four sequences on the CPU, constant learning rate, nothing saved."""

    def make(**changes: Any) -> Any:
        options = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "max_steps": 20,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **changes,
        }
        return transformers.TrainingArguments(**options)

    return make


@pytest.fixture
def state_of() -> Callable[[IGUTrainer], dict[str, Any]]:
    """What a run leaves behind: adapter, masks, scores, history."""

    def read(trainer: Any) -> dict[str, Any]:
        controller: igulora.Controller = trainer.igu_controller
        bank = controller.bank
        return {
            "weights": {k: v.detach().clone() for k, v in bank.matrix_views(bank.weight).items()},
            "mask": bank.mask.clone(),
            "live": bank.live.clone(),
            "mean": controller.importance.mean.clone(),
            "deviation": controller.importance.deviation.clone(),
            "terms": controller.importance.terms.clone(),
            "history": controller.history,
            "in_window": controller.passes.in_window,
        }

    return read


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Two states of ``state_of`` are equal, bit by bit unless tolerances are given."""

    def check(one: Any, other: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
        assert one["history"] == other["history"]
        assert one["in_window"] == other["in_window"]
        for name in ("mask", "live"):
            assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one["weights"], other["weights"], rtol=rtol, atol=atol)
        for name in ("mean", "deviation", "terms"):
            torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol, msg=name)

    return check
