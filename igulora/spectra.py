"""Effective rank of a matrix: exactly, or by stochastic Lanczos quadrature where it is large (RaLoRA; ALGORITHMS 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXACT_UP_TO = 2048  # smaller sides take longer to sample than to decompose, by benchmarks/results/spectra
_PROBES, _STEPS, _LEAD, _POWERS = 16, 64, 64, 3
# Below this share of the largest value, or of the matrix' norm, what a spectrum holds is rounding: of the gradients, which are float32.
_NOISE = 1e-7
_ENDED = 1e-13  # length of a vector, for a matrix of norm 1, that is rounding


def effective_rank(matrix: Tensor, exact_up_to: int = EXACT_UP_TO, generator: torch.Generator | None = None) -> float:
    """``erank = exp(-sum p_i log p_i)``, ``p_i = sigma_i / sum sigma``: from 1 to the rank of ``matrix``; 0.0 where it is zero.

    Args:
        matrix: (rows, columns) of any floating-point dtype.
        exact_up_to: the smaller side up to which the spectrum is computed; above, it is sampled.
        generator: CPU generator of the samples.

    Raises:
        ValueError: not a matrix, or an entry is not finite.
    """
    if matrix.ndim != 2:
        raise ValueError(f"expected a matrix, got a tensor of shape {tuple(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("expected finite entries, got NaN or infinity")
    if min(matrix.shape) == 0 or not bool(matrix.any()):
        return 0.0
    rank = exact_erank(matrix) if min(matrix.shape) <= exact_up_to else sampled_erank(matrix, generator=generator)
    return min(max(rank, 1.0), float(min(matrix.shape)))


def exact_erank(matrix: Tensor) -> float:
    """From the eigenvalues of the smaller Gram matrix, float64. Costs its product and its decomposition."""
    wide = _wide(matrix).double()
    sigma = torch.linalg.eigvalsh(wide @ wide.t()).clamp_(min=0.0).sqrt_()  # (m, n) @ (n, m)
    p = sigma[sigma > _NOISE * sigma.max()]
    p = p / p.sum()
    return float(torch.exp(-(p * p.log()).sum()))


@torch.no_grad()
def sampled_erank(
    matrix: Tensor,
    probes: int = _PROBES,
    steps: int = _STEPS,
    lead: int = _LEAD,
    generator: torch.Generator | None = None,
) -> float:
    """From the leading singular values, and estimates of ``sum sigma`` and ``sum sigma log sigma`` over all others.

    A few values may weigh more than all others together, which random vectors hardly meet: ``lead`` of them come from a subspace that
    powers of ``A A^T`` find. What is left of the matrix is sampled: traces of functions of ``A A^T`` by Lanczos with full
    reorthogonalisation from ``probes`` vectors of random signs, ``steps`` products with A and A^T each. Float64: a Gram matrix squares the
    spectrum, whose tail float32 would drown.
    """
    wide = _wide(matrix).double()
    wide = wide / wide.norm()
    m = wide.shape[0]
    lead = min(lead, m)
    leading = torch.randn(lead, m, generator=generator, dtype=torch.float64).to(wide.device)
    for _ in range(_POWERS):
        leading = torch.linalg.qr(((leading @ wide) @ wide.t()).t()).Q.t()  # (lead, m) @ (m, n) @ (n, m)
    total, entropy = _sums(torch.linalg.svdvals(leading @ wide))
    if lead < m:
        weights, values = _quadrature(wide, leading, probes, min(steps, m - lead), generator)
        more, more_entropy = _sums(values.clamp_(min=0.0).sqrt_(), weights)
        total, entropy = total + more, entropy + more_entropy
    return math.exp(math.log(total) + entropy / total)


def _sums(sigma: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """Of sigma and of -sigma log sigma; values below the noise count for nothing."""
    sigma = torch.where(sigma > _NOISE, sigma, torch.zeros_like(sigma))
    terms = (sigma, torch.special.entr(sigma))
    return tuple(float((t if weights is None else weights * t).sum()) for t in terms)  # type: ignore[return-value]


def _quadrature(
    wide: Tensor, leading: Tensor, probes: int, steps: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Nodes (eigenvalues of ``A A^T`` outside ``leading``) and their weights, whose sum counts them: (probes, steps) each."""
    lead, m = leading.shape

    def outside(vectors: Tensor) -> Tensor:
        return vectors - (vectors @ leading.t()) @ leading

    # Vectors are rows: products with a skinny matrix on the left are three times as fast on a CPU.
    signs = torch.randint(0, 2, (probes, m), generator=generator) * 2 - 1
    vector = outside(signs.double().to(wide.device))
    vector = vector / vector.norm(dim=1, keepdim=True)
    basis = wide.new_zeros((probes, steps, m))
    diagonal, beside = wide.new_zeros((probes, steps)), wide.new_zeros((probes, steps))
    for step in range(steps):
        basis[:, step] = vector
        product = outside((vector @ wide) @ wide.t())  # (probes, m) @ (m, n) @ (n, m)
        diagonal[:, step] = (vector * product).sum(1)
        known = basis[:, : step + 1]
        for _ in range(2):  # once more: what rounding left
            shares = torch.bmm(known, product[:, :, None])  # (probes, step, m) @ (probes, m, 1)
            product = product - torch.bmm(shares.transpose(1, 2), known)[:, 0]
        length = product.norm(dim=1)
        # A vector that ends here has seen its whole Krylov space: zeros do not count in the first component.
        ended = length <= _ENDED
        beside[:, step] = torch.where(ended, torch.zeros_like(length), length)
        vector = torch.where(ended[:, None], torch.zeros_like(product), product / length[:, None])
    off = beside[:, :-1]
    T = torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(T.cpu())  # (probes, steps), (probes, steps, steps)
    return vectors[:, 0, :].square() * ((m - lead) / probes), values


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
