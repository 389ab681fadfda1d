"""The kernels of svd_project, which read x once for all layers that share it: against float64, for groups of layers of any ranks."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from igulora.kernels import svd_linear
from igulora.kernels.backend import use_backend
from igulora.kernels.svd_project import svd_project

from .calls import CPU, DTYPES, LAYOUTS, Call, assert_close, placed, small_tiles  # noqa: F401
from .exactness import Guarded, compiled_anew, poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned")
small = pytest.mark.usefixtures("small_tiles")
OPS = torch.ops.igulora
# One layer, q/k/v and gate/up, layers without triplets, more layers than a launch serves, one that is wider than a launch of several may
# be, and layers none of which has a triplet.
RANKS = [[7], [12, 16], [33, 1, 20], [0, 7], [5, 0, 16], [1, 2, 3, 40], [130, 4], [0, 0], [0]]


def operands(
    ranks: list[int], rows: tuple[int, ...], k: int, dtype: torch.dtype, exact: bool, path: bool, seed: int = 0
) -> dict[str, Any]:
    """x, Qs, gradients of S, alpha and, with ``path``, weights and accumulators, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    count = torch.Size(rows).numel()
    t: dict[str, Any] = {
        "x": torch.randn(*rows, k, generator=g).to(dtype),
        "Qs": [torch.randn(r, k, generator=g) / k**0.5 for r in ranks],
        "Gs": [torch.randn(count, r, generator=g).to(dtype) for r in ranks],
        "alpha": torch.rand(rows[0], generator=g),
        "weight": torch.randn(rows[0], generator=g) if path else None,
        "path_Qs": [torch.randn(r, k, generator=g) for r in ranks] if path else None,
    }
    return torch.utils._pytree.tree_map(lambda v: v.double() if exact and v is not None else v, t)


def project(
    t: dict[str, Any], device: torch.device, p: float, train: int | None, path: int | None
) -> dict[str, Tensor]:
    """Every S, every dQ and every accumulator, by autograd."""
    x, alpha = placed(t["x"], device), placed(t["alpha"], device)
    Qs = [placed(Q, device).requires_grad_() for Q in t["Qs"]]
    guards = [Guarded(Q.flatten().to(device)) for Q in t["path_Qs"] or ()]
    accumulators = [guard.buffer.view(Q.shape) for guard, Q in zip(guards, Qs, strict=False)]
    Ss = svd_project(
        x,
        Qs,
        alpha,
        dropout_p=p,
        seed=torch.tensor(2**35 + 1, device=device),
        train_groups=train,
        path_start=path,
        path_weight=None if path is None else placed(t["weight"], device),
        path_Qs=None if path is None else accumulators,
    )
    grads = torch.autograd.grad(Ss, Qs, [placed(G, device) for G in t["Gs"]], allow_unused=True)
    for guard in guards:
        guard.assert_intact()
    results = {f"S{i}": S for i, S in enumerate(Ss)}
    results |= {f"dQ{i}": g for i, g in enumerate(grads) if g is not None}
    results |= {f"path{i}": a for i, a in enumerate(accumulators)}
    return {name: value.detach().cpu() for name, value in results.items()}


def assert_follows(
    ranks: list[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: tuple[int, ...] = (3, 7),
    k: int = 35,
    p: float = 0.0,
    train: int | None = None,
    path: int | None = None,
    layout: Any = None,
    seed: int = 0,
) -> None:
    results = []
    for where, exact in ((device, False), (CPU, False), (CPU, True)):
        t = operands(ranks, rows, k, dtype, exact, path is not None, seed)
        if layout is not None:
            t["x"], t["Gs"] = layout(t["x"]), [layout(G) for G in t["Gs"]]
        with use_backend("reference" if results else "triton"):
            results.append(project(t, where, p, train, path))
    assert_close(*results, torch.finfo(dtype).eps)


@small
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_any_rank(ranks: list[int], dtype: torch.dtype, device: torch.device) -> None:
    assert_follows(ranks, dtype, device)


@small
@pytest.mark.parametrize("ranks", [[33, 1, 20], [1, 2, 0, 3, 5]], ids=str)
@pytest.mark.parametrize(("train", "path"), [(3, 3), (0, 0), (5, 0), (4, 2), (2, 4)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_rows_go_where_they_belong(ranks: list[int], train: int, path: int, p: float, device: torch.device) -> None:
    assert_follows(ranks, torch.float32, device, rows=(5, 7), p=p, train=train, path=path)


# Eight blocks of 16 columns are the least a split gets.
@small
@pytest.mark.parametrize("ranks", [[7], [33, 1, 20], [1, 2, 3, 40]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_split_the_inner_dimension(ranks: list[int], dtype: torch.dtype, device: torch.device) -> None:
    assert_follows(ranks, dtype, device, k=135, p=0.3)


@pytest.mark.parametrize("ranks", [[7], [33, 1, 20], [100, 3], [200, 90]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_as_shipped(ranks: list[int], dtype: torch.dtype, device: torch.device) -> None:
    assert_follows(ranks, dtype, device, rows=(2, 35), k=140, train=1, path=1)


@small
@pytest.mark.parametrize("rows", [(0,), (1,), (3, 0), (17,)])
@pytest.mark.parametrize("path", [None, 0])
def test_few_rows_and_none(rows: tuple[int, ...], path: int | None, device: torch.device) -> None:
    if rows[0]:
        assert_follows([7, 0, 3], torch.float32, device, rows=rows, path=path)
    else:
        t = operands([7, 0, 3], rows, 35, torch.float32, False, False)
        Ss = svd_project(placed(t["x"], device), [placed(Q, device) for Q in t["Qs"]])
        assert [tuple(S.shape) for S in Ss] == [(0, 7), (0, 0), (0, 3)]


@small
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_any_layout(layout: Any, device: torch.device) -> None:
    assert_follows([7, 16], torch.float16, device, layout=layout)


@small
@given(
    ranks=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=2).map(tuple),
    k=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.3]),
    path=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(ranks, rows, k, dtype, p, path, seed, device) -> None:
    path = rows[0] // 2 if path else None
    assert_follows(ranks, dtype, device, rows=rows, k=k, p=p, train=rows[0], path=path, seed=seed)


@small
def test_same_bits(device: torch.device) -> None:
    t = operands([33, 1, 20], (5, 7), 135, torch.float16, False, True)
    one, two = (project(t, device, 0.3, 4, 2) for _ in range(2))
    for name in one:
        assert torch.equal(one[name], two[name]), name


@small
def test_layers_that_share_x_give_what_they_give_alone(device: torch.device) -> None:
    """Same S, same gradients; dx is the sum, the same whether S was given or not."""
    calls = [Call(r, n=n, dropout=0.3, seed=r) for r, n in ((7, 19), (33, 8), (0, 5), (16, 24))]
    ts = [{k: placed(v, device) for k, v in call.operands(torch.float32).items() if v is not None} for call in calls]
    seed, grads = torch.tensor(3, device=device), []
    for shared in (False, True):
        x = ts[0]["x"].clone().requires_grad_()
        Qs = [t["Q"].clone().requires_grad_() for t in ts]
        Ss = svd_project(x, Qs, dropout_p=0.3, seed=seed) if shared else [None] * len(ts)
        out = [
            svd_linear(x, t["weight"], t["bias"], t["P"], t["E"], Q, t["mask"], dropout_p=0.3, seed=seed, S=S)
            for t, Q, S in zip(ts, Qs, Ss, strict=True)
        ]
        grads.append(torch.autograd.grad(out, [x, *Qs], [t["dy"] for t in ts]))
    for alone, together in zip(*grads, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@small
def test_compiled_training_adds_to_the_accumulators(device: torch.device) -> None:
    """The compiler takes the operators of a shared input, forward and backward, without a break."""
    ts = [Call(r, lead=(4, 5), n=8, alpha="groups", path=2, seed=r).operands(torch.float32) for r in (7, 16)]
    ts = [{k: placed(v, device) for k, v in t.items()} for t in ts]
    alpha, weight = ts[0]["alpha"], ts[0]["path_weight"]
    rows = {"train_groups": 3, "path_start": 2, "path_weight": weight}

    def forward(x: Tensor, Qs: list[Tensor], paths: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        Ss = svd_project(x, Qs, alpha, **rows, path_Qs=[path[2] for path in paths])
        out = 0.0
        for t, Q, S, path in zip(ts, Qs, Ss, paths, strict=True):
            operands = (t["weight"], t["bias"], t["P"], t["E"], Q, t["mask"], alpha)
            out = out + svd_linear(x, *operands, S=S, **rows, path=path)
        return out

    results = []
    for run in (forward, torch.compile(forward, fullgraph=True, backend="aot_eager")):
        x, *Qs = (v.clone().requires_grad_() for v in (ts[0]["x"], *(t["Q"] for t in ts)))
        paths = [tuple(t[f"path_{name}"].clone() for name in ("P", "E", "Q")) for t in ts]
        y = run(x, Qs, paths)
        y.backward(ts[0]["dy"])
        results.append([y, x.grad, *(Q.grad for Q in Qs), *(a for path in paths for a in path)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@small
@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.long  # a whole model goes through Inductor in integration/test_compile.py
@pytest.mark.parametrize("sampled", [False, True])
def test_inductor_takes_both_operators(device: torch.device, sampled: bool) -> None:
    """With accumulators to change, and without: Inductor then fails on an operator that has a single result."""
    if device.type == "cpu" and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    t = operands([3, 5], (4, 3), 6, torch.float32, False, True)
    x, alpha = t["x"].to(device), t["alpha"].to(device)
    rows = {"train_groups": 3, "path_weight": t["weight"].to(device)} if sampled else {}

    def forward(Qs: list[Tensor], paths: list[Tensor] | None) -> Tensor:
        return torch.cat(svd_project(x, Qs, alpha, **rows, path_Qs=paths), dim=1)

    results = []
    for run in (forward, torch.compile(forward, fullgraph=True)):
        Qs = [Q.to(device, copy=True).requires_grad_() for Q in t["Qs"]]
        paths = [Q.to(device, copy=True) for Q in t["path_Qs"]]
        S = run(Qs, paths if sampled else None)
        S.backward(torch.cat(t["Gs"], dim=1).to(device))
        results.append([S.detach(), *(Q.grad for Q in Qs), *paths])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@small
@pytest.mark.parametrize("ranks", [[3, 0, 5, 2], [0]], ids=str)
def test_opcheck(ranks: list[int], device: torch.device) -> None:
    t = operands(ranks, (4, 3), 6, torch.float16, False, True)
    x, seed = t["x"].to(device), torch.tensor(5, device=device)
    Qs, Gs, path_Qs = ([v.to(device) for v in t[name]] for name in ("Qs", "Gs", "path_Qs"))
    alpha, weight = t["alpha"].to(device), t["weight"].to(device)
    torch.library.opcheck(OPS.svd_project_fwd.default, (x, Qs, seed, 0.3, alpha, weight, path_Qs, 3, 2))
    for needed in (True, False):
        torch.library.opcheck(OPS.svd_project_bwd.default, (Gs, x, Qs, alpha, weight, path_Qs, seed, 0.3, 3, 2, needed))
    torch.library.opcheck(OPS.svd_project_bwd.default, (Gs, x, Qs, None, None, [], None, 0.0, 1, 1, True))
