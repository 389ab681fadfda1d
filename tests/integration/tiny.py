"""Tiny models, their batches, and a training run that reports every number it ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import igulora

D = 12


class Block(nn.Module):
    """One attention (q, k, v of one input) and one gated layer (gate, up of one input), with a head; rows are sequences."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, 8) for _ in range(3))
        self.o_proj = nn.Linear(8, width)
        self.gate_proj, self.up_proj = nn.Linear(width, 10), nn.Linear(width, 10)
        self.down_proj, self.head = nn.Linear(10, width), nn.Linear(width, 3)

    def body(self, x: Tensor) -> Tensor:
        """All but the head."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        x = x + self.o_proj(torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v)
        return x + self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def block_batches(count: int, sizes: Iterable[int] = (6,), lengths: Iterable[int] = (5,), seed: int = 5) -> list[Any]:
    """``count`` batches (x, target) for :class:`Block`, whose numbers of sequences and tokens go round ``sizes`` and ``lengths``."""
    g = torch.Generator().manual_seed(seed)
    sizes, lengths = tuple(sizes), tuple(lengths)
    shapes = [(sizes[i % len(sizes)], lengths[i % len(lengths)]) for i in range(count)]
    return [(torch.randn(*s, D, generator=g), torch.randn(*s, 3, generator=g)) for s in shapes]


def block_loss(forward: Callable[..., Tensor], batch: Any) -> Tensor:
    """Mean squared error."""
    return (forward(batch[0]) - batch[1]).float().square().mean()


def llama(**changes: Any) -> transformers.LlamaForCausalLM:
    """Two random layers, the same ones every time."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).train()


def bert() -> transformers.BertForSequenceClassification:
    """A classifier of two random layers, without dropout of its own."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        pad_token_id=0, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).train()


def token_batches(
    count: int, sizes: Iterable[int] = (6,), lengths: Iterable[int] = (9,), classes: int = 0
) -> list[dict[str, Tensor]]:
    """Token sequences, one of which is padded and one partly without labels; with ``classes``, one label for each sequence."""
    g = torch.Generator().manual_seed(1)
    sizes, lengths = tuple(sizes), tuple(lengths)
    batches = []
    for i in range(count):
        size, length = sizes[i % len(sizes)], lengths[i % len(lengths)]
        ids = torch.randint(3, 40, (size, length), generator=g)
        attended, labels = torch.ones_like(ids), ids.clone()
        attended[0, length - 2 :] = 0
        labels[attended == 0], labels[1, :3] = -100, -100
        if classes:
            labels = torch.randint(classes, (size,), generator=g)
        batches.append({"input_ids": ids, "attention_mask": attended, "labels": labels})
    return batches


def token_loss(forward: Callable[..., Any], batch: Any) -> Tensor:
    """The model's own."""
    return forward(**batch).loss


@dataclass
class End:
    """What a run ends with: its losses, and the numbers of the trained model and of its controller."""

    losses: list[float]
    weight: Tensor
    live: Tensor
    mean: Tensor
    deviation: Tensor
    path: Tensor

    @classmethod
    def of(cls, losses: list[float], controller: igulora.Controller) -> End:
        """Copies of them."""
        bank, scores = controller.bank, controller.importance
        found = (bank.weight, bank.live, scores.mean, scores.deviation, bank.path)
        return cls(losses, *(t.detach().clone() for t in found))

    def assert_same_bits(self, other: End) -> None:
        """Every number is equal."""
        assert self.losses == other.losses
        for name in ("weight", "live", "mean", "deviation", "path"):
            assert torch.equal(getattr(self, name), getattr(other, name)), name

    def assert_close(self, other: End, rtol: float = 1e-4, live: bool = True) -> None:
        """Numbers differ by rounding; the live triplets not at all."""
        torch.testing.assert_close(torch.tensor(self.losses), torch.tensor(other.losses), rtol=rtol, atol=0)
        for name in ("weight", "mean", "deviation", "path"):
            ours, theirs = getattr(self, name), getattr(other, name)
            torch.testing.assert_close(
                ours, theirs, rtol=rtol, atol=rtol * theirs.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
            )
        if live:
            assert torch.equal(self.live, other.live)


def train(
    model: nn.Module,
    config: igulora.IGUConfig,
    batches: Iterable[Any],
    loss: Callable[[Callable[..., Any], Any], Tensor],
    wrap: Callable[[nn.Module], Callable[..., Any]] = lambda m: m,
    lr: float = 1e-2,
) -> End:
    """One step per batch; ``wrap`` makes what is called of the adapted model."""
    igulora.adapt(model, config)
    # SGD: Adam's first steps are the signs of gradients, in which roundings count for as much as the gradient.
    optimizer = torch.optim.SGD(igulora.param_groups(model, lr=lr), momentum=0.9)
    controller, forward = igulora.Controller(model), wrap(model)
    torch.manual_seed(2)
    losses = []
    for batch in batches:
        losses.append(float(controller.backward(lambda b: loss(forward, b), batch)))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert controller.history or not controller.config.adaptive
    return End.of(losses, controller)
