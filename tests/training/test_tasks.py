"""Rows into batches, losses and metrics, against plain computations."""

import types

import pytest
import torch
from torch.nn import functional as F

from igulora.training.causal_lm import CausalLM, closed_set
from igulora.training.data import Example
from igulora.training.tasks import Classification, Regression, average_ranks, pearson

CPU = torch.device("cpu")
COLOURS = {"apple": "red", "grass": "green", "sky": "very blue"}
ROWS = [
    Example("what colour is the " + "very " * i + thing, colour) for i, (thing, colour) in enumerate(COLOURS.items())
]


def whole_loss(model, rows):
    """Mean loss over response tokens, one row at a time, without padding."""
    total = count = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total, count = total + losses[-len(row["response"]) :].sum(), count + len(row["response"])
    return total / count


def test_loss_counts_response_tokens_only(tiny_llama, tiny_tokenizer):
    task = CausalLM(tiny_tokenizer, tiny_llama, 64)
    rows = task.encode(ROWS)
    assert tiny_tokenizer.decode(rows[2]["response"]) == "very blue </s>"
    assert tiny_tokenizer.decode(rows[0]["prompt"]) == "<s> user what colour is the apple </s> <s> assistant"
    batch = task.collate(rows)
    assert batch["labels"].shape == (3, 4)  # the longest response, and the column that predicts its first token
    assert (batch["labels"][:, 0] == -100).all()
    assert (batch["labels"] != -100).sum() == sum(len(row["response"]) for row in rows)
    torch.testing.assert_close(task.loss(tiny_llama, batch), whole_loss(tiny_llama, rows), rtol=1e-5, atol=1e-6)


def test_models_without_logits_to_keep_learn_the_same(tiny_llama, tiny_tokenizer):
    plain = types.SimpleNamespace(
        forward=lambda input_ids, attention_mask=None, position_ids=None, use_cache=False: None
    )
    task, reference = CausalLM(tiny_tokenizer, plain, 64), CausalLM(tiny_tokenizer, tiny_llama, 64)
    rows = task.encode(ROWS)
    batch = task.collate(rows)
    assert batch["labels"].shape == batch["input_ids"].shape
    torch.testing.assert_close(task.loss(tiny_llama, batch), reference.loss(tiny_llama, reference.collate(rows)))


def test_tokenizers_without_template(tiny_llama, tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    row = CausalLM(tiny_tokenizer, tiny_llama, 64, system_prompt="system .").encode(ROWS)[0]
    assert tiny_tokenizer.decode(row["prompt"]) == "system . what colour is the apple"
    assert tiny_tokenizer.decode(row["response"]) == "red </s>"


def test_long_prompts_lose_their_tail_not_the_template(tiny_llama, tiny_tokenizer):
    task = CausalLM(tiny_tokenizer, tiny_llama, max_length=12)
    row = task.encode([Example("what colour " + "very " * 40 + "apple", "red")])[0]
    assert len(row["input_ids"]) == 12
    assert tiny_tokenizer.decode(row["prompt"]) == "<s> user what colour very very very </s> <s> assistant"
    with pytest.raises(ValueError, match=r"max_length of at least 8 tokens .* got 7"):
        CausalLM(tiny_tokenizer, tiny_llama, max_length=7).encode(ROWS)


@pytest.mark.parametrize("cached", [True, False])
def test_choices_share_their_prompt(tiny_llama, tiny_tokenizer, cached):
    task = CausalLM(tiny_tokenizer, tiny_llama, 64, choices=sorted(COLOURS.values()))
    task._caches = cached
    rows = task.encode(ROWS)
    tiny_llama.eval()
    with torch.no_grad():
        scores = task.score_choices(tiny_llama, rows, CPU)
        for i, row in enumerate(rows):
            for j, choice in enumerate(task._choice_ids):
                single = {"input_ids": row["prompt"] + choice, "response": choice}
                expected = -whole_loss(tiny_llama, [single]) * len(choice)
                torch.testing.assert_close(scores[i, j], expected, rtol=1e-4, atol=1e-4)
    metrics = task.evaluate(tiny_llama, rows, 2, CPU)
    assert metrics["accuracy"] == pytest.approx(
        (scores.argmax(1) == torch.tensor([r["choice"] for r in rows])).float().mean()
    )
    assert metrics["loss"] == pytest.approx(whole_loss(tiny_llama, rows).item(), rel=1e-4)


def test_closed_sets_are_few_short_and_shared():
    few = [Example("", label) for label in ("a", "b")] * 4
    assert closed_set(few, few[:1]) == ["a", "b"]
    assert closed_set(few, [Example("", "c")]) == []
    assert closed_set(few[:4], []) == []
    assert closed_set([Example("", "x" * 65), Example("", "b")] * 4, []) == []


def test_evaluation_restores_the_mode(tiny_llama, tiny_tokenizer):
    task = CausalLM(tiny_tokenizer, tiny_llama, 64)
    tiny_llama.train()
    assert set(task.evaluate(tiny_llama, task.encode(ROWS), 2, CPU)) == {"loss"}
    assert tiny_llama.training


def test_classification_and_regression_metrics(tiny_tokenizer):
    tiny_tokenizer.chat_template = None

    class Reader(torch.nn.Module):
        """Logits are the first token's id, times (1, -1) for two classes."""

        def __init__(self, outputs):
            super().__init__()
            self.outputs = outputs

        def forward(self, input_ids, attention_mask, **_):
            value = input_ids[:, :1].float() * attention_mask[:, :1]
            return types.SimpleNamespace(logits=torch.cat([value, -value], 1)[:, : self.outputs])

    task = Classification(tiny_tokenizer, 8, ["no", "yes"])
    rows = task.encode([Example("apple", "no"), Example("sky was good", "no"), Example("red", "yes")])
    batch = task.collate(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 3)
    assert task.evaluate(Reader(2), rows, 2, CPU)["accuracy"] == pytest.approx(2 / 3)
    numbers = Regression(tiny_tokenizer, 8)
    rows = numbers.encode([Example("red", 1.0), Example("green", 2.0), Example("blue", 4.0)])
    values = numbers.evaluate(Reader(1), rows, 2, CPU)
    assert values["spearman"] == pytest.approx(1.0)
    assert values["pearson"] == pytest.approx(0.98198, abs=1e-5)
    assert values["correlation"] == pytest.approx((values["spearman"] + values["pearson"]) / 2)


def test_ranks_share_ties_and_constants_correlate_zero():
    assert average_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert pearson(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])) == 0.0


def test_pairs_are_tokenised_together(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    task = Classification(tiny_tokenizer, 16, ["no", "yes"])
    row = task.encode([Example("red apple", "no", pair="blue sky")])[0]
    assert tiny_tokenizer.decode(row["input_ids"]) == "red apple blue sky"
