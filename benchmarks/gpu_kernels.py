"""Times of every Triton kernel by itself, beside the bytes and FLOPs that its traffic function says it must move and compute.

The launches are those that the operators make: an operator runs once with every launcher wrapped, and each launch that was seen is then
timed alone, with the very arguments it had. What is timed is what ships, whatever configuration was chosen.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import torch
from gpu_machine import Clock, Deadline, Setting, shapes
from torch import Tensor

from igulora.benchmarks.ratios import quartiles
from igulora.kernels import allocate_triplets, importance_update, orthogonality_grad_, svd_linear
from igulora.kernels.backend import use_backend
from igulora.kernels.importance import row_table
from igulora.kernels.orthogonality import work_table
from igulora.kernels.svd_project import svd_project
from igulora.kernels.traffic import Traffic


@dataclass(frozen=True)
class Launch:
    """A call of a launcher (or of the base product) that an operator made."""

    name: str
    call: Callable[..., Any]
    arguments: inspect.BoundArguments

    def run(self) -> object:
        """Make it again."""
        return self.call(*self.arguments.args, **self.arguments.kwargs)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.arguments.get(name)


def fused_modules() -> dict[str, Any]:
    """The modules of ``kernels/fused`` by name."""
    fused = importlib.import_module("igulora.kernels.fused")
    return {m.name: importlib.import_module(f"{fused.__name__}.{m.name}") for m in pkgutil.iter_modules(fused.__path__)}


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches made inside the block, in their order."""
    seen: list[Launch] = []

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(call)

        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            seen.append(Launch(name.removeprefix("launch_"), call, bound))
            return call(*args, **kwargs)

        return run

    with ExitStack() as stack:
        for module in fused_modules().values():
            for name, value in list(vars(module).items()):
                if inspect.isfunction(value) and (name.startswith("launch_") or name == "base_product"):
                    stack.enter_context(mock.patch.object(module, name, watched(name, value)))
        yield seen


# -- what a launch must move ------------------------------------------------------------------------------------------


def _windows(rows: Tensor, factor: Tensor) -> int:
    """Blocks of a block-diagonal adapter: windows of a row of x or y, by the length of Q's or P's rows."""
    return rows.shape[1] // factor.shape[1]


def _project(fused: dict[str, Any], a: Launch) -> Traffic:
    x, Qs = a["x2"], a["Qs"]
    windows = _windows(x, Qs[0])
    M, K, ranks = x.shape[0], Qs[0].shape[1], [Q.shape[0] // windows for Q in Qs]
    options = {"seeded": a["seed"] is not None, "windows": windows}
    return fused["project"].traffic_project(M, K, ranks, x.element_size(), a["tile"], x.device, **options)


def _project_parts(fused: dict[str, Any], a: Launch) -> Traffic:
    x, Q = a["x2"], a["Q"]
    windows = _windows(x, Q)
    M, K, ranks = x.shape[0], Q.shape[1], [Q.shape[0] // windows]
    options = {"parts": True, "windows": windows}
    return fused["project"].traffic_project(M, K, ranks, x.element_size(), a["tile"], x.device, **options)


def _product(fused: dict[str, Any], a: Launch) -> Traffic:
    """Of the base product, in whatever form: the kernel's own traffic, each operand once, tiles aside."""
    A, F, alpha = a["A"], a["F"], a["alpha"]
    tile = a["tile"] or fused["common"].Tile(BLOCK_M=A.shape[0], BLOCK_N=F.shape[1])
    return fused["gemm"].traffic_gemm_rank(
        A.shape[0],
        F.shape[1],
        A.shape[1],
        F.shape[0],
        A.element_size(),
        tile,
        groups=0 if alpha is None else alpha.numel(),
        coef=a["coef"] is not None,
        bias=a["bias"] is not None,
        seeded=a["seed"] is not None,
    )


def _rank_term(fused: dict[str, Any], a: Launch) -> Traffic:
    out, F, alpha = a["out"], a["F"], a["alpha"]
    windows = _windows(out, F)
    return fused["rank_term"].traffic_rank_term(
        out.shape[0],
        F.shape[1],
        F.shape[0] // windows,
        out.element_size(),
        a["tile"],
        groups=0 if alpha is None else alpha.numel(),
        base=a["base"] is not None,
        coef=a["coef"] is not None,
        bias=a["bias"] is not None,
        seeded=a["seed"] is not None,
        windows=windows,
    )


def _factors(a: Launch) -> dict[str, Any]:
    alpha, weight = a["alpha"], a["path_weight"]
    groups = next((t.numel() for t in (alpha, weight) if t is not None), 1)
    return {"alpha": alpha is not None, "weight": weight is not None, "groups": groups}


def _dy_pass(fused: dict[str, Any], a: Launch) -> Traffic:
    dy, P = a["dy2"], a["P"]
    windows = _windows(dy, P)
    wanted = {"want_ds": a["part_ds"] is not None, "want_dp": a["part_dp"] is not None, "windows": windows}
    sizes = (dy.shape[0], P.shape[1], P.shape[0] // windows, dy.element_size())
    return fused["dy_pass"].traffic_dy_pass(*sizes, a["segments"], a["tile"], **wanted, **_factors(a))


def _ds_sum(fused: dict[str, Any], a: Launch) -> Traffic:
    S = a["S"]
    windows = S.shape[0] if S.ndim == 3 else 1
    sizes = (S.shape[-2], a["R"] // windows, S.element_size(), a["part_ds"].shape[0])
    wanted = {"want_de": a["part_de"] is not None, "windows": windows}
    return fused["dy_pass"].traffic_ds_sum(*sizes, **wanted, **_factors(a))


def _dq_pass(fused: dict[str, Any], a: Launch) -> Traffic:
    x, length = a["x2"], a["parts"][0].shape[2]
    windows = x.shape[1] // length
    ranks = [r // windows for r in a["ranks"]]
    options = {"seeded": a["seed"] is not None, "windows": windows, **_factors(a)}
    return fused["dq_pass"].traffic_dq_pass(length, ranks, x.element_size(), a["segments"], a["tile"], **options)


def _sum_partials(fused: dict[str, Any], a: Launch) -> Traffic:
    jobs = [(j.numel, j.stride, j.count0, j.count1, j.out is not None, j.acc is not None) for j in a["jobs"]]
    return fused["sums"].traffic_sum_partials(jobs)


def _importance(fused: dict[str, Any], a: Launch) -> Traffic:
    return fused["importance"].traffic_importance(
        a["regions"], absolute=a["absolute"], itemsize=a["weight"].element_size()
    )


def _orthogonality(fused: dict[str, Any], a: Launch) -> Traffic:
    weight = a["weight"]
    arch = fused["common"].family(weight.device)
    return fused["orthogonality"].traffic_orthogonality(a["groups"], arch, itemsize=weight.element_size())


def _allocation(fused: dict[str, Any], a: Launch) -> Traffic:
    given = {name: a[name] is not None for name in ("eligible", "costs")}
    return fused["allocation"].traffic_allocation(a["scores"].shape[0], **given, min_rank=a["min_rank"])


TRAFFIC: dict[str, Callable[[dict[str, Any], Launch], Traffic]] = {
    "project": _project,
    "project_parts": _project_parts,
    "base_product": _product,
    "gemm_rank": _product,
    "rank_term": _rank_term,
    "dy_pass": _dy_pass,
    "ds_sum": _ds_sum,
    "dq_pass": _dq_pass,
    "sum_partials": _sum_partials,
    "importance": _importance,
    "orthogonality": _orthogonality,
    "allocation": _allocation,
}


def must(launch: Launch) -> dict[str, Any]:
    """Bytes and FLOPs of a launch; nothing where no traffic function is known for it, and the reason where one fails."""
    if launch.name not in TRAFFIC:
        return {}
    try:
        traffic = TRAFFIC[launch.name](fused_modules(), launch)
    except Exception:  # its time is worth having all the same
        return {"traffic_error": traceback.format_exc()}
    return {"bytes": traffic.moved, "flops": traffic.flops}


# -- cases ------------------------------------------------------------------------------------------------------------


def masters(
    setting: Setting, r: int, out: int, features: int, blocks: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, E, Q, mask of a layer, float32, with gradients wanted; r triplets in each of the blocks."""
    make = {"device": setting.device, "dtype": torch.float32}
    r, out, features = r * blocks, out // blocks, features // blocks
    P, Q = torch.randn(r, out, **make) / out**0.5, torch.randn(r, features, **make) / features**0.5
    return P.requires_grad_(), torch.ones(r, **make).requires_grad_(), Q.requires_grad_(), torch.ones(r, **make)


def operator_launches(
    setting: Setting, M: int, N: int, K: int, r: int, *, mixed: bool, blocks: int = 1
) -> list[Launch]:
    """What one forward and backward of ``svd_linear`` launches; in a mixed batch a fifth of 5 sequences are path rows."""
    make = {"device": setting.device}
    rows = M // 5 * 5 if mixed else M
    x = torch.randn(rows, K, dtype=setting.dtype, **make).requires_grad_()
    weight = torch.randn(N, K, dtype=setting.dtype, **make) / K**0.5
    P, E, Q, mask = masters(setting, r, N, K, blocks)
    options: dict[str, Any] = {}
    if mixed:
        accumulators = tuple(torch.zeros_like(t) for t in (P, E, Q))
        factor = torch.full((5,), 0.5, **make)
        options = {"alpha": factor, "path_weight": factor, "train_groups": 4, "path": accumulators}
    with recorded() as seen:
        y = svd_linear(x, weight, None, P, E, Q, mask, **options)
        torch.autograd.grad(y, (x, P, E, Q), torch.randn_like(y))
    return seen


def shared_launches(setting: Setting, M: int, K: int, r: int) -> list[Launch]:
    """What one forward and backward of ``svd_project`` launches for three layers."""
    x = torch.randn(M, K, dtype=setting.dtype, device=setting.device)
    Qs = [masters(setting, r, 1, K)[2] for _ in range(3)]
    with recorded() as seen:
        S = svd_project(x, Qs)
        torch.autograd.grad(S, Qs, [torch.randn_like(s) for s in S])
    return seen


def candidates(setting: Setting, *, transposed: bool, M: int, N: int, K: int, r: int) -> list[Any]:
    """The forms of a base product that tuning would measure here, and the one with a widened operand."""
    fused = fused_modules()
    choice, common = fused["choice"], fused["common"]
    problem = choice.Problem(transposed, setting.dtype, choice.bucket(M), N, K, common.block_rank(r))
    return [*choice.candidates(problem, common.family(setting.device)), choice.Product("augmented")]


def _forms(setting: Setting, launch: Launch) -> dict[str, Callable[[], object]]:
    """The base product of a launch in every form that this device can run, by each tile that tuning would try."""
    (M, K), (r, N) = launch["A"].shape, launch["F"].shape
    products = candidates(setting, transposed=launch["transposed"], M=M, N=N, K=K, r=r)
    if setting.tiny:
        products = [*products[:2], products[-1]]
    use_product = fused_modules()["choice"].use_product

    def forced(product: Any) -> Callable[[], object]:
        def call() -> object:
            with use_product(product):
                return launch.run()

        return call

    return {str(product): forced(product) for product in products}


def _timed(clock: Clock, launches: dict[str, Launch], seconds: float) -> dict[str, Any]:
    """Times of launches, each beside what it must do."""
    times, failed = clock.interleaved({name: launch.run for name, launch in launches.items()}, seconds)
    result: dict[str, Any] = {}
    for name, series in times.items():
        result[name] = {"ms": quartiles(series), **must(launches[name])}
    return result | {name: {"error": text} for name, text in failed.items()}


def _unique(launches: list[Launch]) -> dict[str, Launch]:
    """Launches by name, numbered where one comes twice."""
    found: dict[str, Launch] = {}
    for launch in launches:
        count = sum(name.split(" ")[0] == launch.name for name in found)
        found[f"{launch.name} {count + 1}" if count else launch.name] = launch
    return found


def layer(
    setting: Setting, clock: Clock, M: int, N: int, K: int, r: int, *, mixed: bool, blocks: int = 1
) -> dict[str, Any]:
    """Every kernel of one adapted layer; the base product apart."""
    launches = operator_launches(setting, M, N, K, r, mixed=mixed, blocks=blocks)
    return _timed(clock, _unique([a for a in launches if a.name != "base_product"]), seconds=1.0)


def products(setting: Setting, clock: Clock, M: int, N: int, K: int, r: int) -> dict[str, Any]:
    """The base product forward and backward in every form, and the library's product alone."""
    launches = [a for a in operator_launches(setting, M, N, K, r, mixed=False) if a.name == "base_product"]
    result: dict[str, Any] = {}
    for launch in launches:
        A, W, transposed = launch["A"], launch["weight"], launch["transposed"]
        direction = "forward" if transposed else "backward"
        B = W.t() if transposed else W
        calls = {"product alone": lambda A=A, B=B: A @ B, **_forms(setting, launch)}
        times, failed = clock.interleaved(calls, seconds=1.5)
        for name, series in times.items():
            over = [ours / alone for ours, alone in zip(series, times["product alone"], strict=True)]
            both = {"ms": quartiles(series), "over_product": quartiles(over)}
            result[f"{direction} {name}"] = {**both, **must(launch)}
        result[f"{direction} product alone"]["flops"] = 2 * M * N * K
        result |= {f"{direction} {name}": {"error": text} for name, text in failed.items()}
    return result


class Bank:
    """Flat buffers like those of an adapted 7-billion-parameter Llama: all its linear layers, r = 32."""

    def __init__(self, setting: Setting) -> None:
        matrices, self.r = ([(2, 32), (2, 24)], 4) if setting.tiny else ([(352, 4096), (96, 11008)], 32)
        self.regions: list[int] = []
        self.groups: list[int] = []
        offset = 0
        for count, length in matrices:
            self.regions += [offset, count * self.r, length]
            self.groups += [offset, count, self.r, length]
            offset += count * self.r * length
        self.triplets = sum(count for count, _ in matrices) * self.r // 2
        self.regions += [offset, self.triplets, 1]
        self.size = offset + self.triplets
        self.device = setting.device

    def buffers(self, count: int) -> list[Tensor]:
        """Flat buffers of small positive numbers."""
        return [torch.rand(self.size, device=self.device) * 0.01 for _ in range(count)]

    def timed(self, clock: Clock, operator: Callable[[], object]) -> dict[str, Any]:
        """The operator, what it launches, and its reference."""
        with recorded() as seen:
            operator()
        known = _unique(seen)
        result = _timed(clock, known, seconds=1.0)
        times, failed = clock.interleaved({"operator": operator, "reference": _with_reference(operator)}, seconds=2.0)
        result |= {name: {"ms": quartiles(series)} for name, series in times.items()}
        result |= {name: {"error": text} for name, text in failed.items()}
        return {**result, "bank": {"triplets": self.triplets, "parameters": self.size, "rank": self.r}}


def importance(setting: Setting, clock: Clock) -> dict[str, Any]:
    """A score update of the whole model."""
    bank = Bank(setting)
    weight, path, mean, deviation = bank.buffers(4)
    table = row_table(bank.regions).to(setting.device)
    return bank.timed(clock, lambda: importance_update(weight, path, mean, deviation, bank.regions, table=table))


def orthogonality(setting: Setting, clock: Clock) -> dict[str, Any]:
    """The penalty's gradient of the whole model."""
    bank = Bank(setting)
    weight, grad = bank.buffers(2)
    table = work_table(bank.groups).to(setting.device)
    return bank.timed(clock, lambda: orthogonality_grad_(weight, grad, bank.groups, 0.1, table=table))


def allocation(setting: Setting, clock: Clock) -> dict[str, Any]:
    """The choice of half of all triplets."""
    bank = Bank(setting)
    scores = torch.rand(bank.triplets, device=setting.device)
    owner = torch.arange(bank.triplets, device=setting.device) // bank.r
    budget = torch.tensor(bank.triplets // 2, device=setting.device)
    return bank.timed(clock, lambda: allocate_triplets(scores, budget, owner))


def _with_reference(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with use_backend("reference"):
            return call()

    return run


def items(setting: Setting) -> Iterator[tuple[str, Callable[[Deadline], dict[str, Any]]]]:
    """Per shape the kernels of a layer and the forms of its product; per model the bank's kernels."""
    clock = Clock(setting.device)
    features, rows, ranks = shapes(setting)
    M = rows[0]
    for r in ranks:
        for K, N in features:
            size = (M, N, K, r)
            yield f"layer {M}x{N}x{K} r{r}", lambda _, size=size: layer(setting, clock, *size, mixed=False)
            yield f"products {M}x{N}x{K} r{r}", lambda _, size=size: products(setting, clock, *size)
            if r == ranks[0] and K == N:
                for few in rows[1:]:
                    yield (
                        f"layer {few}x{N}x{K} r{r}",
                        lambda _, size=(few, *size[1:]): layer(setting, clock, *size, mixed=False),
                    )
            if setting.tiny or (r == ranks[0] and K == N):
                yield f"mixed batch {M}x{N}x{K} r{r}", lambda _, size=size: layer(setting, clock, *size, mixed=True)
                blocks = 2 if setting.tiny else 8
                name = f"{blocks} blocks {M}x{N}x{K} r{r}"
                yield name, lambda _, size=size, n=blocks: layer(setting, clock, *size, mixed=False, blocks=n)
                yield f"three layers {M}x{K} r{r}", lambda _, size=(M, K, r): _shared(setting, clock, *size)
        if r == ranks[0]:
            for part in (importance, orthogonality, allocation):
                yield f"bank {part.__name__}", lambda _, part=part: part(setting, clock)


def _shared(setting: Setting, clock: Clock, M: int, K: int, r: int) -> dict[str, Any]:
    return _timed(clock, _unique(shared_launches(setting, M, K, r)), seconds=1.0)
