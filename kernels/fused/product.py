"""``A W^T`` or ``A W`` plus the rank term, in the form that tuning or the table chose (``choice.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import gemm, rank_term
from .choice import LIBRARY, Product, choose
from .common import drops, family

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
    temporary: bool = False,
    product: Product | None = None,
) -> Tensor:
    """``A W^T`` or ``A W`` plus the rank term, by the form measured or assumed to be fastest, or by the one that is given.

    The rank term of a block-diagonal adapter (S of three dimensions) is always an addend of the library's product: tiles of the other forms
    would meet several windows.
    ``temporary`` says that the weight was made for this product (dequantised), which admits the form that copies it.
    """
    weight = weight if weight.stride() == (weight.shape[1], 1) else weight.contiguous()
    F = F.contiguous()
    if S.ndim == 3:
        product = LIBRARY
    if product is None:
        dropout = drops(seed, dropout_p)
        product = choose(A, weight, F, transposed=transposed, temporary=temporary, dropout=dropout)
    if product.form == "library":
        out = A.new_empty((A.shape[0], weight.shape[0 if transposed else 1]))
        tile = rank_term.config(family(A.device), A.element_size())
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
    """One library product over K + r columns ``[A | alpha S] [W | c F]``; worth its copies only where the weight is a temporary anyway.

    The r columns come padded as S does, so that the library may read both operands in accesses of 16 bytes.
    """
    assert not drops(seed, dropout_p)
    (M, K), (R, N), columns = A.shape, F.shape, S.shape[1]
    wide = A.new_empty((M, K + columns))
    wide[:, :K] = A
    wide[:, K:] = S if alpha is None else (S.view(alpha.numel(), -1, columns) * alpha.view(-1, 1, 1)).view(M, columns)
    # In the weight's own order, so that it is copied as it lies.
    tall = A.new_empty((N, K + columns)).t() if transposed else A.new_empty((K + columns, N))
    tall[:K] = weight.t() if transposed else weight
    tall[K : K + R] = F if coef is None else F * (coef[2] * coef[0] * coef[1]).unsqueeze(1)
    tall[K + R :] = 0.0
    return wide @ tall if bias is None else torch.addmm(bias, wide, tall)
