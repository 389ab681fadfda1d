"""The operators of ``svd_linear.py`` and ``svd_project.py``, composed of the kernels: which launches, in which order, on which buffers.

Forward: S (one pass over x), then the base product with the rank term in its accumulator, or in an addend that cuBLAS starts from.
Backward: one pass over dy, its small sum, dx as the forward's product, one pass over x for dQ, and the sums of all partial results.
Block-diagonal adapters (n blocks, ``windows.py``) take the same launches, their blocks side by side in each, and the form of the base
product that adds to an addend: S and its gradient are (n, M, rank of a block) then.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backend import interpreting
from ..rows import Ranges, group_count, rows_first
from . import dq_pass, dy_pass, rank_term
from . import project as projection
from .common import block_rank, cdiv, drops, family, padded_rank
from .dq_pass import dq_segments
from .dy_pass import dy_segments
from .product import Coef, base_product
from .sums import Job, launch_sum_partials


def _aligned_rows(t: Tensor) -> Tensor:
    """(..., K) as (M, K) with neighbouring columns; a copy where the storage says otherwise."""
    rows = rows_first(t)
    return rows if rows.stride(-1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def _vector(t: Tensor | None) -> Tensor | None:
    """() or (n,) as (n,) neighbours in memory, as kernels read what each group, triplet or column has one of."""
    return None if t is None else t.reshape(-1).contiguous()


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _rank_rows(x2: Tensor, Q: Tensor) -> Tensor:
    """A padded buffer for S or its gradient."""
    blocks = x2.shape[1] // Q.shape[1]
    columns = padded_rank(Q.shape[0] // blocks)
    return x2.new_empty((x2.shape[0], columns) if blocks == 1 else (blocks, x2.shape[0], columns))


def _narrowed(S: Tensor, rank: int) -> Tensor:
    """The part of a padded buffer that holds the rank."""
    return S if S.shape[-1] == rank else S[..., :rank]


def _widened(S: Tensor) -> Tensor:
    """The padded buffer that S was cut from, where it is ours; a copy where it is somebody else's."""
    *leading, M, rank = S.shape
    columns = padded_rank(rank)
    if rank == columns and S.is_contiguous():
        return S
    strides = (columns, 1) if S.ndim == 2 else (M * columns, columns, 1)
    if (
        S.stride() == strides
        and S.storage_offset() == 0
        and S.untyped_storage().nbytes() >= math.prod(leading) * M * columns * S.element_size()
    ):
        return S.as_strided((*leading, M, columns), strides)
    wide = S.new_zeros((*leading, M, columns))
    wide[..., :rank] = S
    return wide


def project(x: Tensor, Qs: list[Tensor], seed: Tensor | None, dropout_p: float) -> list[Tensor]:
    """``svd_project``'s forward, or S of one layer, which may be block-diagonal."""
    x2 = _aligned_rows(x)
    out = [_rank_rows(x2, Q) for Q in Qs]
    busy = [i for i, Q in enumerate(Qs) if Q.shape[0] and x2.shape[0]]
    ranks = [Q.shape[0] // (x2.shape[1] // Q.shape[1]) for Q in Qs]
    BLOCK_R = block_rank(max(ranks, default=0))
    together, dropout = projection.members(BLOCK_R), drops(seed, dropout_p)
    for start in range(0, len(busy), together):
        chosen = busy[start : start + together]
        tile = projection.config(family(x.device), x.element_size(), BLOCK_R, len(chosen), dropout)
        masters = [Qs[i].contiguous() for i in chosen]
        projection.launch_project(x2, masters, [out[i] for i in chosen], seed, dropout_p, tile)
    return [_narrowed(S, rank) for S, rank in zip(out, ranks, strict=True)]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """``svd_linear``'s forward."""
    x2 = _aligned_rows(x)
    saved = x.new_empty((0,)) if S is not None else project(x2, [Q], seed, dropout_p)[0]
    S = saved if S is None else S
    if x2.shape[0] == 0 or P.shape[0] == 0:
        y = torch.nn.functional.linear(x2, weight, bias)
    else:
        coef = (E.contiguous(), mask.contiguous(), scale)
        y = base_product(x2, weight, _widened(S), P, coef, _vector(alpha), _vector(bias), None, 0.0, transposed=True)
    return y.view((*x.shape[:-1], weight.shape[0])), saved


def update(
    y: Tensor,
    x: Tensor,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    out: Tensor,
) -> Tensor:
    """The rank-r update of a base's output y (..., N) into ``out``, which may be y; returns the S it computed, or an empty tensor."""
    x2 = _aligned_rows(x)
    saved = x.new_empty((0,)) if S is not None else project(x2, [Q], seed, dropout_p)[0]
    S = saved if S is None else S
    if x2.shape[0] and P.shape[0]:
        tile = rank_term.config(family(x.device), x.element_size())
        coef = (E.contiguous(), mask.contiguous(), scale)
        rank_term.launch_rank_term(
            rows_first(out),
            rows_first(y),
            _widened(S),
            P.contiguous(),
            coef,
            _vector(alpha),
            None,
            None,
            0.0,
            tile,
        )
    elif out is not y:
        out.copy_(y)
    return saved


def backward(
    dy: Tensor,
    S: Tensor,
    x: Tensor,
    weight: Tensor | None,
    P: Tensor,
    E: Tensor,
    Q: Tensor,
    mask: Tensor,
    alpha: Tensor | None,
    path_weight: Tensor | None,
    path_P: Tensor | None,
    path_E: Tensor | None,
    path_Q: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    train_groups: int,
    path_start: int,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """``svd_linear``'s backward; None for what is not needed."""
    need_x, need_w, need_b, need_p, need_e, need_q, need_s = needs
    dy2, x2 = _aligned_rows(dy), _aligned_rows(x)
    M, R = x2.shape[0], P.shape[0]
    rows = Ranges.of(M, group_count(alpha, path_weight), train_groups, path_start)
    sampled = rows.has_path and path_P is not None and M > 0 and R > 0
    alpha = _vector(alpha)
    weights = _vector(path_weight) if sampled else None
    coef = (E.contiguous(), mask.contiguous(), scale)
    wide_S = _widened(S)
    dx: Tensor | None
    dx = dW = db = dP = dE = dQ = None
    jobs: list[Job] = []
    if M == 0 or R == 0:
        dP, dE, dQ, G = torch.zeros_like(P), torch.zeros_like(E), torch.zeros_like(Q), torch.empty_like(wide_S)
    else:
        dP = torch.empty_like(P, memory_format=torch.contiguous_format) if need_p else None
        G, dE = _dy_gradients(
            dy2, wide_S, P.contiguous(), coef, alpha, weights, rows, dP, path_P, need_e, path_E, sampled, jobs
        )
        if not need_s and (need_q or sampled):
            dQ = torch.empty_like(Q, memory_format=torch.contiguous_format) if need_q else None
            path_Qs: list[Tensor | None] = [path_Q if sampled else None]
            jobs += _q_jobs(x2, [G], [R], [dQ], path_Qs, alpha, weights, seed, dropout_p, rows)
    if need_x:
        if R == 0 or M == 0:
            dx = x2.new_zeros(x2.shape) if weight is None else dy2 @ weight
        elif weight is None:
            dx = x2.new_empty(x2.shape)
            tile = rank_term.config(family(x.device), x.element_size())
            rank_term.launch_rank_term(dx, None, G, Q.contiguous(), None, alpha, None, seed, dropout_p, tile)
        else:
            dx = base_product(dy2, weight, G, Q, None, alpha, None, seed, dropout_p, transposed=False)
        dx = dx.view(x.shape)
    if jobs:
        launch_sum_partials(jobs)
    if need_w:
        dW = dy2.t() @ x2
    if need_b:
        db = dy2.sum(0)
    return (
        dx,
        dW,
        db,
        dP if need_p else None,
        dE if need_e else None,
        dQ if need_q else None,
        _narrowed(G, S.shape[-1]) if need_s else None,
    )


def _dy_gradients(
    dy2: Tensor,
    S: Tensor,
    P: Tensor,
    coef: Coef,
    alpha: Tensor | None,
    weights: Tensor | None,
    rows: Ranges,
    dP: Tensor | None,
    path_P: Tensor | None,
    need_e: bool,
    path_E: Tensor | None,
    sampled: bool,
    jobs: list[Job],
) -> tuple[Tensor, Tensor | None]:
    """G and (later, once ``jobs`` are done) dE, dP and the path accumulators, from one pass over dy.

    A second one where the ranges overlap, or where the parts of dy P^T would not stay in the cache.
    """
    M, (R, N), columns, device = dy2.shape[0], P.shape, S.shape[-1], dy2.device
    blocks = dy2.shape[1] // N
    BLOCK_R = block_rank(R // blocks)
    tile = dy_pass.config(family(device), dy2.element_size(), BLOCK_R)
    want_dp = dP is not None or sampled
    disjoint = rows.path == rows.train or not sampled
    segments = dy_segments(rows.train, rows.train, M, N, tile, device, blocks)
    one_pass = dy_pass.in_one_pass(M, N, columns, tile, blocks)
    if one_pass:
        part_ds = _float32(dy2, cdiv(N, tile.BLOCK_N), blocks, M, columns)
    else:
        wide = projection.config(family(device), dy2.element_size(), BLOCK_R, 1)
        part_ds = projection.launch_project_parts(dy2, P, wide)
    part_dp = _float32(dy2, segments.splits, R, N) if want_dp else None
    if one_pass or want_dp:
        parts = (part_ds if one_pass else None, part_dp)
        in_segment = weights if disjoint else None
        dy_pass.launch_dy_pass(dy2, S, P, coef, alpha, in_segment, rows.per_group, segments, *parts, tile)
    if part_dp is not None:
        acc = path_P if sampled and disjoint else None
        jobs.append(Job(part_dp, R * N, R * N, segments.splits0, segments.splits1, dP, acc, N))
    if not disjoint:
        again = dy_segments(0, rows.path, M, N, tile, device, blocks)
        part_path = _float32(dy2, again.splits, R, N)
        dy_pass.launch_dy_pass(dy2, S, P, coef, None, weights, rows.per_group, again, None, part_path, tile)
        jobs.append(Job(part_path, R * N, R * N, 0, again.splits1, None, path_P, N))
    G = torch.empty_like(S)
    programs, padded = cdiv(M, dy_pass.ds_tile(BLOCK_R, dy2.element_size()).BLOCK_M), padded_rank(R)
    want_de = need_e or sampled
    part_de = _float32(dy2, 2 if weights is not None else 1, programs, padded) if want_de else None
    if part_de is not None and padded != R and interpreting():
        part_de.zero_()  # what lies in the padding is summed and dropped, which NumPy, unlike a GPU, warns of where it is infinite
    dy_pass.launch_ds_sum(part_ds, S, R, coef, alpha, weights, rows.per_group, rows.train, rows.path, G, part_de)
    dE = torch.empty_like(coef[0]) if need_e else None
    if part_de is not None:
        jobs.append(Job(part_de, padded, R, programs, programs if sampled else 0, dE, path_E if sampled else None))
    return G, dE


def _q_jobs(
    x2: Tensor,
    Gs: list[Tensor],
    ranks: list[int],
    dQs: list[Tensor | None],
    path_Qs: list[Tensor | None],
    alpha: Tensor | None,
    weights: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    rows: Ranges,
) -> list[Job]:
    """One pass over x for up to three layers of one number of blocks; the jobs that finish their dQ."""
    blocks, device = Gs[0].shape[0] if Gs[0].ndim == 3 else 1, x2.device
    K = x2.shape[1] // blocks
    dropout = drops(seed, dropout_p)
    tile = dq_pass.config(family(device), x2.element_size(), block_rank(max(ranks) // blocks), len(Gs), dropout)
    end0 = rows.train if dQs[0] is not None else 0
    start1 = rows.path if path_Qs[0] is not None else rows.rows
    segments = dq_segments(end0, start1, rows.rows, K, tile, device, blocks)
    parts = [_float32(x2, segments.splits, r, K) for r in ranks]
    if segments.splits:
        dq_pass.launch_dq_pass(x2, Gs, ranks, parts, alpha, weights, seed, dropout_p, rows.per_group, segments, tile)
    return [
        Job(part, r * K, r * K, segments.splits0, segments.splits1, dQ, acc, K)
        for part, r, dQ, acc in zip(parts, ranks, dQs, path_Qs, strict=True)
    ]


def project_backward(
    Gs: list[Tensor],
    x: Tensor,
    Qs: list[Tensor],
    alpha: Tensor | None,
    path_weight: Tensor | None,
    path_Qs: list[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    train_groups: int,
    path_start: int,
    needed: bool,
) -> Tensor | None:
    """``svd_project``'s backward; None where nothing is needed."""
    x2 = _aligned_rows(x)
    M = x2.shape[0]
    rows = Ranges.of(M, group_count(alpha, path_weight), train_groups, path_start)
    sampled = bool(path_Qs) and rows.has_path and path_weight is not None
    sizes = [Q.shape[0] for Q in Qs]
    make = torch.empty if M else torch.zeros
    joint = make((sum(sizes), x2.shape[1]), dtype=Qs[0].dtype, device=x.device) if needed else None
    results = [None] * len(Qs) if joint is None else list(joint.split(sizes))
    busy = [i for i, Q in enumerate(Qs) if Q.shape[0] and M] if needed or sampled else []
    together = projection.members(block_rank(max(Q.shape[0] for Q in Qs)))
    for start in range(0, len(busy), together):
        chosen = busy[start : start + together]
        jobs = _q_jobs(
            x2,
            [_widened(Gs[i]) for i in chosen],
            [Qs[i].shape[0] for i in chosen],
            [results[i] for i in chosen],
            [path_Qs[i] if sampled else None for i in chosen],
            _vector(alpha),
            _vector(path_weight) if sampled else None,
            seed,
            dropout_p,
            rows,
        )
        launch_sum_partials(jobs)
    return joint
