"""Run as a program: which specialisations of the svd_linear kernels Triton would compile, scenario by scenario, as JSON.

Triton's interpreter compiles nothing, so this runs in a process without it. Launches are taken from the launchers and their keys from
Triton's own binder, which asks each argument for its type, for divisibility by 16 and for being 1; nothing is compiled or run, results
are whatever memory holds. A launch that finds its kernel by our own key must have found that of Triton's key.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from igulora.kernels.fused import dq_pass, dy_pass, gemm, launch, project, rank_term, sums, svd_linear
from igulora.kernels.fused.choice import Product, use_product
from igulora.kernels.fused.common import Tile

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
_keys: set[str] = set()
_current = ""


def _key(kernel: JITFunction, *args: Any, **kwargs: Any) -> str:
    """The kernel's name and what it would be specialised for."""
    binder = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    _, specialisation, options = binder(*args, **kwargs)
    names = [parameter.name for parameter in kernel.params]
    found = {name: str(value) for name, value in zip(names, specialisation, strict=True)}
    return json.dumps([kernel.fn.__name__, {**found, "options": str(sorted(options.items()))}])


class Compiled:
    """What Triton would have compiled for the launch that is under way."""

    function = packed_metadata = None
    n_spills = 0

    def __init__(self) -> None:
        self.key = _current

    def run(self, *_: Any) -> None:
        """In place of a launch by our own key."""
        if self.key != _current:
            raise AssertionError(f"expected a launch of\n{_current}\ngot one of\n{self.key}")


def watched(plan: launch.Plan, *pointers: Any) -> None:
    """A launch, its key noted."""
    global _current
    _current = _key(plan.kernel, *pointers, *plan.numbers, **plan.constants)
    _keys.add(_current)
    launch.launch(plan, *pointers)


def at(offset: int, *shape: int) -> Tensor:
    """Zeros that start ``offset`` elements behind a 16-byte boundary, as parts of a flat buffer do."""
    numel = torch.Size(shape).numel()
    return torch.zeros(numel + offset)[offset:].view(shape)


def layer(
    M: int = 48,
    R: int = 20,
    K: int = 64,
    N: int = 96,
    *,
    form: str = "pointers",
    alpha: float | None = 0.5,
    groups: int = 1,
    mixed: bool = False,
    dropout: float = 0.0,
    sharing: int = 1,
    offset: int = 0,
    passes: int = 1,
) -> None:
    """Forward and backward of ``sharing`` layers on one x. ``offset`` is that of vectors in their buffers, ``passes`` those over dy."""
    dy_pass.PARTS_LIMIT = 2**40 if passes == 1 else 0
    x, weight = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(N, K, dtype=torch.bfloat16)
    factors = (torch.zeros(R, N), at(offset, R), torch.zeros(R, K), at(offset, R))
    Qs = [factors[2]] * sharing
    alphas = None if alpha is None else at(offset, groups).fill_(alpha)
    path_weight, path = (None, (None, None, None))
    if mixed:
        path_weight, path = at(offset, groups), (torch.zeros(R, N), at(offset, R), torch.zeros(R, K))
    seed = torch.zeros((), dtype=torch.int64) if dropout else None
    train, start = (groups - 1, groups - 1) if mixed else (groups, groups)
    rest = (seed, 1.25, dropout)
    tile = Tile(64, 64, 32, 8)
    with use_product(Product(form, tile)):
        S = svd_linear.project(x, Qs, seed, dropout)[0] if sharing > 1 else None
        _, saved = svd_linear.forward(x, weight, None, *factors, alphas, S, *rest)
        needs = [True, False, False, True, True, sharing == 1, sharing > 1]
        S = saved if S is None else S
        dy = torch.zeros(M, N, dtype=torch.bfloat16)
        G = svd_linear.backward(dy, S, x, weight, *factors, alphas, path_weight, *path, *rest, train, start, needs)[6]
        if sharing > 1:
            path_Qs = [path[2]] * sharing if mixed else []
            svd_linear.project_backward(
                [G] * sharing, x, Qs, alphas, path_weight, path_Qs, seed, dropout, train, start, True
            )


def keys_of(run: Callable[[], None]) -> list[str]:
    """The keys of the launches in one scenario."""
    _keys.clear()
    run()
    return sorted(_keys)


def over(name: str, values: Any, **fixed: Any) -> dict[str, list[str]]:
    """The keys for each value of one argument of :func:`layer`."""
    return {str(value): keys_of(lambda value=value: layer(**{name: value, **fixed})) for value in values}


BUCKETS = {
    "1-16": range(1, 17),
    "17-32": range(17, 33),
    "33-64": (33, 40, 48, 63, 64),
    "65-128": (65, 100, 128),
    "129-256": (129, 200, 256),
}
TOKENS = (1, 2, 15, 16, 17, 48, 64, 100)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "library": {"form": "library"},
    "descriptors": {"form": "descriptors"},
    "mixed": {"mixed": True, "groups": 4, "M": 48},
    "shared": {"sharing": 3},
    "dropout": {"dropout": 0.3},
    "two passes": {"passes": 2},
}


def main() -> None:
    """Write {question: {value: [key, ...]}}."""
    JITFunction.run = lambda *_args, **_options: Compiled()
    torch.cuda.current_device = torch._C._cuda_getCurrentRawStream = lambda *_: 0
    for module in (dq_pass, dy_pass, gemm, project, rank_term, sums):
        module.launch = watched
    found = {}
    for kind, options in KINDS.items():
        for bucket, ranks in BUCKETS.items():
            found[f"ranks {bucket}, {kind}"] = over("R", ranks, **options)
        tokens = [m * options.get("groups", 1) for m in TOKENS]
        found[f"tokens, {kind}"] = over("M", tokens, **{k: v for k, v in options.items() if k != "M"})
        found[f"alphas, {kind}"] = over("alpha", (0.0, 0.5, 1.0), **options)
        found[f"offsets, {kind}"] = over("offset", range(5), **options)
    found["split, tokens"] = over("M", (1, 17, 100, 300, 1000), K=2048)
    found["sequences"] = over("groups", (1, 2, 3, 16), mixed=False)
    found["sequences of a mixed batch"] = over("groups", (2, 3, 16), mixed=True)
    found["dropouts"] = over("dropout", (0.1, 0.3))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
