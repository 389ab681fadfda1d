"""Tiny models, tokenizers and data for the tests of training runs; ``tests/cli`` uses them as well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = [
    "red", "green", "blue", "apple", "sky", "grass", "good", "bad", "film", "was", "the", "a", "very", "what", "colour", "is",
    "answer", "user", "assistant", "system", ".",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
COLOURS = {"apple": "red", "grass": "green", "sky": "blue"}


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template (or without)."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def make_llama() -> LlamaForCausalLM:
    """Two random layers, the same ones every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A causal language model of two random layers."""
    return make_llama()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template."""
    return make_tokenizer()


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A causal language model with its tokenizer, saved."""
    folder = tmp_path / "llama"
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """An encoder with its tokenizer, saved without a head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path / "bert"
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    make_tokenizer(chat=False).save_pretrained(folder)
    return folder


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """48 prompts with three possible responses."""
    things = list(COLOURS)
    rows = [
        {"prompt": "what colour is the " + "very " * (i % 4) + things[i % 3], "response": COLOURS[things[i % 3]]}
        for i in range(48)
    ]
    return write_jsonl(tmp_path / "colours.jsonl", rows)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """48 sentences with a class and a rating."""
    rows = [
        {"text": f"the film was {'very ' * (i % 3)}{word}", "label": word, "score": sign * (1.0 + i % 3)}
        for i in range(24)
        for word, sign in (("good", 1), ("bad", -1))
    ]
    return write_jsonl(tmp_path / "films.jsonl", rows)
