"""Checks that come before a method is timed: what its start does to the outputs, its gradients and path samples in plain mathematics."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from .cases import MODELS, Case
from .methods import METHODS, Batch, Method
from .models import load_model, make_batch

# Of a gradient's norm, in units of the dtype's rounding: what sums over a few hundred terms, in another order, may differ by.
GRADIENT_BOUND = {torch.float32: 64, torch.bfloat16: 8, torch.float16: 8}
_CASE = Case("gradients", "tiny", rows=2, length=12, rank=8, target_rank=4)
_PATH_CASE = dataclasses.replace(_CASE, rows=8)  # of which two are sampled by default, each at an alpha of its own


def _change(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def check_start(name: str, method: Method, reference: Tensor, batch: Batch) -> float:
    """The largest change of a logit by a fresh adapter, relative to the largest logit.

    A method that starts as the base must change nothing; of one that does not (:attr:`Method.starts_as_base`) it is asked that its
    outputs are the base's with its adapters off, and others with them on.

    Args:
        reference: the base model's logits for ``batch``.

    Raises:
        RuntimeError: it is otherwise; timing it would compare different computations.
    """
    bound = method.start_bound * torch.finfo(reference.dtype).eps
    off = _change(method.logits(batch), reference)
    if not off <= bound:
        state = "" if method.starts_as_base else ", its adapters off,"
        raise RuntimeError(
            f"expected {name}{state} to leave the outputs of the base model as they are, got a relative change of {off:.2e}"
        )
    if method.starts_as_base:
        return off
    with torch.no_grad():
        on = _change(method.model(input_ids=batch["input_ids"]).logits, reference)
    if not on > 0:
        raise RuntimeError(f"expected the fresh adapters of {name} to change the outputs, got the base model's own")
    return on


def check_gradients(name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> float | None:
    """Compare the gradients of a method's adapters with those of plain mathematics in float64, on the tiny model.

    Every trained parameter is moved away from its start, where some gradients are 0. The method then runs a forward and a backward as it
    does in training, without regulariser and path; the reference computes each adapted layer's weight from the parameters
    (:meth:`Method.adapted`), runs the bare model on these weights in float64 and differentiates.

    Args:
        name: of :data:`METHODS`.
        device: where the method's kernels run.
        dtype: of the tiny model; the method's ``check_dtype`` by default.

    Returns:
        The largest error over all parameters, relative to the norm of the parameter's gradient; None for a method that trains nothing.

    Raises:
        RuntimeError: a gradient is missing or differs by more than rounding explains, or a trained parameter belongs to no layer.
    """
    tiny = _Tiny(name, device, dtype, _CASE)
    if not tiny.adapted:
        return None
    tiny.method.bare(tiny.batch)
    for layer in tiny.adapted:
        for part, parameter in layer.trained.items():
            if parameter.grad is None:
                raise RuntimeError(f"expected {name} to give {layer.name}.{part} a gradient, got none")
    found = [{part: p.grad for part, p in layer.trained.items()} for layer in tiny.adapted]
    return tiny.largest_error("gradient", found, tiny.exact([(slice(None), 1.0, 1.0)]))


def check_path(name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> float | None:
    """Compare what a micro-batch adds to the path accumulators with the gradients at the sampled points in float64, on the tiny model.

    Each is the gradient of a sequence's loss with respect to the parameters at ``W0 + alpha (W - W0)``, without the chain rule's factor
    alpha (ALGORITHMS 1). Arguments as for :func:`check_gradients`.

    Returns:
        The largest error over all parameters, relative to the norm of what was accumulated; None for a method without path rows.

    Raises:
        RuntimeError: an accumulator differs by more than rounding explains.
    """
    tiny = _Tiny(name, device, dtype, _PATH_CASE)
    sampled = tiny.method.sample(tiny.batch)
    if sampled is None:
        return None
    points = [(slice(row, row + 1), alpha, weight) for row, alpha, weight in sampled.points]
    return tiny.largest_error("path accumulator", sampled.accumulated, tiny.exact(points))


class Arithmetic:
    """:func:`check_gradients` and :func:`check_path`, each once for a method and a dtype: no case of a run changes what they find."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        checks = {"gradient_error": check_gradients, "path_error": check_path}
        self._checks = {
            what: functools.cache(functools.partial(check, device=device)) for what, check in checks.items()
        }

    def errors(self, name: str, dtypes: Iterable[torch.dtype]) -> dict[str, dict[str, float | None]]:
        """``{"gradient_error": {dtype: error}, "path_error": ...}``."""
        dtypes = sorted(dtypes, key=str)
        return {
            what: {str(dtype).removeprefix("torch."): check(name, dtype=dtype) for dtype in dtypes}
            for what, check in self._checks.items()
        }


class _Tiny:
    """A method on the tiny model, its parameters moved away from their start, and a batch.

    Raises:
        RuntimeError: a trained parameter belongs to no layer.
    """

    def __init__(self, name: str, device: torch.device | str, dtype: torch.dtype | None, case: Case) -> None:
        kind = METHODS[name]
        self.name, self.dtype = name, dtype or kind.check_dtype
        model = dataclasses.replace(MODELS["tiny"], dtype=str(self.dtype).removeprefix("torch."))
        self.base = load_model(model).to(device)
        torch.manual_seed(0)
        self.method = kind(copy.deepcopy(self.base), case)
        self.adapted = list(self.method.adapted())
        trained = [p for p in self.method.model.parameters() if p.requires_grad]
        known = {id(p) for layer in self.adapted for p in layer.trained.values()}
        if len(known) != len(trained) or any(id(p) not in known for p in trained):
            raise RuntimeError(
                f"expected {name}.adapted() to name each of its {len(trained)} trained parameters once, got {len(known)}"
            )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in trained:
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.05)
        self.batch = {key: value.to(device) for key, value in make_batch(self.base, case.rows, case.length).items()}

    def exact(self, points: list[tuple[slice, float, float]]) -> list[dict[str, Tensor]]:
        """Per layer the gradients of its parameters in float64, summed over points: which sequences, alpha and weight."""
        model = copy.deepcopy(self.base).double()
        bare = dict(model.named_parameters())
        leaves = [{k: p.detach().double().requires_grad_() for k, p in layer.trained.items()} for layer in self.adapted]
        whole = {
            f"{layer.name}.weight": layer.weight(bare[f"{layer.name}.weight"], values)
            for layer, values in zip(self.adapted, leaves, strict=True)
        }
        for rows, alpha, weight in points:
            at = {k: torch.lerp(bare[k], W.detach(), alpha).requires_grad_() for k, W in whole.items()}
            batch = {key: value[rows] for key, value in self.batch.items()}
            loss = torch.func.functional_call(model, at, kwargs=batch).loss
            gradients = torch.autograd.grad(weight * loss, list(at.values()))
            torch.autograd.backward(list(whole.values()), gradients, retain_graph=True)
        return [{part: leaf.grad for part, leaf in values.items()} for values in leaves]

    def largest_error(self, what: str, found: list[dict[str, Tensor]], exact: list[dict[str, Tensor]]) -> float:
        """Relative to the norm of what is exact.

        Raises:
            RuntimeError: one is larger than rounding explains.
        """
        worst = 0.0
        bound = GRADIENT_BOUND[self.dtype] * torch.finfo(self.dtype).eps
        for layer, ours, theirs in zip(self.adapted, found, exact, strict=True):
            for part, wanted in theirs.items():
                # One sum over a whole layer, whose terms may cancel: in 16 bits its relative error bounds nothing.
                if wanted.numel() == 1 and self.dtype != torch.float32:
                    continue
                error = ((ours[part].double() - wanted).norm() / wanted.norm()).item()
                if not error <= bound:
                    raise RuntimeError(
                        f"expected the {what} of {layer.name}.{part} by {self.name} within {bound:.1e} of its norm from the one in "
                        f"float64, got {error:.1e}"
                    )
                worst = max(worst, error)
        return worst
