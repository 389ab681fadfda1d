"""What one adapted layer adds to its base products: the launches of ``svd_linear.py``, by name, with the traffic of each.

Used by the projection page and the benchmark suite. Layers that share x split the passes over it among them.
"""

from __future__ import annotations

from ..traffic import Traffic
from . import dq_pass, dy_pass, gemm, project, rank_term, sums
from .common import Where, block_rank, cdiv, padded_rank
from .dq_pass import dq_segments
from .dy_pass import dy_segments
from .tiles import traffic_rank_tile


def _shared(traffic: Traffic, layers: int) -> Traffic:
    """One layer's share of a launch that serves several."""
    return Traffic(
        *(part // layers for part in (traffic.read, traffic.written, traffic.loaded, traffic.stored, traffic.flops))
    )


def _added(M: int, N: int, R: int, itemsize: int, family: str, form: str, *, coef: bool) -> Traffic:
    """What the rank term adds to a base product with N columns of output; ``coef`` in the forward, whose columns are c P."""
    if form == "library":
        term = rank_term.traffic_rank_term(M, N, R, itemsize, rank_term.config(family, itemsize), coef=coef)
        addend = M * N * itemsize  # the library's product reads back what it starts from
        return term + Traffic(read=addend, loaded=addend)
    tile = gemm.config(family, itemsize, descriptors=form == "descriptors")
    return traffic_rank_tile(M, N, R, itemsize, tile, coef=coef)


def forward_traffic(
    M: int,
    N: int,
    K: int,
    R: int,
    itemsize: int,
    family: str,
    where: Where,
    *,
    form: str = "pointers",
    sharing: int = 1,
) -> dict[str, Traffic]:
    """Beyond the base product, by launch, for an (N, K) layer whose x is read by ``sharing`` layers."""
    tile = project.config(family, itemsize, block_rank(R), sharing)
    S = project.traffic_project(M, K, [R] * sharing, itemsize, tile, where)
    return {"S": _shared(S, sharing), "rank term of y": _added(M, N, R, itemsize, family, form, coef=True)}


def backward_traffic(
    M: int,
    N: int,
    K: int,
    R: int,
    itemsize: int,
    family: str,
    where: Where,
    *,
    form: str = "pointers",
    sharing: int = 1,
) -> dict[str, Traffic]:
    """Beyond the base product dy W0, by launch; "partial sums" are written by one launch and read by the next."""
    at_dy = dy_pass.config(family, itemsize, block_rank(R))
    at_x = dq_pass.config(family, itemsize, block_rank(R), sharing)
    of_dy = dy_segments(M, M, M, N, at_dy, where)
    of_x = dq_segments(M, M, M, K, at_x, where)
    blocks, programs = cdiv(N, at_dy.BLOCK_N), cdiv(M, dy_pass.ds_tile(block_rank(R), itemsize).BLOCK_M)
    one_pass = dy_pass.in_one_pass(M, N, padded_rank(R), at_dy)
    dy = dy_pass.traffic_dy_pass(M, N, R, itemsize, of_dy, at_dy, want_ds=one_pass)
    if not one_pass:
        wide = project.config(family, itemsize, block_rank(R), 1)
        own = project.traffic_project(M, N, [R], itemsize, wide, where, parts=True)
        blocks = own.written // (4 * M * padded_rank(R))
        dy += own
    ds = dy_pass.traffic_ds_sum(M, R, itemsize, blocks)
    dq = _shared(dq_pass.traffic_dq_pass(K, [R] * sharing, itemsize, of_x, at_x), sharing)
    done = sums.traffic_sum_partials(
        [
            (R * N, R * N, of_dy.splits0, 0, True, False),
            (R, padded_rank(R), programs, 0, True, False),
            (R * K, R * K, of_x.splits0, 0, True, False),
        ]
    )
    ds_bytes = 4 * blocks * M * padded_rank(R)
    rest_bytes = dy.written - ds_bytes + dq.written + 4 * programs * padded_rank(R)
    partial = Traffic(ds_bytes + rest_bytes, ds_bytes + rest_bytes, ds_bytes + rest_bytes, ds_bytes + rest_bytes)
    return {
        "dy": Traffic(dy.read, 0, dy.loaded, 0, dy.flops),
        "G": Traffic(ds.read - ds_bytes, ds.written - 4 * programs * padded_rank(R), ds.loaded, ds.stored, ds.flops),
        "rank term of dx": _added(M, K, R, itemsize, family, form, coef=False),
        "dQ": Traffic(dq.read, 0, dq.loaded, 0, dq.flops),
        "gradients": Traffic(0, done.written, 0, done.stored, 0),
        "partial sums": partial,
    }
