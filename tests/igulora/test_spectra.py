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
    assert sampled_erank(matrix, lead=16, generator=torch.Generator().manual_seed(1)) == pytest.approx(
        erank_of(sigma), rel=0.06
    )


# Of the size of gradients, in their dtype. Values that shrink by a factor reach into all orders of
# magnitude alike, which a few steps of Lanczos tell apart least.
LARGE = {
    "1/k": (1 / torch.arange(1.0, 1101), 0.03),
    "k^-1/2": (torch.arange(1.0, 1101) ** -0.5, 0.01),
    "1/k^2": (torch.arange(1.0, 1101) ** -2.0, 0.01),
    "1/k of rank 300": (1 / torch.arange(1.0, 301), 0.05),
    "flat of rank 300": (torch.ones(300), 0.05),
    "geometric": (0.99 ** torch.arange(1100.0), 0.1),
    "five values and noise": (torch.cat((torch.ones(5), torch.full((1095,), 1e-4))), 0.01),
}


@pytest.mark.parametrize("name", LARGE)
def test_samples_of_large_gradients(name: str) -> None:
    sigma, bound = LARGE[name]
    matrix = with_spectrum(sigma, 1100, 1300).float()
    sampled = effective_rank(matrix, exact_up_to=1000, generator=torch.Generator().manual_seed(1))
    assert sampled == pytest.approx(erank_of(sigma), rel=bound)
    assert sampled == pytest.approx(effective_rank(matrix), rel=bound)
    assert sampled != exact_erank(matrix)


def test_samples_of_a_random_matrix() -> None:
    """Every direction in use."""
    matrix = torch.randn(1100, 1300, generator=torch.Generator().manual_seed(2))
    sampled = effective_rank(matrix, exact_up_to=1000, generator=torch.Generator().manual_seed(3))
    exact = effective_rank(matrix)
    assert 900 < exact < 1100
    assert sampled == pytest.approx(exact, rel=0.01)


def test_fewer_directions_than_samples_ask_for() -> None:
    """The leading values are all there are, or all but a few."""
    for side in (1, 40, 64, 66):
        matrix = torch.randn(side, 90, generator=torch.Generator().manual_seed(side))
        sampled = sampled_erank(matrix, generator=torch.Generator().manual_seed(1))
        assert sampled == pytest.approx(exact_erank(matrix), rel=1e-3)


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
