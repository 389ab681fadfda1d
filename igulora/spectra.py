"""Effective rank of a matrix: exactly, or by stochastic Lanczos quadrature where it is large (RaLoRA; ALGORITHMS 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PROBES, _STEPS = 16, 48
# Below this share of the largest value what a spectrum holds is rounding.
_NOISE = 1e-7


def effective_rank(matrix: Tensor, exact_up_to: int = 1024, generator: torch.Generator | None = None) -> float:
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
    matrix: Tensor, probes: int = _PROBES, steps: int = _STEPS, generator: torch.Generator | None = None
) -> float:
    """From estimates of ``sum sigma`` and ``sum sigma log sigma`` as traces of functions of ``A A^T``.

    Lanczos with full reorthogonalisation from random signs; each step multiplies ``probes`` vectors by A and by A^T. The error falls with
    the square root of ``probes`` times the smaller side.
    """
    wide = _wide(matrix).to(torch.promote_types(matrix.dtype, torch.float32))
    wide = wide / wide.norm()
    m = wide.shape[0]
    steps = min(steps, m)
    signs = torch.randint(0, 2, (m, probes), generator=generator) * 2 - 1
    vector = (signs.double() / math.sqrt(m)).to(wide.device)
    basis: list[Tensor] = []
    diagonal, beside = [], []
    for _ in range(steps):
        basis.append(vector)
        product = (wide @ (wide.t() @ vector.to(wide.dtype))).double()  # (m, n) @ (n, m) @ (m, probes)
        diagonal.append((vector * product).sum(0))
        for _ in range(2):  # once more: what rounding left
            for known in basis:
                product = product - known * (known * product).sum(0)
        length = product.norm(dim=0)
        beside.append(length)
        # A vector that ends here has seen its whole Krylov space: zeros do not count in the first component.
        vector = torch.where(length > 1e-10, product / length.clamp(min=1e-300), torch.zeros_like(product))
    off = torch.stack(beside[:-1], 1) if steps > 1 else torch.zeros(probes, 0, dtype=torch.float64, device=wide.device)
    off = torch.where(off > 1e-10, off, torch.zeros_like(off))
    T = torch.diag_embed(torch.stack(diagonal, 1)) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(T.cpu())  # (probes, steps), (probes, steps, steps)
    weights = vectors[:, 0, :].square() * m
    sigma = values.clamp(min=0.0).sqrt()
    kept = sigma > _NOISE
    total = float((weights * sigma * kept).sum(1).mean())
    entropy = float(
        (weights * torch.where(kept, sigma * sigma.clamp(min=1e-300).log(), torch.zeros_like(sigma))).sum(1).mean()
    )
    return math.exp(math.log(total) - entropy / total)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
