"""What one call of an igulora operator costs on a GPU: its kernels' launches, each with the bytes and FLOPs of its traffic function.

The launches are those that ``kernels/fused/svd_linear.py`` and its neighbours make, from shapes alone, so that a model on the CPU or on the
meta device is counted as the GPU would run it. Launchers choose tiles, splits and the form of the base product by architecture: by the
table that ships, not by what ``igulora tune`` measured somewhere. Calls that no kernel takes (``kernels/backend.py``) are counted as if
one did.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels.rows import Ranges, group_count
from ..kernels.traffic import Traffic
from .costs import Cost, aten_cost

BASE, ADAPTER = "base products", "adapter products"
Arguments = dict[str, Any]
Shares = dict[str, Cost]


class Architecture(NamedTuple):
    """Whose tiles and splits the launchers choose: architecture family (a key of ``SHARED_MEMORY``) and number of multiprocessors."""

    family: str = "sm_90"
    processors: int = 132


def _cost(traffic: Traffic, launches: int) -> Cost:
    return Cost(launches, traffic.read, traffic.written, traffic.flops)


def _total(costs: list[Cost]) -> Cost:
    return sum(costs, Cost())


def _matrix(t: Tensor) -> tuple[int, int]:
    """Rows and columns of (..., K)."""
    return t.shape[:-1].numel(), t.shape[-1]


class _Rows(NamedTuple):
    """The rows of a call: ranges, and which factors the groups carry."""

    ranges: Ranges
    groups: int
    alpha: bool
    sampled: bool

    @classmethod
    def of(cls, a: Arguments, M: int, accumulates: bool) -> _Rows:
        groups = group_count(a["alpha"], a["path_weight"])
        ranges = Ranges.of(M, groups, a["train_groups"], a["path_start"])
        sampled = accumulates and ranges.has_path and a["path_weight"] is not None
        return cls(ranges, groups, a["alpha"] is not None, sampled)


# -- products ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _plain_product(M: int, N: int, K: int, itemsize: int) -> Cost:
    return Cost(1, (M * K + N * K) * itemsize, M * N * itemsize, 2 * M * N * K)


@lru_cache(maxsize=4096)
def _base_product(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: Any,
    where: Architecture,
    transposed: bool,
    groups: int,
    coef: bool,
    bias: bool,
    seeded: bool,
    windows: int,
) -> tuple[Cost, Cost]:
    """(base, adapter) share of an (M, K) by (K, N) product with a rank term, in the form that the shipped table chooses.

    R is the rank of each of ``windows`` blocks.
    """
    from ..kernels.fused import choice, rank_term
    from ..kernels.fused.common import block_rank
    from ..kernels.fused.tiles import traffic_rank_tile

    itemsize = dtype.itemsize
    base = _plain_product(M, N, K, itemsize)
    term = {"groups": groups, "coef": coef, "bias": bias, "seeded": seeded}
    problem = choice.Problem(transposed, dtype, choice.bucket(M), N, K, block_rank(R), False, seeded)
    product = choice.default(problem, where.family)
    weight_columns = K if transposed else N
    aligned = all(n * itemsize % 16 == 0 for n in (K, weight_columns))
    if windows > 1 or product.form == "library" or (product.form == "descriptors" and not aligned):
        tile = rank_term.config(where.family, itemsize)
        added = rank_term.traffic_rank_term(M, N // windows, R, itemsize, tile, windows=windows, **term)
        # The library's product reads back what it starts from.
        return base, _cost(added + Traffic(read=M * N * itemsize), 1)
    return base, _cost(traffic_rank_tile(M, N, R, itemsize, product.tile, **term), 0)


@lru_cache(maxsize=4096)
def _project(
    M: int, K: int, ranks: tuple[int, ...], itemsize: int, where: Architecture, seeded: bool, windows: int = 1
) -> Cost:
    """S of layers that read one x; K columns and the ranks in each of the windows."""
    from ..kernels.fused import project
    from ..kernels.fused.common import block_rank

    busy = [r for r in ranks if r] if M else []
    BLOCK_R = block_rank(max(ranks, default=0))
    together, total = project.members(BLOCK_R), Cost()
    for start in range(0, len(busy), together):
        chosen = busy[start : start + together]
        tile = project.config(where.family, itemsize, BLOCK_R, len(chosen), seeded)
        splits, _ = project.k_splits(M, K, tile, where.processors, windows)
        options = {"seeded": seeded, "windows": windows}
        traffic = project.traffic_project(M, K, chosen, itemsize, tile, where.processors, **options)
        total += _cost(traffic, 1 + (splits > 1))
    return total


Job = tuple[int, int, int, int, bool, bool]


@lru_cache(maxsize=4096)
def _dq(
    rows: _Rows,
    K: int,
    ranks: tuple[int, ...],
    itemsize: int,
    where: Architecture,
    wanted: bool,
    seeded: bool,
    windows: int = 1,
) -> tuple[Cost, tuple[Job, ...]]:
    """The pass over x, and the sums that finish each dQ; K columns and the ranks in each of the windows."""
    from ..kernels.fused import dq_pass
    from ..kernels.fused.common import block_rank

    tile = dq_pass.config(where.family, itemsize, block_rank(max(ranks)), len(ranks), seeded)
    ranges = rows.ranges
    end0 = ranges.train if wanted else 0
    start1 = ranges.path if rows.sampled else ranges.rows
    segments = dq_pass.dq_segments(end0, start1, ranges.rows, K, tile, where.processors, windows)
    cost = Cost()
    if segments.splits:
        factors = {"alpha": rows.alpha, "weight": rows.sampled, "groups": rows.groups, "windows": windows}
        traffic = dq_pass.traffic_dq_pass(K, list(ranks), itemsize, segments, tile, seeded=seeded, **factors)
        cost = _cost(traffic, 1)
    sizes = [r * K * windows for r in ranks]
    jobs = tuple((size, size, segments.splits0, segments.splits1, wanted, rows.sampled) for size in sizes)
    return cost, jobs


@lru_cache(maxsize=4096)
def _dy(
    rows: _Rows, N: int, R: int, itemsize: int, where: Architecture, need_p: bool, need_e: bool, windows: int
) -> tuple[Cost, tuple[Job, ...]]:
    """The passes over dy and their small sum, and the jobs that finish dP and dE; N columns and R triplets in each of the windows."""
    from ..kernels.fused import dy_pass, project
    from ..kernels.fused.common import block_rank, cdiv, padded_rank

    M, ranges, sampled = rows.ranges.rows, rows.ranges, rows.sampled
    columns, processors = padded_rank(R), where.processors
    tile = dy_pass.config(where.family, itemsize, block_rank(R))
    want_dp = need_p or sampled
    disjoint = ranges.path == ranges.train or not sampled
    segments = dy_pass.dy_segments(ranges.train, ranges.train, M, N, tile, processors, windows)
    one_pass = dy_pass.in_one_pass(M, N, columns, tile, windows)
    costs: list[Cost] = []
    jobs: list[Job] = []
    blocks = cdiv(N, tile.BLOCK_N)
    if not one_pass:
        wide = project.config(where.family, itemsize, block_rank(R), 1)
        blocks, _ = project.k_splits(M, N, wide, processors, windows)
        own = project.traffic_project(M, N, [R], itemsize, wide, processors, parts=True, windows=windows)
        costs.append(_cost(own, 1))
    if one_pass or want_dp:
        traffic = dy_pass.traffic_dy_pass(
            M,
            N,
            R,
            itemsize,
            segments,
            tile,
            want_ds=one_pass,
            want_dp=want_dp,
            alpha=rows.alpha,
            weight=sampled and disjoint,
            groups=rows.groups,
            windows=windows,
        )
        costs.append(_cost(traffic, 1))
    size = R * N * windows
    if want_dp:
        jobs.append((size, size, segments.splits0, segments.splits1, need_p, sampled and disjoint))
    if not disjoint:
        again = dy_pass.dy_segments(0, ranges.path, M, N, tile, processors, windows)
        options: dict[str, Any] = {"want_ds": False, "weight": True, "groups": rows.groups, "windows": windows}
        costs.append(_cost(dy_pass.traffic_dy_pass(M, N, R, itemsize, again, tile, **options), 1))
        jobs.append((size, size, 0, again.splits1, False, True))
    want_de = need_e or sampled
    factors = {"alpha": rows.alpha, "weight": sampled, "groups": rows.groups, "windows": windows}
    costs.append(_cost(dy_pass.traffic_ds_sum(M, R, itemsize, blocks, want_de=want_de, **factors), 1))
    if want_de:
        programs = cdiv(M, dy_pass.ds_tile(block_rank(R), itemsize).BLOCK_M)
        triplets = R * windows
        jobs.append((triplets, padded_rank(triplets), programs, programs if sampled else 0, need_e, sampled))
    return _total(costs), tuple(jobs)


@lru_cache(maxsize=4096)
def _sums(jobs: tuple[Job, ...]) -> Cost:
    from ..kernels.fused import sums

    return _cost(sums.traffic_sum_partials(list(jobs)), 1) if jobs else Cost()


def _seeded(a: Arguments) -> bool:
    return a["seed"] is not None and a["dropout_p"] > 0.0


def _windows(a: Arguments, N: int) -> tuple[int, int]:
    """(blocks of a layer with N outputs, rank of each)."""
    windows = N // a["P"].shape[1]
    return windows, a["P"].shape[0] // windows


# -- operators --------------------------------------------------------------------------------------------------------


def _svd_linear_fwd(a: Arguments, where: Architecture) -> Shares:
    x, weight = a["x"], a["weight"]
    (M, K), N, size = _matrix(x), weight.shape[0], x.element_size()
    windows, R = _windows(a, N)
    if not M or not R:
        return {BASE: _plain_product(M, N, K, size)}
    groups = 0 if a["alpha"] is None else a["alpha"].numel()
    rank = (groups, True, a["bias"] is not None, False)
    base, term = _base_product(M, N, K, R, x.dtype, where, True, *rank, windows)
    own = _project(M, K // windows, (R,), size, where, _seeded(a), windows) if a["S"] is None else Cost()
    return {BASE: base, ADAPTER: own + term}


def _svd_linear_bwd(a: Arguments, where: Architecture) -> Shares:
    x, dy, weight = a["x"], a["dy"], a["weight"]
    (M, K), N, size = _matrix(x), dy.shape[-1], x.element_size()
    windows, R = _windows(a, N)
    need_x, need_w, need_b, need_p, need_e, need_q, need_s = a["needs"]
    base = _plain_product(N, K, M, size) if need_w else Cost()
    if need_b:
        base += Cost(1, M * N * size, N * size, 0)
    if not M or not R:
        base += _plain_product(M, K, N, size) if need_x and weight is not None else Cost()
        return {BASE: base, ADAPTER: Cost()}
    rows = _Rows.of(a, M, a["path_P"] is not None)
    adapter, jobs = _dy(rows, N // windows, R, size, where, need_p, need_e, windows)
    if not need_s and (need_q or rows.sampled):
        pass_, more = _dq(rows, K // windows, (R,), size, where, need_q, _seeded(a), windows)
        adapter, jobs = adapter + pass_, jobs + more
    if need_x:
        groups = rows.groups if rows.alpha else 0
        if weight is None:
            adapter += _rank_term(M, K // windows, R, x.dtype, where, groups, False, _seeded(a), False, windows)
        else:
            rank = (groups, False, False, _seeded(a))
            product, term = _base_product(M, K, N, R, x.dtype, where, False, *rank, windows)
            base, adapter = base + product, adapter + term
    return {BASE: base, ADAPTER: adapter + _sums(jobs)}


@lru_cache(maxsize=4096)
def _rank_term(
    M: int,
    N: int,
    R: int,
    dtype: Any,
    where: Architecture,
    groups: int,
    coef: bool,
    seeded: bool,
    base: bool,
    windows: int,
) -> Cost:
    from ..kernels.fused import rank_term

    tile = rank_term.config(where.family, dtype.itemsize)
    options = {"groups": groups, "coef": coef, "seeded": seeded, "base": base, "windows": windows}
    return _cost(rank_term.traffic_rank_term(M, N, R, dtype.itemsize, tile, **options), 1)


def _svd_update(a: Arguments, where: Architecture) -> Shares:
    x, y = a["x"], a["y"]
    (M, K), N = _matrix(x), y.shape[-1]
    windows, R = _windows(a, N)
    if not M or not R:
        return {ADAPTER: Cost()}
    groups, size, own = 0 if a["alpha"] is None else a["alpha"].numel(), x.element_size(), Cost()
    if a["S"] is None:
        own = _project(M, K // windows, (R,), size, where, _seeded(a), windows)
    return {ADAPTER: own + _rank_term(M, N // windows, R, x.dtype, where, groups, True, False, True, windows)}


def _svd_project_fwd(a: Arguments, where: Architecture) -> Shares:
    x, ranks = a["x"], tuple(Q.shape[0] for Q in a["Qs"])
    return {ADAPTER: _project(*_matrix(x), ranks, x.element_size(), where, _seeded(a))}


def _svd_project_bwd(a: Arguments, where: Architecture) -> Shares:
    from ..kernels.fused.common import block_rank
    from ..kernels.fused.project import members

    x, ranks = a["x"], [Q.shape[0] for Q in a["Qs"]]
    M, K = _matrix(x)
    rows = _Rows.of(a, M, bool(a["path_Qs"]))
    busy = [r for r in ranks if r and M] if a["needed"] or rows.sampled else []
    together, total = members(block_rank(max(ranks))), Cost()
    for start in range(0, len(busy), together):
        chosen = tuple(busy[start : start + together])
        cost, jobs = _dq(rows, K, chosen, x.element_size(), where, a["needed"], _seeded(a))
        total += cost + _sums(jobs)
    return {ADAPTER: total}


@lru_cache(maxsize=64)
def _scores(regions: tuple[int, ...], absolute: bool, itemsize: int) -> Cost:
    from ..kernels.fused.importance import traffic_importance

    return _cost(
        traffic_importance(list(regions), absolute=absolute, itemsize=itemsize), 2 if sum(regions[1::3]) else 0
    )


def _importance_update(a: Arguments, where: Architecture) -> Shares:
    return {"scores": _scores(tuple(a["regions"]), a["absolute"], a["weight"].element_size())}


@lru_cache(maxsize=64)
def _penalty(groups: tuple[int, ...], family: str, itemsize: int) -> Cost:
    from ..kernels.fused.orthogonality import traffic_orthogonality

    traffic = traffic_orthogonality(list(groups), family, itemsize=itemsize)
    return _cost(traffic, 3 if traffic.moved else 0)


def _orthogonality(a: Arguments, where: Architecture) -> Shares:
    return {"orthogonality": _penalty(tuple(a["groups"]), where.family, a["weight"].element_size())}


def _allocate(a: Arguments, where: Architecture) -> Shares:
    from ..kernels.fused.allocation import traffic_allocation

    n, least = a["scores"].shape[0], a["min_rank"]
    given = {name: a[name] is not None for name in ("eligible", "costs")}
    launches = (1 + (least > 0)) if n else 0
    return {"allocation": _cost(traffic_allocation(n, **given, min_rank=least), launches)}


# Operators by name. Each says itself which part of a step it belongs to; a layer's call has a share in two.
OPERATORS: dict[str, Callable[[Arguments, Architecture], Shares]] = {
    "igulora::svd_linear_fwd": _svd_linear_fwd,
    "igulora::svd_linear_bwd": _svd_linear_bwd,
    "igulora::svd_update": _svd_update,
    "igulora::svd_update_": _svd_update,
    "igulora::svd_project_fwd": _svd_project_fwd,
    "igulora::svd_project_bwd": _svd_project_bwd,
    "igulora::importance_update": _importance_update,
    "igulora::orthogonality_grad_": _orthogonality,
    "igulora::allocate_triplets": _allocate,
}


@cache
def has_triton() -> bool:
    """Whether Triton can be imported, without which the kernels' configurations are unknown."""
    return importlib.util.find_spec("triton") is not None


def cost_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, where: Architecture | None = None
) -> Shares:
    """Cost of one operator call, by part of the step where the operator itself knows it, else under ``""``.

    Args:
        func: the ``OpOverload`` that a dispatch mode sees, with its arguments.
        out: what it returned.
        where: the GPU's architecture, by default an H100's. It decides on launches and tiles of igulora's operators alone. Without Triton,
            which says what those launch, an operator of igulora counts as one launch that moves its operands once.
    """
    operator = OPERATORS.get(func._schema.name)
    if operator is None or not has_triton():
        return {"": aten_cost(func, args, kwargs, out)}
    names = func._schema.arguments
    bound = {a.name: args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(names)}
    return operator(bound, where or Architecture())
