"""The models and texts of the fidelity study: batches in a fixed order, and adapters trained on the first of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from igulora.adapt import adapt
from igulora.controller import Controller
from igulora.files import write_tensors
from igulora.optim import param_groups
from igulora.training.data import BatchStream, Example
from igulora.training.demo import bbc_articles, load_smollm2, minilm_folder
from igulora.training.extras import require
from igulora.training.modeling import load_sequence_model, load_tokenizer
from igulora.training.tasks import Classification

from ..cases import MODELS
from ..models import load_model
from .settings import Study

Batch = dict[str, Tensor]
_WORDS = 24  # of a snippet: about 32 tokens; a whole article would be too easy, and its gradients next to nothing


@dataclass
class Problem:
    """A model, its loss (a mean over sequences of equal weight), and micro-batches by number: ``batch(k)``, any k >= 0."""

    model: nn.Module
    loss: Callable[[Any], Tensor]
    batch: Callable[[int], Batch]

    def window(self, study: Study, number: int) -> list[Batch]:
        """The micro-batches of scoring window ``number``, after those that the adapters were trained on."""
        first = study.steps + number * study.window
        return [self.batch(k) for k in range(first, first + study.window)]


def load(study: Study) -> Problem:
    """The adapted model of a study, not trained yet.

    Raises:
        MissingExtra: a package with the model or the texts is not installed.
    """
    logging = require("transformers", "bench", "the fidelity study").utils.logging
    logging.set_verbosity_error()  # a fresh head's weights are missing from the checkpoint: that is meant
    logging.disable_progress_bar()
    torch.manual_seed(0)
    return {"smollm2": _smollm2, "minilm": _minilm, "tiny": _tiny}[study.name](study)


def _smollm2(study: Study) -> Problem:
    model, tokenizer = load_smollm2()
    texts = [text for articles in bbc_articles().values() for text in articles]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    ids: list[int] = []
    for text in tokenizer([texts[i] for i in order], add_special_tokens=False)["input_ids"]:
        ids += [*text, tokenizer.eos_token_id]
    blocks = torch.tensor(ids[: len(ids) // study.length * study.length]).view(-1, study.length)
    return _language_model(study, model, blocks)


def _tiny(study: Study) -> Problem:
    model = load_model(MODELS["tiny"]).float()
    blocks = torch.randint(0, model.config.vocab_size, (400, study.length), generator=torch.Generator().manual_seed(0))
    return _language_model(study, model, blocks)


def _language_model(study: Study, model: nn.Module, blocks: Tensor) -> Problem:
    """Next-token loss on blocks of equal length: every sequence has as many loss terms."""
    adapt(model, study.config())
    stream = BatchStream(len(blocks), study.rows, seed=0)

    def batch(k: int) -> Batch:
        # The last micro-batch of an epoch may be smaller: leave it out.
        epoch, index = divmod(k, len(blocks) // study.rows)
        tokens = blocks[stream[epoch * stream.per_epoch + index]]
        return {"input_ids": tokens, "labels": tokens}

    def loss(batch: Batch) -> Tensor:
        return model(**batch, use_cache=False).loss

    return Problem(model, loss, batch)


def _minilm(study: Study) -> Problem:
    folder = str(minilm_folder())
    tokenizer = load_tokenizer(folder)
    examples = []
    for label, articles in bbc_articles().items():
        for article in articles:
            words = article.split()
            # A remainder is left out: snippets have one length.
            starts = range(0, len(words) - _WORDS + 1, _WORDS)
            examples += [Example(" ".join(words[i : i + _WORDS]), label) for i in starts]
    classes = sorted({str(example.target) for example in examples})
    model, heads = load_sequence_model(folder, "float32", classes, tokenizer)
    config = study.config()
    config.modules_to_save = heads
    adapt(model, config)
    task = Classification(tokenizer, study.length, classes)
    stream = BatchStream(len(examples), study.rows, seed=0)

    def batch(k: int) -> Batch:
        epoch, index = divmod(k, len(examples) // study.rows)
        return task.collate(task.encode([examples[i] for i in stream[epoch * stream.per_epoch + index]]))

    return Problem(model, partial(task.loss, model), batch)


def train(problem: Problem, study: Study, tell: Callable[[int], None]) -> dict[str, Any]:
    """Train the adapters in place for ``study.steps`` steps, at full rank.

    Returns:
        Mean loss of the first and of the last tenth of the steps.
    """
    torch.manual_seed(0)
    model = problem.model.train()
    optimizer = torch.optim.AdamW(param_groups(model, lr=study.lr), fused=True)
    controller = Controller(model)
    losses = []
    for step in range(study.steps):
        losses.append(controller.backward(problem.loss, problem.batch(step)))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        tell(step + 1)
    values = torch.stack(losses).float()
    tenth = max(1, study.steps // 10)
    return {"loss_first": values[:tenth].mean().item(), "loss_last": values[-tenth:].mean().item()}


def save_point(model: nn.Module, file: Path) -> None:
    """Keep what was trained."""
    write_tensors(file, {name: p for name, p in model.named_parameters() if p.requires_grad})


@torch.no_grad()
def load_point(model: nn.Module, file: Path) -> None:
    """Set what was trained, in place."""
    from safetensors.torch import load_file

    kept = load_file(file)
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.copy_(kept[name])
