"""The base product with the rank term inside its accumulator: ``out = A B + bias + (alpha S) (c F)``, one rounding, no extra pass.

Contract. Forward: A = x (M, K), B = W0^T, F = P with c = s m lambda. Backward: A = dy, B = W0, F = Q without c, its product times dropout's
kept entries. A, B, S and out share one dtype of bfloat16, float16, float32; F, c, alpha are float32 masters; accumulation in float32.
Two forms of one computation: through pointers (any device), and through tensor descriptors with a persistent grid (compute capability
9.0 and newer: the tensor memory accelerator moves the tiles). One launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..traffic import Traffic
from .common import (
    NARROW,
    SCALING_DTYPES,
    TYPE_NAMES,
    Specimen,
    Tile,
    cdiv,
    dot_precision,
    processors,
)
from .launch import Plan, launch, planned
from .tiles import RankTerm, add_rank_term, rank_term_types, traffic_rank_tile

DESCRIPTOR_FAMILIES = ("sm_90", "sm_100", "sm_120")
_UNSPECIALISED = ["M", "R", "rows_per_group", "threshold"]


def config(family: str, itemsize: int, *, descriptors: bool, dropout: bool = False) -> Tile:
    """Default tiles; dropout narrows them, whose words share registers with the accumulator."""
    if itemsize == 4:
        return Tile(64, 64, 32, 8, num_warps=8, num_stages=2)
    if dropout and descriptors and family == "sm_120":
        return Tile(64, 64, 64, 8, num_warps=4, num_stages=3)
    if dropout:
        return Tile(128, 64, 64 if family in DESCRIPTOR_FAMILIES else 32, 8, num_warps=8, num_stages=3)
    if family in ("sm_90", "sm_100"):
        return Tile(128, 256, 64, 16 if descriptors else 8, num_warps=8, num_stages=3)
    if family == "sm_80":
        return Tile(128, 128, 32, 8, num_warps=4, num_stages=4)
    return Tile(128, 128, 64 if descriptors else 32, 8, num_warps=8, num_stages=2 if descriptors else 3)


def candidates(family: str, itemsize: int, *, descriptors: bool, dropout: bool = False) -> list[Tile]:
    """What tuning tries: the default first, then tiles for few rows or columns."""
    default = config(family, itemsize, descriptors=descriptors, dropout=dropout)
    if itemsize == 4 or dropout:
        return [default]
    if family in ("sm_90", "sm_100"):
        return [default, Tile(128, 128, 64, 8, 4, 4 if descriptors else 3)]
    return [default, Tile(128, 64, 32, 8, 4, 3), Tile(64, 128, 32, 8, 4, 3)]


@triton.jit
def _tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Block row and column of a tile; GROUP_M block rows are walked together, so that their tiles of A and B stay in the L2 cache."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP_M * blocks_n) * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    inside = tile % (GROUP_M * blocks_n)
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=NARROW)
def _gemm_rank_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    s_ptr,
    f_ptr,
    e_ptr,
    mask_ptr,
    alpha_ptr,
    bias_ptr,
    seed_ptr,
    M,
    N,
    K,
    R,
    S_COLS,
    rows_per_group,
    stride_am,
    stride_bk,
    stride_bn,
    scale,
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    HAS_COEF: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    block_m, block_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * stride_am + inner[None, :]
    b_ptrs = b_ptr + inner.to(tl.int64)[:, None] * stride_bk + columns.to(tl.int64)[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=(rows[:, None] < M) & (k + inner[None, :] < K), other=0.0)
        b = tl.load(b_ptrs, mask=(k + inner[:, None] < K) & (columns[None, :] < N), other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_K) @ (BLOCK_K, BLOCK_N)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk
    dtype = out_ptr.dtype.element_ty
    acc = add_rank_term(
        acc,
        s_ptr,
        f_ptr,
        e_ptr,
        mask_ptr,
        alpha_ptr,
        bias_ptr,
        seed_ptr,
        rows,
        block_n * BLOCK_N,
        block_n * BLOCK_N,
        N,
        M,
        N,
        R,
        S_COLS,
        rows_per_group,
        scale,
        threshold,
        keep_scale,
        HAS_BIAS,
        HAS_COEF,
        HAS_ALPHA,
        DROPOUT,
        PRECISION,
        dtype,
        BLOCK_N,
        BLOCK_R,
    )
    out = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out, acc.to(dtype), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=NARROW)
def _gemm_rank_descriptor_kernel(
    a_desc,
    b_desc,
    out_desc,
    s_ptr,
    f_ptr,
    e_ptr,
    mask_ptr,
    alpha_ptr,
    bias_ptr,
    seed_ptr,
    M,
    N,
    K,
    R,
    S_COLS,
    rows_per_group,
    scale,
    threshold,
    keep_scale,
    B_IS_NK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COEF: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    dtype = out_desc.dtype
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=False):
        block_m, block_n = _tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first_m, first_n = block_m * BLOCK_M, block_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([first_m, k])
            b = b_desc.load([first_n, k]).T if B_IS_NK else b_desc.load([k, first_n])
            acc = tl.dot(a, b, acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_K) @ (BLOCK_K, BLOCK_N)
        acc = add_rank_term(
            acc,
            s_ptr,
            f_ptr,
            e_ptr,
            mask_ptr,
            alpha_ptr,
            bias_ptr,
            seed_ptr,
            first_m + tl.arange(0, BLOCK_M),
            first_n,
            first_n,
            N,
            M,
            N,
            R,
            S_COLS,
            rows_per_group,
            scale,
            threshold,
            keep_scale,
            HAS_BIAS,
            HAS_COEF,
            HAS_ALPHA,
            DROPOUT,
            PRECISION,
            dtype,
            BLOCK_N,
            BLOCK_R,
        )
        out_desc.store([first_m, first_n], acc.to(dtype))


def fits_descriptors(A: Tensor, weight: Tensor) -> bool:
    """Whether tensor descriptors can describe the operands: 16-byte aligned storage and row strides."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in (A, weight))
    return aligned and weight.shape[0] * weight.element_size() % 16 == 0


@planned
def _plan(
    M: int,
    N: int,
    K: int,
    rank: RankTerm,
    strides: tuple[int, int, int] | None,
    transposed: bool,
    dtype: torch.dtype,
    tile: Tile,
    programs: int,
) -> Plan:
    """Of either form: descriptors know their strides, and walk the tiles with a fixed number of programs."""
    constants = {**rank.constants(dtype), **tile.blocks("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}
    sizes = (M, N, K, *rank.sizes(M))
    tiles = cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
    if strides is not None:
        return Plan(_gemm_rank_kernel, (tiles,), (*sizes, *strides, *rank.factors), constants)
    constants["B_IS_NK"] = transposed
    return Plan(_gemm_rank_descriptor_kernel, (min(programs, tiles),), (*sizes, *rank.factors), constants)


def launch_gemm_rank(
    A: Tensor,
    weight: Tensor,
    S: Tensor,
    F: Tensor,
    coef: tuple[Tensor, Tensor, float] | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    tile: Tile,
    *,
    transposed: bool,
    descriptors: bool,
) -> Tensor:
    """``A W^T`` (transposed) or ``A W`` plus the rank term.

    Args:
        A: (M, K) rows of stride >= K. weight: (out, in), contiguous. S: (M, padded rank). F: (r, N) master.
        coef: (lambda, mask, scale) that F is multiplied by, or None. alpha: (n,) for n groups of rows, or None.
        seed, dropout_p: of the rank term's columns.

    Returns:
        (M, N) in A's dtype.
    """
    (M, K), N = A.shape, F.shape[1]
    out = A.new_empty((M, N))
    e, mask = coef[:2] if coef is not None else (None, None)
    rank = RankTerm.of(S, F, coef, alpha, bias, seed, dropout_p)
    tail = (S, F, e, mask, alpha, bias, seed)
    if descriptors:
        b_block = [tile.BLOCK_N, tile.BLOCK_K] if transposed else [tile.BLOCK_K, tile.BLOCK_N]
        plan = _plan(M, N, K, rank, None, transposed, A.dtype, tile, processors(A.device))
        launch(
            plan,
            TensorDescriptor.from_tensor(A, [tile.BLOCK_M, tile.BLOCK_K]),
            TensorDescriptor.from_tensor(weight, b_block),
            TensorDescriptor.from_tensor(out, [tile.BLOCK_M, tile.BLOCK_N]),
            *tail,
        )
        return out
    strides = (A.stride(0), *((1, weight.stride(0)) if transposed else (weight.stride(0), 1)))
    launch(_plan(M, N, K, rank, strides, transposed, A.dtype, tile, 0), A, weight, out, *tail)
    return out


def traffic_gemm_rank(
    M: int,
    N: int,
    K: int,
    R: int,
    itemsize: int,
    tile: Tile,
    *,
    groups: int = 0,
    coef: bool = False,
    bias: bool = False,
    seeded: bool = False,
) -> Traffic:
    """Of one :func:`launch_gemm_rank` through pointers; ``groups`` counts alphas, 0 without."""
    blocks_m, blocks_n = cdiv(M, tile.BLOCK_M), cdiv(N, tile.BLOCK_N)
    product = Traffic(
        read=(M * K + N * K) * itemsize,
        written=M * N * itemsize,
        loaded=(blocks_n * M * K + blocks_m * N * K) * itemsize,
        stored=M * N * itemsize,
        flops=2 * M * N * K,
    )
    return product + traffic_rank_tile(M, N, R, itemsize, tile, groups=groups, coef=coef, bias=bias, seeded=seeded)


def specimens(family: str) -> list[Specimen]:
    """Every configuration :func:`launch_gemm_rank` may use on a family: forward and backward, defaults and what tuning tries."""
    found = []
    for dtype in SCALING_DTYPES:
        name = TYPE_NAMES[dtype]
        for BLOCK_R in (16, 32):
            for descriptors in (False, True):
                if descriptors and (family not in DESCRIPTOR_FAMILIES or dtype == torch.float32):
                    continue
                tiles = candidates(family, dtype.itemsize, descriptors=descriptors)
                for tile in tiles:
                    found += [
                        _specimen(name, dtype, tile, BLOCK_R, transposed, descriptors) for transposed in (True, False)
                    ]
                tile = config(family, dtype.itemsize, descriptors=descriptors, dropout=True)
                found.append(_specimen(name, dtype, tile, BLOCK_R, False, descriptors, dropout=True))
    return found


def _specimen(
    name: str, dtype: torch.dtype, tile: Tile, BLOCK_R: int, transposed: bool, descriptors: bool, dropout: bool = False
) -> Specimen:
    types = {**rank_term_types(name), "K": "i32"}
    constants = {
        "HAS_BIAS": transposed,
        "HAS_COEF": transposed,
        "HAS_ALPHA": True,
        "DROPOUT": dropout,
        "PRECISION": dot_precision(dtype),
        "BLOCK_R": BLOCK_R,
    }
    direction = "backward dropout" if dropout else "forward" if transposed else "backward"
    shape = f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K} w{tile.num_warps}"
    label = f"{name} r{BLOCK_R} {shape} {direction}"
    if descriptors:
        b_block = (tile.BLOCK_N, tile.BLOCK_K) if transposed else (tile.BLOCK_K, tile.BLOCK_N)
        types |= {
            "a_desc": f"tensordesc<{name}[{tile.BLOCK_M},{tile.BLOCK_K}]>",
            "b_desc": f"tensordesc<{name}[{b_block[0]},{b_block[1]}]>",
            "out_desc": f"tensordesc<{name}[{tile.BLOCK_M},{tile.BLOCK_N}]>",
        }
        return tile.specimen(
            f"gemm descriptor {label}", _gemm_rank_descriptor_kernel, types, {**constants, "B_IS_NK": transposed}
        )
    types |= {"a_ptr": f"*{name}", "b_ptr": f"*{name}", "out_ptr": f"*{name}", "stride_am": "i32"}
    one, other = ("stride_bk", "stride_bn") if transposed else ("stride_bn", "stride_bk")
    types[other] = "i32"
    return tile.specimen(f"gemm pointer {label}", _gemm_rank_kernel, types, {**constants, one: 1})
