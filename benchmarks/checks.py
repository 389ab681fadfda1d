"""Checks that come before a method is timed: what its start does to the outputs, and its gradients against plain mathematics."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from .cases import MODELS, Case
from .methods import METHODS, Adapted, Batch, Method
from .models import load_model, make_batch

# Of a gradient's norm, in units of the dtype's rounding: what sums over a few hundred terms, in another order, may differ by.
GRADIENT_BOUND = {torch.float32: 64, torch.bfloat16: 8, torch.float16: 8}
_CASE = Case("gradients", "tiny", rows=2, length=12, rank=8, target_rank=4)


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
    kind = METHODS[name]
    dtype = dtype or kind.check_dtype
    model = dataclasses.replace(MODELS["tiny"], dtype=str(dtype).removeprefix("torch."))
    base = load_model(model).to(device)
    torch.manual_seed(0)
    method = kind(copy.deepcopy(base), _CASE)
    trained = [p for p in method.model.parameters() if p.requires_grad]
    adapted = list(method.adapted())
    known = {id(p) for layer in adapted for p in layer.trained.values()}
    if len(known) != len(trained) or any(id(p) not in known for p in trained):
        raise RuntimeError(
            f"expected {name}.adapted() to name each of its {len(trained)} trained parameters once, got {len(known)}"
        )
    if not trained:
        return None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.05)
    batch = {key: value.to(device) for key, value in make_batch(base, _CASE.rows, _CASE.length).items()}
    method.bare(batch)
    worst = 0.0
    bound = GRADIENT_BOUND[dtype] * torch.finfo(dtype).eps
    for layer, exact in zip(adapted, _exact_gradients(base, adapted, batch), strict=True):
        for part, parameter in layer.trained.items():
            if parameter.grad is None:
                raise RuntimeError(f"expected {name} to give {layer.name}.{part} a gradient, got none")
            # One sum over a whole layer, whose terms may cancel: in 16 bits its relative error bounds nothing.
            if parameter.numel() == 1 and dtype != torch.float32:
                continue
            error = ((parameter.grad.double() - exact[part]).norm() / exact[part].norm()).item()
            if not error <= bound:
                raise RuntimeError(
                    f"expected the gradient of {layer.name}.{part} by {name} within {bound:.1e} of its norm from the one in float64, "
                    f"got {error:.1e}"
                )
            worst = max(worst, error)
    return worst


def _exact_gradients(base: nn.Module, adapted: list[Adapted], batch: Batch) -> list[dict[str, Tensor]]:
    """Per layer the gradients of its parameters in float64."""
    exact = copy.deepcopy(base).double()
    weights = dict(exact.named_parameters())
    leaves = [{part: p.detach().double().requires_grad_() for part, p in layer.trained.items()} for layer in adapted]
    replaced = {
        f"{layer.name}.weight": layer.weight(weights[f"{layer.name}.weight"], values)
        for layer, values in zip(adapted, leaves, strict=True)
    }
    torch.func.functional_call(exact, replaced, kwargs=batch).loss.backward()
    return [{part: leaf.grad for part, leaf in values.items()} for values in leaves]
