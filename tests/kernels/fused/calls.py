"""Calls of svd_linear that several test files share: operands, a run forward and backward, and the comparison with float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from igulora.kernels import svd_linear
from igulora.kernels.backend import use_backend
from igulora.kernels.fused import dq_pass, dy_pass, project, rank_term
from igulora.kernels.fused.choice import Product
from igulora.kernels.fused.common import Tile
from igulora.kernels.svd_project import svd_project

from .exactness import Guarded

SMALL = Tile(16, 16, 16, 2, num_stages=2)
# Every form of the base product; those that are kernels with small tiles.
FORMS = {
    "library": Product("library"),
    "pointers": Product("pointers", SMALL),
    "descriptors": Product("descriptors", SMALL),
    "augmented": Product("augmented"),
}
# The interpreter computes products of bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
MASTERS = ("P", "E", "Q")
CPU = torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 in every kernel: few rows and columns then make several blocks, of which the last ones are cut."""
    for module in (project, dy_pass, dq_pass, rank_term):
        monkeypatch.setattr(module, "config", lambda *args, **kwargs: SMALL)


@dataclass(frozen=True)
class Call:
    """One call of svd_linear, forward and backward.

    The default sizes are odd and no multiple of a tile; with tiles of 16 they make two blocks of rows, three of in_features and two of
    out_features, so that every reduction runs over several blocks and those over rows are split.

    Attributes:
        r, lead, k, n: rank, leading shape of x, in_features, out_features.
        alpha: None, one number, or "groups" for a value of each first index of x.
        mask: "on", "off" or "partial".
        train, path: numbers of training groups and of the first path group; no path rows where ``path`` is None.
        shared: S comes from svd_project.
        layouts: operand -> a function that stores it in another way, its shape unchanged.
        squared: every operand is squared, and the scale.
        blocks: of a block-diagonal adapter, ``r`` triplets together; divides r, k and n.
    """

    r: int = 7
    lead: tuple[int, ...] = (3, 7)
    k: int = 35
    n: int = 19
    bias: bool = True
    alpha: float | str | None = None
    mask: str = "partial"
    dropout: float = 0.0
    train: int | None = None
    path: int | None = None
    shared: bool = False
    layouts: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = ()
    seed: int = 0
    squared: bool = False
    blocks: int = 1

    @property
    def scale(self) -> float:
        """``lora_alpha / r_init``."""
        return 1.25**2 if self.squared else 1.25

    def operands(self, dtype: torch.dtype, *, exact: bool = False) -> dict[str, Tensor | None]:
        """On the CPU: x, weight, bias, dy of ``dtype``, masters, path weights and accumulators of float32; ``exact``: all as float64."""
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        masks = {"on": torch.ones(self.r), "off": torch.zeros(self.r)}
        groups = self.lead[0] if self.lead else 1
        alpha = torch.rand(groups, generator=g)
        t: dict[str, Tensor | None] = {
            "x": draw(*self.lead, self.k).to(dtype),
            "weight": (draw(self.n, self.k) / self.k**0.5).to(dtype),
            "bias": draw(self.n).to(dtype) if self.bias else None,
            "P": draw(self.r, self.n // self.blocks) / self.n**0.5,
            "E": draw(self.r),
            "Q": draw(self.r, self.k // self.blocks) / self.k**0.5,
            "mask": masks.get(self.mask, (torch.arange(self.r) % 3 != 1).float()),
            "alpha": torch.tensor(self.alpha) if isinstance(self.alpha, float) else alpha if self.alpha else None,
            "dy": draw(*self.lead, self.n).to(dtype),
        }
        if self.path is not None:
            # Accumulators hold what earlier micro-batches left there, of the size of what is added.
            t |= {"path_weight": draw(groups)} | {f"path_{name}": draw(*t[name].shape) for name in MASTERS}  # type: ignore[union-attr]
        stored = dict(self.layouts)
        for name, value in t.items():
            if value is not None:
                value = value.double() if exact else value
                value = value.square() if self.squared else value
                t[name] = stored[name](value) if name in stored else value
        return t


def whole_storage(t: Tensor) -> Tensor:
    """All that ``t`` is a view of, as a vector."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def placed(t: Tensor, device: torch.device) -> Tensor:
    """A detached copy on a device, stored as ``t`` is."""
    whole = whole_storage(t).clone().to(device)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def run(call: Call, dtype: torch.dtype, device: torch.device, *, exact: bool = False) -> dict[str, Tensor]:
    """y, the gradients of all operands that get one, and the accumulators, which lie between canaries."""
    t = {k: None if v is None else placed(v, device) for k, v in call.operands(dtype, exact=exact).items()}
    wanted = [name for name in ("x", "weight", "bias", *MASTERS) if t[name] is not None]
    for name in wanted:
        t[name].requires_grad_()
    seed = torch.tensor(2**40 + 77, device=device) if call.dropout else None
    options: dict[str, Any] = {"dropout_p": call.dropout, "seed": seed, "train_groups": call.train}
    guards, path = {}, None
    if call.path is not None:
        guards = {name: Guarded(t[f"path_{name}"].flatten()) for name in MASTERS}
        path = tuple(guard.buffer.view(t[name].shape) for name, guard in guards.items())
        options |= {"path_start": call.path, "path_weight": t["path_weight"]}
    if call.shared:
        S = svd_project(t["x"], [t["Q"]], t["alpha"], **options, path_Qs=None if path is None else [path[2]])[0]
        options["S"] = S
    operands = [t[name] for name in ("x", "weight", "bias", *MASTERS, "mask", "alpha")]
    y = svd_linear(*operands, scale=call.scale, **options, path=path)
    # A pure path pass leaves the parameters without a gradient.
    grads = torch.autograd.grad(y, [t[name] for name in wanted], t["dy"], allow_unused=True)
    results = {"y": y, **{name: g for name, g in zip(wanted, grads, strict=True) if g is not None}}
    for name, guard in guards.items():
        guard.assert_intact()
        results[f"path_{name}"] = guard.buffer.view(t[name].shape)
    return {name: v.detach().cpu() for name, v in results.items()}


def assert_close(
    ours: dict[str, Tensor],
    same_dtype: dict[str, Tensor],
    exact: dict[str, Tensor],
    eps: float,
    terms: dict[str, Tensor] | None = None,
) -> None:
    """STYLE 17 for every result: at most twice the error of PyTorch in the same dtype, plus a few roundings of float32 or half one of
    16 bits; four times that where a result is a few numbers, of which PyTorch's may be right by luck.

    Roundings are those of the terms that a result sums, so they are as large as :func:`terms_of` says, also where the terms cancel: a
    single number may be a tenth of that, which says nothing about its error. Measured over many numbers, PyTorch's errors have a root mean
    square of about half an eps of that size; a term that is missing or wrong weighs far more.

    Args:
        eps: of the compute dtype. terms: of :func:`terms_of`.
    """
    assert ours.keys() == same_dtype.keys() == exact.keys()
    floor = 4 * eps if eps < 1e-6 else eps / 4
    for name, wanted in exact.items():
        assert ours[name].shape == wanted.shape, name
        assert ours[name].dtype == same_dtype[name].dtype, name
        if not wanted.numel():
            continue
        worst, theirs = ((values[name].double() - wanted).abs().max() for values in (ours, same_dtype))
        size = wanted.abs().max() if terms is None else torch.maximum(wanted.abs(), terms[name]).max()
        bound = 2 * theirs + floor * (1 if wanted.numel() > 16 else 4) * size
        assert worst <= bound, f"{name}: expected an error of at most {float(bound):.3g}, got {float(worst):.3g}"


def terms_of(call: Call, run: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    """The root of the sum of squares of the terms of every result, but for dropout's factor: each is a sum of products of operands, so that
    squared operands give the sum of squares."""
    with use_backend("reference"):
        squares = run(replace(call, squared=True), torch.float32, CPU, exact=True)
    return {name: value.sqrt() for name, value in squares.items()}


def assert_follows(call: Call, dtype: torch.dtype, device: torch.device) -> None:
    """The kernels give what the reference gives in float64."""
    ours = run(call, dtype, device)
    with use_backend("reference"):
        same_dtype, exact = run(call, dtype, CPU), run(call, dtype, CPU, exact=True)
    assert_close(ours, same_dtype, exact, torch.finfo(dtype).eps, terms_of(call, run))


# -- how operands may be stored ---------------------------------------------------------------------------------------


def transposed(t: Tensor) -> Tensor:
    """Neighbours in memory are neighbours of the first dimension, not of the last."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def swapped(t: Tensor) -> Tensor:
    """(batch, length) kept as (length, batch)."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def expanded(t: Tensor) -> Tensor:
    """Stride 0 in the first dimension."""
    return t[:1].clone().expand(t.shape)


def every_other(t: Tensor) -> Tensor:
    """Every other column of a wider tensor."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
    wide[..., ::2] = t
    return wide[..., ::2]


def wide_rows(t: Tensor) -> Tensor:
    """Rows of a wider tensor, as those of a joint q/k/v projection; what lies between them counts for nothing."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), torch.nan)
    wide[..., 3:-2] = t
    return wide[..., 3:-2]


def misaligned(t: Tensor) -> Tensor:
    """Contiguous, but from an address on that is no multiple of 16."""
    whole = t.new_full((t.numel() + 1,), torch.nan)
    whole[1:] = t.flatten()
    return whole[1:].view(t.shape)


LAYOUTS = (transposed, swapped, expanded, every_other, wide_rows, misaligned)
# The kernels read these where they lie; tensor descriptors cannot, which is why they are never chosen then.
IN_PLACE = (wide_rows, misaligned)
