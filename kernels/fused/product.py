"""``A W^T`` or ``A W`` plus the rank term, in the form that tuning or the table chose (``choice.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import gemm, rank_term
from .choice import Product, choose
from .common import block_rank, family

Coef = tuple[Tensor, Tensor, float]


def base_product(
    A: Tensor,
    weight: Tensor,
    S: Tensor,
    F: Tensor,
    coef: Coef | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    *,
    transposed: bool,
    product: Product | None = None,
) -> Tensor:
    """``A W^T`` or ``A W`` plus the rank term, by the form measured or assumed to be fastest, or by the one that is given."""
    weight = weight if weight.stride() == (weight.shape[1], 1) else weight.contiguous()
    F = F.contiguous()
    product = product or choose(A, weight, F, transposed=transposed)
    if product.form == "library":
        out = torch.empty((A.shape[0], F.shape[1]), dtype=A.dtype, device=A.device)
        tile = rank_term.config(family(A.device), A.element_size(), block_rank(F.shape[0]))
        rank_term.launch_rank_term(out, None, S, F, coef, alpha, bias, seed, dropout_p, tile)
        return out.addmm_(A, weight.t() if transposed else weight)
    if product.form == "augmented":
        return _augmented(A, weight, S, F, coef, alpha, bias, seed, dropout_p, transposed)
    return gemm.launch_gemm_rank(
        A,
        weight,
        S,
        F,
        coef,
        alpha,
        bias,
        seed,
        dropout_p,
        product.tile,
        transposed=transposed,
        descriptors=product.form == "descriptors",
    )


def _augmented(
    A: Tensor,
    weight: Tensor,
    S: Tensor,
    F: Tensor,
    coef: Coef | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    transposed: bool,
) -> Tensor:
    """One library product over K + r columns ``[A | alpha S] [W | c F]``; worth its copies only where the weight is a temporary anyway."""
    assert seed is None or dropout_p == 0.0
    (M, K), R = A.shape, F.shape[0]
    wide = torch.empty((M, K + R), dtype=A.dtype, device=A.device)
    wide[:, :K] = A
    T = S[:, :R]
    wide[:, K:] = T if alpha is None else (T.view(alpha.numel(), -1, R) * alpha.view(-1, 1, 1)).view(M, R)
    columns = F if coef is None else F * (coef[2] * coef[0] * coef[1]).unsqueeze(1)
    tall = torch.empty((K + R, F.shape[1]), dtype=A.dtype, device=A.device)
    tall[:K] = weight.t() if transposed else weight
    tall[K:] = columns
    return wide @ tall if bias is None else torch.addmm(bias, wide, tall)
