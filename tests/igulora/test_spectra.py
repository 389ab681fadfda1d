"""Effective rank: known spectra, and samples that agree with the exact value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from igulora.spectra import effective_rank, exact_erank, sampled_erank


def with_spectrum(sigma: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    k = sigma.numel()
    U = torch.linalg.qr(torch.randn(rows, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, k, generator=g, dtype=torch.float64)).Q
    return (U * sigma.double()) @ V.t()


def erank_of(sigma: Tensor) -> float:
    p = sigma.double()[sigma > 0]
    p = p / p.sum()
    return math.exp(-float((p * p.log()).sum()))


SPECTRA = {
    "flat": torch.ones(24),
    "one": torch.tensor([3.0]),
    "geometric": 0.8 ** torch.arange(40.0),
    "power": 1.0 / torch.arange(1.0, 61.0),
    "a tail far below": torch.cat((torch.ones(5), torch.full((30,), 1e-5))),
}


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (64, 64)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name: str, shape: tuple[int, int]) -> None:
    sigma = SPECTRA[name]
    expected = erank_of(sigma)
    matrix = with_spectrum(sigma, *shape)
    assert exact_erank(matrix) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(matrix) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(matrix.float() * 1e-6) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", SPECTRA)
def test_samples_agree_with_the_exact_value(name: str) -> None:
    sigma = SPECTRA[name]
    matrix = with_spectrum(sigma, 300, 200)
    g = torch.Generator().manual_seed(1)
    found = [sampled_erank(matrix, generator=g) for _ in range(5)]
    assert sum(found) / 5 == pytest.approx(erank_of(sigma), rel=0.1)


def test_samples_of_a_random_matrix() -> None:
    """As large as those that are sampled by default, every direction in use."""
    matrix = torch.randn(1100, 1300, generator=torch.Generator().manual_seed(2))
    sampled = effective_rank(matrix, generator=torch.Generator().manual_seed(3))
    exact = effective_rank(matrix, exact_up_to=2000)
    assert 900 < exact < 1100
    assert sampled == pytest.approx(exact, rel=0.02)
    assert sampled != exact


def test_scale_and_side_do_not_matter() -> None:
    matrix = torch.randn(30, 50, generator=torch.Generator().manual_seed(4))
    assert effective_rank(matrix) == pytest.approx(effective_rank(matrix.t() * 1e4), rel=1e-6)
    assert 1 <= effective_rank(matrix) <= 30


def test_of_nothing() -> None:
    assert effective_rank(torch.zeros(3, 4)) == 0.0
    assert effective_rank(torch.zeros(0, 4)) == 0.0


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (torch.zeros(3), "expected a matrix, got a tensor of shape"),
        (torch.full((2, 2), math.nan), "expected finite entries"),
    ],
)
def test_what_is_refused(matrix: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        effective_rank(matrix)
