"""The rank-r update of a base's own output by the kernels, against float64: values, gradients, accumulators, in place and out of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from igulora.kernels import svd_project, svd_update
from igulora.kernels.backend import use_backend

from .calls import CPU, DTYPES, MASTERS, Call, assert_close, every_other, placed, small_tiles, terms_of  # noqa: F401
from .exactness import poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned", "small_tiles")
OPS = torch.ops.igulora


def updated(call: Call, dtype: torch.dtype, device: torch.device, *, exact: bool = False) -> dict[str, Tensor]:
    """The update of a base that is a product in PyTorch, and the gradients of all but its weight."""
    t = {k: None if v is None else placed(v, device) for k, v in call.operands(dtype, exact=exact).items()}
    leaves = {name: t[name].requires_grad_() for name in ("x", *MASTERS)}
    seed = torch.tensor(2**40 + 77, device=device) if call.dropout else None
    options: dict[str, Any] = {"dropout_p": call.dropout, "seed": seed, "train_groups": call.train}
    path = None
    if call.path is not None:
        path = tuple(t[f"path_{name}"] for name in MASTERS)
        options |= {"path_start": call.path, "path_weight": t["path_weight"]}
    if call.shared:
        path_Qs = None if path is None else [path[2]]
        options["S"] = svd_project(t["x"], [t["Q"]], t["alpha"], **options, path_Qs=path_Qs)[0]
    base = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    operands = [t[k] for k in (*MASTERS, "mask", "alpha")]
    y = svd_update(base, t["x"], *operands, scale=call.scale, **options, path=path)
    grads = torch.autograd.grad(y, list(leaves.values()), t["dy"])
    results = {"y": y, **dict(zip(leaves, grads, strict=True))}
    results |= {f"path_{name}": t[f"path_{name}"] for name in MASTERS} if path else {}
    return {name: v.detach().cpu() for name, v in results.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [0, 1, 7, 33, 70])
@pytest.mark.parametrize(("path", "dropout", "shared"), [(None, 0.0, False), (1, 0.3, False), (2, 0.3, True)])
def test_follows_the_reference(
    r: int, path: int | None, dropout: float, shared: bool, dtype: torch.dtype, device: torch.device
) -> None:
    train = None if path is None else 2
    call = Call(r, alpha="groups", train=train, path=path, dropout=dropout, shared=shared)
    ours = updated(call, dtype, device)
    with use_backend("reference"):
        same_dtype, exact = updated(call, dtype, CPU), updated(call, dtype, CPU, exact=True)
    assert_close(ours, same_dtype, exact, torch.finfo(dtype).eps, terms_of(call, updated))


def test_in_place_where_it_can_be(device: torch.device) -> None:
    t = {k: placed(v, device) for k, v in Call(alpha="groups").operands(torch.float32).items()}
    operands = [t["x"], *(t[k] for k in (*MASTERS, "mask", "alpha"))]
    base, strided = t["dy"].clone(), every_other(t["dy"])
    expected = svd_update(base.clone(), *operands)
    assert svd_update(base, *operands) is base
    assert torch.equal(base, expected)
    before = strided.clone()
    assert torch.equal(svd_update(strided, *operands), expected)
    assert torch.equal(strided, before)


@pytest.mark.parametrize("r", [0, 3])
def test_opcheck(r: int, device: torch.device) -> None:
    t = {k: placed(v, device) for k, v in Call(r, (4, 3), 6, 5, alpha="groups").operands(torch.float16).items()}
    rest = (t["x"], *(t[k] for k in (*MASTERS, "mask", "alpha")), None)
    seed = torch.tensor(5, device=device)
    torch.library.opcheck(OPS.svd_update.default, (t["dy"], *rest, *[None] * 4, seed, 1.5, 0.3, 4, 4))
    torch.library.opcheck(OPS.svd_update_.default, (t["dy"], *rest, seed, 1.5, 0.3))
