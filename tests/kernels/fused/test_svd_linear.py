"""The kernels of svd_linear against float64: every form of the base product, ranks, masks, alphas, shapes and layouts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from igulora.kernels import svd_linear
from igulora.kernels.backend import use_backend
from igulora.kernels.fused.choice import use_product

from .calls import (
    CPU,
    DTYPES,
    FORMS,
    IN_PLACE,
    LAYOUTS,
    Call,
    assert_close,
    assert_follows,
    every_other,
    expanded,
    misaligned,
    placed,
    run,
    small_tiles,  # noqa: F401
    swapped,
    transposed,
    whole_storage,
)
from .exactness import poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned")
small = pytest.mark.usefixtures("small_tiles")
OPS = torch.ops.igulora
RESULTS = ("x", "weight", "bias", "P", "E", "Q", "S")


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


# Ranks of STYLE 12: none, one, odd, below 16, 16, above 32; and one of more than one block of triplets. Odd sizes, and sizes that tensor
# descriptors can describe (rows of whole 16 bytes), yet no multiples of a tile.
@small
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [0, 1, 7, 12, 16, 33, 70])
@pytest.mark.parametrize(
    ("form", "k", "n"),
    [
        ("library", 35, 19),
        ("pointers", 35, 19),
        ("descriptors", 40, 24),
        ("augmented", 35, 19),
    ],
)
def test_every_form_at_any_rank(form: str, k: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
    with use_product(FORMS[form]):
        assert_follows(Call(r, k=k, n=n, alpha="groups"), dtype, device)


@small
@pytest.mark.parametrize(
    ("mask", "alpha"),
    [
        *itertools.product(["on", "off", "partial"], [None, "groups"]),
        *itertools.product(["partial"], [0.0, 0.4, 1.0]),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_masks_and_alphas(mask: str, alpha: float | str | None, form: str, device: torch.device) -> None:
    with use_product(FORMS[form]):
        assert_follows(Call(12, k=36, n=20, mask=mask, alpha=alpha), torch.float32, device)


# Leading shapes: a vector, nothing at all in a dimension, one row, a row more than a block, five dimensions.
@small
@pytest.mark.parametrize("lead", [(), (0,), (1,), (17,), (2, 0, 3), (2, 1, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["library", "pointers"])
def test_leading_shapes(lead: tuple[int, ...], bias: bool, form: str, device: torch.device) -> None:
    with use_product(FORMS[form]):
        assert_follows(Call(lead=lead, bias=bias), torch.float32, device)
        assert_follows(Call(0, lead, bias=bias), torch.float32, device)


# A block of in_features is 16 wide, eight blocks are the least a split gets: two splits, the second of one block, cut; three of them.
@small
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lead", "k"), [((3, 7), 135), ((5,), 301)])
def test_few_rows_split_the_inner_dimension(
    lead: tuple[int, ...], k: int, dtype: torch.dtype, device: torch.device
) -> None:
    assert_follows(Call(lead=lead, k=k, dropout=0.3), dtype, device)


# Tiles as shipped, sizes just above them; every bucket of ranks has tiles of its own.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [7, 33, 100, 256])
def test_tiles_as_shipped(r: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_follows(Call(r, (3, 23), 131, 137, alpha="groups", train=2, path=1), dtype, device)


@small
@pytest.mark.parametrize(
    ("form", "layout"),
    [
        *itertools.product(["library", "pointers"], LAYOUTS),
        *(("descriptors", layout) for layout in LAYOUTS if layout not in IN_PLACE),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("which", ["x", "dy"])
def test_input_and_gradient_of_any_layout(
    form: str, layout: Callable[[Tensor], Tensor], which: str, device: torch.device
) -> None:
    with use_product(FORMS[form]):
        assert_follows(Call(k=40, n=24, alpha="groups", layouts=((which, layout),)), torch.float16, device)


@small
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(
            (name, layout)
            for name in ("weight", "P", "Q")
            for layout in (transposed, every_other, misaligned, expanded)
        ),
        *((name, layout) for name in ("bias", "E", "mask") for layout in (every_other, misaligned, expanded)),
        *((name, layout) for name in ("alpha", "path_weight") for layout in (every_other, misaligned, expanded)),
    ],
    ids=name_of,
)
def test_operands_of_any_layout(name: str, layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    call = Call(k=36, n=20, lead=(3, 6), alpha="groups", train=2, path=1, layouts=((name, layout),))
    with use_product(FORMS["library" if layout is misaligned else "pointers"]):
        assert_follows(call, torch.float32, device)


@small
def test_accumulators_of_any_layout(device: torch.device) -> None:
    """Views with gaps are added to as well, and only they."""
    call = Call(lead=(3, 6), alpha="groups", train=2, path=1)
    expected = run(call, torch.float32, device)
    t = {k: placed(v, device) for k, v in call.operands(torch.float32).items()}
    path = {name: placed(every_other(t[f"path_{name}"]), device) for name in ("P", "E", "Q")}
    x = t["x"].requires_grad_()
    y = svd_linear(
        *(t[k] for k in ("x", "weight", "bias", "P", "E", "Q", "mask", "alpha")),
        scale=1.25,
        train_groups=2,
        path_start=1,
        path_weight=t["path_weight"],
        path=tuple(path.values()),
    )
    torch.autograd.grad(y, x, t["dy"])
    for name, accumulator in path.items():
        assert torch.equal(accumulator.cpu(), expected[f"path_{name}"]), name
        assert whole_storage(accumulator)[1::2].isnan().all()


# Every seventeenth of the 512 combinations of results wanted (the last of them says that S was given), with and without weight and path.
@small
@pytest.mark.parametrize(
    ("needs", "weight", "path"),
    [(list(c[:7]), *c[7:]) for c in itertools.product([False, True], repeat=9)][1::17],
    ids=lambda v: "".join(map(str, map(int, v))) if isinstance(v, list) else str(v),
)
def test_only_what_is_needed(needs: list[bool], weight: bool, path: bool, device: torch.device) -> None:
    call = Call(lead=(3, 6), alpha="groups", train=2, path=1)
    needs = [*needs[:5], needs[5] and not needs[6], needs[6]]

    def backward(where: torch.device, exact: bool) -> dict[str, Tensor]:
        t = {k: placed(v, where) for k, v in call.operands(torch.float32, exact=exact).items()}
        S = t["x"].reshape(18, -1) @ t["Q"].t()
        rest = [t[k] for k in ("P", "E", "Q", "mask", "alpha")]
        rest += [t[k] if path else None for k in ("path_weight", "path_P", "path_E", "path_Q")]
        seed, groups = torch.tensor(9, device=where), (2, 1 if path else 3)
        grads = OPS.svd_linear_bwd(
            t["dy"], S, t["x"], t["weight"] if weight else None, *rest, seed, 1.25, 0.3, *groups, needs
        )
        for grad, need in zip(grads, needs, strict=True):
            assert grad.numel() == 0 or need
        storages = [g.untyped_storage()._cdata for g in grads]
        assert len(set(storages)) == len(storages)  # an operator may not return one storage twice
        results = {k: g.cpu() for k, g, need in zip(RESULTS, grads, needs, strict=True) if need}
        return results | {f"path_{k}": t[f"path_{k}"].cpu() for k in ("P", "E", "Q")}

    ours = backward(device, False)
    with use_backend("reference"):
        assert_close(ours, backward(CPU, False), backward(CPU, True), torch.finfo(torch.float32).eps)


@small
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_same_bits(form: str, dtype: torch.dtype, device: torch.device) -> None:
    call = Call(k=40, n=24, alpha="groups", train=2, path=1, dropout=0.0 if form == "augmented" else 0.3)
    with use_product(FORMS[form]):
        one, two = (run(call, dtype, device) for _ in range(2))
    for name in one:
        assert torch.equal(one[name], two[name]), name


@small
def test_inputs_are_not_changed(device: torch.device) -> None:
    call = Call(alpha="groups", dropout=0.3, layouts=(("x", swapped),))
    t = {k: placed(v, device) for k, v in call.operands(torch.float32).items()}
    before = {k: v.clone() for k, v in t.items()}
    for name in ("x", "weight", "bias", "P", "E", "Q"):
        t[name].requires_grad_()
    y = svd_linear(
        *(t[k] for k in ("x", "weight", "bias", "P", "E", "Q", "mask", "alpha")),
        dropout_p=0.3,
        seed=torch.tensor(5, device=device),
    )
    y.backward(t["dy"])
    for name, value in before.items():
        assert torch.equal(t[name], value), name


@small
@given(
    r=st.integers(0, 40),
    lead=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    alpha=st.sampled_from([None, 0.3, "groups"]),
    mask=st.sampled_from(["on", "off", "partial"]),
    dropout=st.sampled_from([0.0, 0.3]),
    bias=st.booleans(),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(["library", "pointers"]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(r, lead, k, n, alpha, mask, dropout, bias, shared, dtype, form, seed, device) -> None:
    with use_product(FORMS[form]):
        assert_follows(Call(r, lead, k, n, bias, alpha, mask, dropout, shared=shared, seed=seed), dtype, device)


# -- operator checks --------------------------------------------------------------------------------------------------


@small
@pytest.mark.parametrize(
    ("r", "dtype", "p", "path", "form"),
    [
        (3, torch.float16, 0.0, None, "library"),
        (3, torch.float32, 0.3, 2, "pointers"),
        (0, torch.float32, 0.3, 2, "library"),
    ],
    ids=str,
)
def test_opcheck(r: int, dtype: torch.dtype, p: float, path: int | None, form: str, device: torch.device) -> None:
    call = Call(r, (4, 3), 6, 5, alpha="groups", path=path)
    t = {k: placed(v, device) for k, v in call.operands(dtype).items()}
    for name in ("x", "weight", "bias", "P", "E", "Q"):
        t[name].requires_grad_()
    path_rows = [t.get(f"path_{k}") for k in ("weight", "P", "E", "Q")]
    rest = (*path_rows, torch.tensor(5, device=device) if p else None, 1.5, p, 3, 4 if path is None else path)
    first = [t[k] for k in ("x", "weight", "bias", "P", "E", "Q", "mask", "alpha")]
    with use_product(FORMS[form]):
        torch.library.opcheck(OPS.svd_linear_fwd.default, (*first, None, *rest))
        with torch.no_grad():
            S = OPS.svd_linear_fwd(*first, None, *rest)[1]
        torch.library.opcheck(OPS.svd_linear_fwd.default, (*first, S, *rest))
        x, weight, _, *others = (v.detach() for v in first)
        for needs in ([True] * 6 + [False], [True, False, True, False, True, False, True]):
            torch.library.opcheck(OPS.svd_linear_bwd.default, (t["dy"], S, x, weight, *others, *rest, needs))


@small
def test_compiles_without_a_break(device: torch.device) -> None:
    call = Call(alpha="groups")
    t = {k: placed(v, device) for k, v in call.operands(torch.float32).items()}
    rest = [t[k] for k in ("weight", "bias", "P", "E", "Q", "mask", "alpha")]
    compiled = torch.compile(lambda x: svd_linear(x, *rest), fullgraph=True, backend="aot_eager")
    one, two = t["x"].clone().requires_grad_(), t["x"].clone().requires_grad_()
    y, z = compiled(one), svd_linear(two, *rest)
    assert torch.equal(y, z)
    assert torch.equal(*(torch.autograd.grad(out, x, t["dy"])[0] for out, x in ((y, one), (z, two))))
