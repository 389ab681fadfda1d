"""Instruction tuning: the loss counts response tokens only; a closed set of responses is scored by likelihood."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Example
from .tasks import Batch, Row, batches_by_length, evaluating, pad_token, to_device

IGNORED = -100
MAX_CHOICES = 32


class CausalLM:
    """Prompts and responses for a causal language model.

    Rows are padded on the left, so that every response ends in the last column and the language-model head, the largest matrix of
    a small model, runs on the response's columns alone (``logits_to_keep``). ``choices`` are the responses that can occur, when
    they are a closed set: evaluation then also reports accuracy, the share of rows whose own response is the likeliest.

    ``model`` tells which arguments its forward takes. Prompts that are too long for ``max_length`` tokens lose their tail, never
    the chat template around them.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: nn.Module,
        max_length: int,
        system_prompt: str | None = None,
        choices: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.max_length, self.system_prompt = tokenizer, max_length, system_prompt
        self.choices = list(choices)
        self.metric = "accuracy" if self.choices else "loss"
        self.higher_is_better = bool(self.choices)
        arguments = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in arguments
        self._positions = "position_ids" in arguments
        self._caches = "past_key_values" in arguments
        self._choice_ids = [self._response_ids(choice) for choice in self.choices]

    def encode(self, examples: Sequence[Example]) -> list[Row]:
        """Tokenise prompts (through the tokenizer's chat template where it has one) and responses.

        Raises:
            ValueError: ``max_length`` leaves no room for a prompt beside the template and the response.
        """
        overhead = len(self._ids(self._prompt("")))
        prompts = self._batch_ids([self._prompt(example.text) for example in examples])
        responses = [self._response_ids(str(example.target)) for example in examples]
        rows = []
        for number, (example, prompt, response) in enumerate(zip(examples, prompts, responses, strict=True), start=1):
            room = self.max_length - len(response) - overhead
            if room < 1:
                raise ValueError(
                    f"expected max_length of at least {overhead + len(response) + 1} tokens (template {overhead}, response of row "
                    f"{number} {len(response)}, and a prompt), got {self.max_length}; raise --max-length or shorten the response"
                )
            if len(prompt) + len(response) > self.max_length:
                prompt = self._cut(example.text, room, self.max_length - len(response))
            row: Row = {"input_ids": prompt + response, "prompt": prompt, "response": response}
            if self.choices:
                row["choice"] = self.choices.index(str(example.target))
            rows.append(row)
        return rows

    def collate(self, rows: Sequence[Row]) -> Batch:
        """``input_ids`` (B, T) padded on the left, ``labels`` (B, K) for the last K columns, -100 where nothing is learned."""
        batch = self._pad([row["input_ids"] for row in rows])
        # One column more than the longest response: the model predicts a label from the column before it.
        length = batch["input_ids"].shape[1]
        kept = min(length, max(len(row["response"]) for row in rows) + 1) if self._keeps else length
        labels = torch.full((len(rows), kept), IGNORED)
        for i, row in enumerate(rows):
            labels[i, kept - len(row["response"]) :] = torch.tensor(row["response"])
        return batch | {"labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy over the response tokens."""
        labels = batch["labels"][:, 1:]
        return F.cross_entropy(self.logits(model, batch).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says in each column about the label in the next, (B, K - 1, V), float32."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if self._keeps:
            inputs["logits_to_keep"] = batch["labels"].shape[1]  # type: ignore[assignment]
        return model(**inputs, use_cache=False).logits[:, :-1].float()

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, device: torch.device
    ) -> dict[str, float]:
        """``loss`` per response token and, for a closed set, ``accuracy``."""
        total, tokens, correct = 0.0, 0, 0
        with evaluating(model):
            for part in batches_by_length(rows, batch_size):
                count = sum(len(row["response"]) for row in part)
                tokens += count
                if self.choices:
                    scores = self.score_choices(model, part, device)
                    own = torch.tensor([row["choice"] for row in part], device=device)
                    correct += int((scores.argmax(-1) == own).sum())
                    total -= float(scores.gather(1, own[:, None]).sum())
                else:
                    total += float(self.loss(model, to_device(self.collate(part), device))) * count
        metrics = {"loss": total / tokens}
        return {"accuracy": correct / len(rows), **metrics} if self.choices else metrics

    def score_choices(self, model: nn.Module, rows: Sequence[Row], device: torch.device) -> Tensor:
        """Log-likelihood (B, C) of every choice after every prompt; each prompt runs once, its choices reuse its cache."""
        if not (self._caches and self._positions and self._keeps):
            return self._score_whole(model, rows, device)
        batch = to_device(self._pad([row["prompt"] for row in rows], always_mask=True), device)
        output = model(**batch, use_cache=True, logits_to_keep=1)
        first = output.logits[:, -1].float().log_softmax(-1)  # (B, V)
        ids = [torch.tensor(choice, device=device) for choice in self._choice_ids]
        scores = torch.stack([first[:, choice[0]] for choice in ids], dim=1)  # (B, C)
        longest = max(len(choice) for choice in ids)
        if longest == 1:
            return scores
        rest, targets = self._continuations(ids, longest, device)
        count, size = len(ids), len(rows)
        cache = output.past_key_values
        cache.batch_repeat_interleave(count)
        mask = batch["attention_mask"].repeat_interleave(count, 0)
        lengths = mask.sum(1, keepdim=True)
        logits = model(
            input_ids=rest.repeat(size, 1),
            attention_mask=torch.cat([mask, mask.new_ones(size * count, longest - 1)], dim=1),
            position_ids=lengths + torch.arange(longest - 1, device=device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), targets.repeat(size, 1).flatten(), ignore_index=IGNORED, reduction="none"
        )
        return scores - losses.view(size, count, longest - 1).sum(-1)

    @staticmethod
    def _continuations(ids: Sequence[Tensor], longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets (C, longest - 1) after each choice's first token; right padding never reaches back."""
        inputs = torch.zeros(len(ids), longest - 1, dtype=torch.long, device=device)
        targets = torch.full_like(inputs, IGNORED)
        for i, choice in enumerate(ids):
            inputs[i, : len(choice) - 1] = choice[:-1]
            targets[i, : len(choice) - 1] = choice[1:]
        return inputs, targets

    def _score_whole(self, model: nn.Module, rows: Sequence[Row], device: torch.device) -> Tensor:
        """The same scores for models without a reusable cache: every prompt runs once per choice."""
        columns = []
        for choice in self._choice_ids:
            full = [{"input_ids": row["prompt"] + choice, "response": choice} for row in rows]
            batch = to_device(self.collate(full), device)
            logits, labels = self.logits(model, batch), batch["labels"][:, 1:]
            losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
            columns.append(-losses.sum(-1))
        return torch.stack(columns, dim=1)

    def _pad(self, sequences: Sequence[Sequence[int]], always_mask: bool = False) -> Batch:
        length = max(len(ids) for ids in sequences)
        pad = pad_token(self.tokenizer)
        batch = {"input_ids": torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in sequences])}
        # Without padding the mask is left out: attention is then purely causal, which has the fastest kernels.
        if always_mask or any(len(ids) < length for ids in sequences):
            mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in sequences])
            batch["attention_mask"] = mask
            if self._positions:
                batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return batch

    def _messages(self, prompt: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": prompt}]

    def _prompt(self, text: str) -> str:
        if self.tokenizer.chat_template is None:
            parts = [part for part in (self.system_prompt, text) if part]
            return "\n\n".join(parts) + "\n"
        return self.tokenizer.apply_chat_template(self._messages(text), tokenize=False, add_generation_prompt=True)

    def _response_ids(self, text: str) -> list[int]:
        """Ids of a response with the end-of-turn token that the model is to produce after it."""
        ended = text + (self.tokenizer.eos_token or "")
        if self.tokenizer.chat_template is not None:
            turns = [*self._messages("x"), {"role": "assistant", "content": text}]
            full, prompt = self.tokenizer.apply_chat_template(turns, tokenize=False), self._prompt("x")
            # Templates that rewrite earlier turns do not continue their own prompt; those get the plain ending.
            if full.startswith(prompt) and text in full[len(prompt) :]:
                ended = full[len(prompt) :].rstrip()
        return self.tokenizer(ended, add_special_tokens=False)["input_ids"]

    def _batch_ids(self, texts: list[str]) -> list[list[int]]:
        # A chat template writes its special tokens itself.
        return self.tokenizer(texts, add_special_tokens=self.tokenizer.chat_template is None)["input_ids"]

    def _ids(self, text: str) -> list[int]:
        return self._batch_ids([text])[0]

    def _cut(self, text: str, room: int, limit: int) -> list[int]:
        """Ids of the prompt of ``text`` shortened to about ``room`` tokens, so that the prompt has at most ``limit``."""
        while room > 0:
            ids = self._ids(self._prompt(self._head(text, room)))
            if len(ids) <= limit:
                return ids
            room -= max(1, len(ids) - limit)
        return self._ids(self._prompt(""))[-limit:]

    def _head(self, text: str, tokens: int) -> str:
        """The first ``tokens`` tokens of ``text``, as text."""
        if not self.tokenizer.is_fast:
            return self.tokenizer.decode(self.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[: offsets[tokens - 1][1]] if len(offsets) > tokens else text


def closed_set(train: Sequence[Example], evaluation: Sequence[Example]) -> list[str]:
    """The responses as a closed set, in alphabetical order, when they look like labels; an empty list when they do not.

    Labels are few (2 to 32), short, each used several times, and the evaluation rows use no other.
    """
    found = sorted({str(example.target) for example in train})
    few = 2 <= len(found) <= MAX_CHOICES and len(train) >= 4 * len(found)
    short = all(len(response) <= 64 for response in found)
    return found if few and short and {str(example.target) for example in evaluation} <= set(found) else []
