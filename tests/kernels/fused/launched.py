"""Run as a program: what the launchers launch with the tiles of each architecture family, held against the specimens; JSON.

The compile report compiles specimens, never a launch. Here the operators run over their options in a process without the interpreter,
as in ``launch_keys.py``: nothing is compiled or run, and each launch is reduced to what decides its code (the kernel, its arguments'
types and alignment, constexpr values, warps and stages). It must be that of a specimen, or differ from one by ``HARMLESS`` alone.
Sizes are multiples of 16 and storage is aligned, as the specimens take them to be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import torch
from launch_keys import BACKEND, Compiled
from torch import Tensor
from triton.runtime.jit import JITFunction, create_function_from_signature

from igulora.kernels import orthogonality as penalty
from igulora.kernels.fused import (
    allocation,
    choice,
    dq_pass,
    dy_pass,
    gemm,
    importance,
    orthogonality,
    project,
    rank_term,
    sums,
    svd_linear,
)
from igulora.kernels.fused import product as products
from igulora.kernels.fused.choice import LIBRARY, Problem, use_product
from igulora.kernels.fused.common import SHARED_MEMORY, Specimen
from igulora.kernels.importance import COMBINES, row_table

KERNELS = (allocation, dq_pass, dy_pass, gemm, importance, orthogonality, project, rank_term, sums)
RANKS = (16, 32, 64, 128, 256)  # a rank of each bucket
M, N, K = 64, 256, 2048  # K is split where processors are many
GROUPS = 4

Value = Any  # of a constexpr argument
Settings = frozenset[tuple[str, Value]]


class Variant(NamedTuple):
    """What decides the code of a launch.

    Attributes:
        types: of each runtime argument, ``" aligned"`` behind it where the code is specialised on that; None of what is absent.
        settings: values of constexpr arguments, integers that are 1, and launch options.
    """

    kernel: str
    types: tuple[tuple[str, str | None], ...]
    settings: Settings


@dataclass(frozen=True)
class Harmless:
    """A launch with the settings ``launched`` breaks no rule where one with ``compiled`` in their place does not, else alike."""

    kernels: str
    launched: dict[str, Value]
    compiled: dict[str, Value]
    why: str


_LESS = "an optional operand's load and its one operation on registers fall away, before or behind the loop over the products"
_PRODUCTS = "_gemm_rank_kernel _gemm_rank_descriptor_kernel _rank_term_kernel"
# Less to do needs no more registers. Should the assembler spill nevertheless, for an occupancy of its choice, `launch.py` mends that.
HARMLESS = [
    Harmless(_PRODUCTS, {"HAS_BIAS": False}, {"HAS_BIAS": True}, _LESS),
    Harmless(_PRODUCTS, {"HAS_ALPHA": False}, {"HAS_ALPHA": True}, _LESS),
    Harmless("_ds_sum_kernel", {"WANT_DE": False}, {"WANT_DE": True}, _LESS),
    Harmless("_ds_sum_kernel", {"HAS_ALPHA": False}, {"HAS_ALPHA": True}, _LESS),
    Harmless("_ds_sum_kernel", {"HAS_WEIGHT": False}, {"HAS_WEIGHT": True}, _LESS),
    Harmless("_importance_kernel", {"ABSOLUTE": True}, {"ABSOLUTE": False}, "one stream fewer is read"),
]
# Beside these: an argument that is None stands for one that the kernel does not read, or reads in a branch that falls away; and bfloat16
# stands for float16 in kernels that scale nothing (see SPECIMEN_DTYPES).
SCALES = {
    "_dy_pass_kernel": "SCALED",
    "_dq_pass_kernel": "SCALED",
    "_gemm_rank_kernel": "HAS_ALPHA",
    "_gemm_rank_descriptor_kernel": "HAS_ALPHA",
    "_rank_term_kernel": "HAS_ALPHA",
}


def of_launch(kernel: JITFunction, *args: Any, **kwargs: Any) -> Variant:
    """By Triton's own binder."""
    binder = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    _, specialisation, options = binder(*args, **kwargs)
    types: list[tuple[str, str | None]] = []
    settings = {"num_warps": 4, "num_stages": 3, **options}
    for parameter, (kind, value) in zip(kernel.params, specialisation, strict=True):
        if kind != "constexpr":
            types.append((parameter.name, kind.replace(" ", "") + " aligned" * (value == "D")))
        elif value is None and not parameter.is_constexpr:
            types.append((parameter.name, None))
        else:
            settings[parameter.name] = value
    return Variant(kernel.fn.__name__, tuple(types), frozenset(settings.items()))


def of_specimen(specimen: Specimen) -> Variant:
    """As the compile report compiles it: pointers and integers are aligned wherever the kernel asks."""
    types: list[tuple[str, str | None]] = []
    settings = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    for parameter in specimen.kernel.params:
        name = parameter.name
        if name in specimen.types:
            kind = specimen.types[name]
            fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            types.append((name, kind + " aligned" * (not fixed and kind[0] in "*i")))
        elif specimen.constants[name] is None:
            types.append((name, None))
        else:
            settings[name] = specimen.constants[name]
    return Variant(specimen.kernel.fn.__name__, tuple(types), frozenset(settings.items()))


def stand_ins(kernel: str, settings: Settings) -> set[Settings]:
    """The settings, and those that are as good as they by ``HARMLESS``."""
    found, waiting = {settings}, [settings]
    while waiting:
        current = waiting.pop()
        for rule in HARMLESS:
            if kernel in rule.kernels.split() and rule.launched.items() <= current:
                other = frozenset(current - rule.launched.items() | rule.compiled.items())
                if other not in found:
                    found.add(other)
                    waiting.append(other)
    return found


class Specimens:
    """The specimens of a family, found by what decides their code."""

    def __init__(self, family: str) -> None:
        self.labels: dict[tuple[str, Settings], list[tuple[str, dict[str, str | None]]]] = {}
        for module in KERNELS:
            for specimen in module.specimens(family):
                kernel, types, settings = of_specimen(specimen)
                self.labels.setdefault((kernel, settings), []).append((specimen.label, dict(types)))

    def same(self, launch: Variant) -> set[str]:
        """Those of the same code; arguments that are None count as those of the specimen."""
        found = self.labels.get((launch.kernel, launch.settings), [])
        return {
            label
            for label, types in found
            if all(kind is None or types.get(name) == kind for name, kind in launch.types)
        }

    def like(self, launch: Variant) -> set[str]:
        """Those that stand for a launch."""
        as_bf16 = tuple((name, kind and kind.replace("fp16", "bf16")) for name, kind in launch.types)
        scales = (SCALES.get(launch.kernel), True) in launch.settings
        same = [launch] if scales else [launch, launch._replace(types=as_bf16)]
        return {
            label
            for settings in stand_ins(launch.kernel, launch.settings)
            for variant in same
            for label in self.same(variant._replace(settings=settings))
        }


class Launches:
    """Runs the launchers as on a device of a family, and keeps what they launch."""

    def __init__(self) -> None:
        self.found: set[Variant] = set()
        self.family, self.processors, self.device = "", 1, 0
        # Only the first launch of a variant comes here, the others find it by its plan: which `launch_keys.py` holds against Triton's key.
        JITFunction.run = lambda kernel, *args, **kwargs: self._run(kernel, *args, **kwargs)
        torch.cuda.current_device = lambda: self.device
        torch._C._cuda_getCurrentRawStream = lambda *_: 0
        Tensor.addmm_ = lambda out, *_: out  # the library's products would take most of the time
        for module in (svd_linear, products, choice, orthogonality):
            self._replace(module, "family", lambda device: self.family)
        for module in (project, dy_pass, dq_pass, gemm, importance):
            self._replace(module, "processors", lambda device: self.processors)

    def begin(self, family: str) -> None:
        """On a device of its own, where no plan knows a kernel yet."""
        self.found, self.family, self.device = set(), family, self.device + 1

    def have(self, processors: int, *, parts: int) -> None:
        """Split K where processors are many, and pass over dy once where ``parts`` of it may be large."""
        self.processors, dy_pass.PARTS_LIMIT = processors, parts
        project.k_splits.cache_clear()

    @staticmethod
    def _replace(module: ModuleType, name: str, value: Any) -> None:
        assert hasattr(module, name)
        setattr(module, name, value)

    def _run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Compiled:
        self.found.add(of_launch(kernel, *args, **kwargs))
        return Compiled()


def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    """Storage of its own, aligned."""
    return torch.zeros(shape, dtype=dtype)


def factors(R: int, blocks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """P, E, Q, or their accumulators; R triplets in each of the blocks."""
    return torch.zeros(R * blocks, N // blocks), torch.zeros(R * blocks), torch.zeros(R * blocks, K // blocks)


ROWS = {  # alpha given or not; path weights; training groups; first path group
    "training": (False, False, GROUPS, GROUPS),
    "training, alphas": (True, False, GROUPS, GROUPS),
    "mixed": (True, True, 2, 2),
    "mixed, no alphas": (False, True, 2, 2),
    "path": (True, True, 0, 0),
    "on the path": (True, True, GROUPS, 0),
}


def run_shared(dtype: torch.dtype, R: int, members: int) -> None:
    """S and dQ of layers that share x."""
    x, Qs = zeros(dtype, M, K), [torch.zeros(R, K)] * members
    Gs = [zeros(dtype, M, R)] * members
    for p in (0.0, 0.3):
        seed = torch.zeros((), dtype=torch.int64) if p else None
        svd_linear.project(x, Qs, seed, p)
        for alpha, path, train, start in ROWS.values():
            alphas, weights = (torch.zeros(GROUPS) if given else None for given in (alpha, path))
            accumulators = [torch.zeros(R, K) for _ in Qs] if path else []
            rest = (accumulators, seed, p, train, start, train > 0)
            svd_linear.project_backward(Gs, x, Qs, alphas, weights, *rest)


def run_layer(dtype: torch.dtype, R: int, blocks: int) -> None:
    """A layer, and the update of a base that runs its own forward, forward and backward, the products by the library."""
    x, dy = zeros(dtype, M, K), zeros(dtype, M, N)
    (P, E, Q), mask = factors(R, blocks), torch.zeros(R * blocks)
    for (alpha, path, train, start), p, own in product(ROWS.values(), (0.0, 0.3), (True, False)):
        seed = torch.zeros((), dtype=torch.int64) if p else None
        alphas, weights = (torch.zeros(GROUPS) if given else None for given in (alpha, path))
        weight = zeros(dtype, N, K) if own else None
        operands = (P, E, Q, mask, alphas)
        if weight is None:
            S = svd_linear.update(dy, x, *operands, None, seed, 1.25, p, dy)
        else:
            bias = zeros(dtype, N) if alpha else None
            S = svd_linear.forward(x, weight, bias, *operands, None, seed, 1.25, p)[1]
        accumulators = factors(R, blocks) if path else (None, None, None)
        for P_trains in (True, False) if train else (False,):
            needs = [True, False, False, P_trains, train > 0, train > 0, False]
            rest = (seed, 1.25, p, train, start, needs)
            svd_linear.backward(dy, S, x, weight, *operands, weights, *accumulators, *rest)


def run_products(dtype: torch.dtype, R: int, family: str) -> None:
    """``base_product`` in each form that is measured for it, or runs without a measurement."""
    S, e = zeros(dtype, M, R), torch.zeros(R)
    for transposed, dropout in ((True, False), (False, False), (False, True)):
        weight = zeros(dtype, N, K)
        A, F = (zeros(dtype, M, K), torch.zeros(R, N)) if transposed else (zeros(dtype, M, N), torch.zeros(R, K))
        problem = Problem(transposed, dtype, 2**20, F.shape[1], A.shape[1], R, dropout=dropout)
        forms = {*choice.candidates(problem, family), choice.default(problem, family)}
        seed, p = (torch.zeros((), dtype=torch.int64), 0.3) if dropout else (None, 0.0)
        for form, alphas, biased in product(forms, (None, torch.zeros(GROUPS)), (False, True)):
            if biased and not transposed:
                continue
            bias = zeros(dtype, N) if biased else None
            coef = (e, e, 1.25) if transposed else None
            operands = (A, weight, S, F, coef, alphas, bias, seed, p)
            products.base_product(*operands, transposed=transposed, product=form)


def run_bank() -> None:
    """What runs once for the whole model: scores, penalty, allocation."""
    flat = [torch.zeros(1024) for _ in range(4)]
    regions = [0, 4, 64, 256, 16, 1]
    for combine, absolute in product(COMBINES, (False, True)):
        rest = (regions, 0.85, 0.85, 1e-6, combine, absolute, row_table(regions))
        importance.launch_importance(*flat, *rest)
    for rank, offdiagonal in product((16, 32, 64, 128), (False, True)):
        groups = [0, 1, rank, 64]
        weight, grad = torch.zeros(rank * 64), torch.zeros(rank * 64)
        orthogonality.launch_orthogonality(weight, grad, groups, 0.1, offdiagonal, penalty.work_table(groups))
    scores, budget, layer = torch.zeros(64), torch.zeros((), dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    for some, charged, min_rank in product((False, True), (False, True), (0, 1)):
        eligible = torch.ones(64, dtype=torch.bool) if some else None
        costs = torch.ones(64, dtype=torch.int64) if charged else None
        allocation.launch_allocation(scores, budget, layer, eligible, costs, min_rank)


def launches_of(launches: Launches, family: str) -> set[Variant]:
    """All that the launchers launch on a family."""
    launches.begin(family)
    run_bank()
    for dtype, R in product((torch.bfloat16, torch.float16, torch.float32), RANKS):
        run_products(dtype, R, family)
        for processors, parts in ((1, 2**40), (1000, 0)):
            launches.have(processors, parts=parts)
            with use_product(LIBRARY):
                run_layer(dtype, R, blocks=1)
                if R <= 32:  # the kernels are those of one block
                    run_layer(dtype, R, blocks=2)
            for members in range(1, project.MEMBERS + 1):
                run_shared(dtype, R, members)
    return launches.found


def shown(launch: Variant) -> str:
    """A launch in words."""
    settings = ", ".join(f"{name}={value}" for name, value in sorted(launch.settings))
    return f"{launch.kernel}({', '.join(f'{name}: {kind}' for name, kind in launch.types)}; {settings})"


def judged(specimens: Specimens, found: Iterable[Variant]) -> dict[str, Any]:
    """Launches that no specimen stands for, and specimens that are no launch."""
    same = {launch: specimens.same(launch) for launch in found}
    labels = {label for listed in specimens.labels.values() for label, _ in listed}
    return {
        "launches": len(same),
        "specimens": len(labels),
        "unlike": sorted(shown(launch) for launch in same if not (same[launch] or specimens.like(launch))),
        "idle": sorted(labels - set().union(*same.values())),
    }


def strangers(launches: Launches, family: str) -> set[Variant]:
    """A tile, a number of stages, a type and a flag that no specimen has."""
    launches.begin(family)
    launches.have(1, parts=0)
    x, weight, seed = zeros(torch.bfloat16, M, K), zeros(torch.bfloat16, N, K), torch.zeros((), dtype=torch.int64)
    (P, e, Q), S = factors(32), zeros(torch.bfloat16, M, 32)
    tile = project.config(family, 2, 32, 1)
    for other in (tile._replace(BLOCK_M=16), tile._replace(num_stages=7)):
        project.launch_project(x, [Q], [S], None, 0.0, other)
    project.launch_project(x, [Q.half()], [S], None, 0.0, tile)
    forward = (x, weight, S, P, (e, e, 1.25), None, None)
    tile = gemm.config(family, 2, descriptors=False)
    gemm.launch_gemm_rank(*forward, seed, 0.3, tile, transposed=True, descriptors=False)
    return launches.found


def main() -> None:
    """Write {family: what :func:`judged` finds}, and of what must be found."""
    launches = Launches()
    specimens = {family: Specimens(family) for family in SHARED_MEMORY}
    found = {family: judged(listed, launches_of(launches, family)) for family, listed in specimens.items()}
    found["strange"] = judged(specimens["sm_90"], strangers(launches, "sm_90"))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
