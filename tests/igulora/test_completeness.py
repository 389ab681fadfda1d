"""The completeness axiom of integrated gradients, on a real pretrained encoder (ALGORITHMS 2.1)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import igulora
from igulora.training.demo import minilm_folder

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The pretrained MiniLM in float64 with a regression head, adapters with lambdas away from 0, and a batch."""
    torch.manual_seed(0)
    folder = minilm_folder()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).double().eval()
    config = igulora.IGUConfig(
        r=3, target_rank=2, total_steps=100, window=1, init="orthonormal", target_modules=["query", "value", "dense"]
    )
    config.exclude_modules.append("pooler.dense")
    igulora.adapt(model, config)
    bank = igulora.find_bank(model)
    with torch.no_grad():
        bank.lambdas.copy_(0.5 * torch.randn(bank.triplets, dtype=torch.float64))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = dict(tokenizer(["a warm and funny film", "two hours of nothing"], return_tensors="pt", padding=True))
    return model, {**batch, "labels": torch.tensor([1.5, -2.0], dtype=torch.float64)}


def loss_at(model: nn.Module, batch: dict[str, torch.Tensor], alpha: float) -> float:
    bank = igulora.find_bank(model)
    with torch.no_grad(), bank.context.at(torch.tensor(alpha, dtype=torch.float64)):
        return float(model(**batch).loss)


def integral(model: nn.Module, batch: dict[str, torch.Tensor], n: int) -> torch.Tensor:
    """The composite trapezoid of section 1's gradients with n intervals, flat."""
    bank = igulora.find_bank(model)
    bank.path.zero_()
    for k in range(n + 1):
        weight = (0.5 if k in (0, n) else 1.0) / n
        alpha = torch.tensor([k / n], dtype=torch.float64)
        with bank.context.at(alpha, 0, 0, torch.full_like(alpha, weight)):
            model(**batch).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters()), "a path pass made parameter gradients"
    return bank.path.clone()


def attributions(model: nn.Module, T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per triplet: sum_k P T_P, lambda T_lambda, sum_k Q T_Q."""
    bank = igulora.find_bank(model)
    views = bank.matrix_views(bank.weight * T)
    by_factor = [
        torch.cat([views[name, part].reshape(bank.layers[i].r, -1).sum(1) for i, name in enumerate(bank.names)])
        for part in ("lora_P", "lora_E", "lora_Q")
    ]
    return by_factor[0], by_factor[1], by_factor[2]


def test_three_factor_sums_agree_per_triplet(problem: tuple[nn.Module, dict[str, torch.Tensor]]) -> None:
    p, e, q = attributions(problem[0], integral(*problem, 3))
    assert e.abs().max() > 1e-4
    torch.testing.assert_close(p, e, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(q, e, rtol=1e-9, atol=1e-13)


def test_attributions_sum_to_the_loss_difference(problem: tuple[nn.Module, dict[str, torch.Tensor]]) -> None:
    """Sum of lambda times the integral equals L(Delta W) - L(0), and the error falls as N^-2."""
    wanted = loss_at(*problem, 1.0) - loss_at(*problem, 0.0)
    errors = {n: abs(float(attributions(problem[0], integral(*problem, n))[1].sum()) - wanted) for n in (4, 8, 16)}
    assert errors[16] < 2e-3 * abs(wanted), (errors, wanted)
    assert 3.0 < errors[4] / errors[8] < 5.5, errors
    assert 3.4 < errors[8] / errors[16] < 4.8, errors
