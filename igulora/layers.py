"""FusedSVDLinear, the adapted linear layer, and SavedModule, a module trained whole beside the adapters."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .context import PathContext
from .errors import check_choice
from .kernels import svd_linear, svd_update
from .kernels.backend import as_given
from .recompute import Recompute
from .shared import SharedInput, Taken

INITS = ("orthonormal", "gaussian", "lora")
_SEED_RANGE = 2**62


def _orthonormal_rows(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """(rows, cols) with orthonormal rows; for rows > cols, stacked blocks of orthonormal rows."""
    blocks = []
    while rows > 0:
        block = min(rows, cols)
        q, upper = torch.linalg.qr(torch.randn((cols, block), generator=generator))
        blocks.append((q * upper.diagonal().sign()).t())
        rows -= block
    return torch.cat(blocks) if blocks else torch.empty((0, cols))


class FusedSVDLinear(nn.Module):
    """``y = x W0^T + b + alpha s ((dropout(x) Q^T) * (m * lambda)) P`` in one operator call (IGU-LoRA Eq. 2; ALGORITHMS 1).

    Parameters: ``lora_P (r, out)``, ``lora_E (r,)`` (lambda), ``lora_Q (r, in)``, float32; buffer ``mask (r,)`` of 0 and 1. The base
    weight and bias are the base layer's own tensors, frozen, never copied.

    Args:
        base: the ``nn.Linear`` to adapt, or its number of input features (then ``out_features`` is needed and one is built).
        out_features, bias, device, dtype: of the linear layer to build; not allowed with a base layer.
        r: number of stored triplets, from 0 up.
        lora_alpha: the update is scaled by ``lora_alpha / r``; r by default.
        dropout: probability of dropping an input entry on its way to Q, in training.
        init: "orthonormal" rows of P and Q, lambda = ``init_lambda`` (default); "gaussian" N(0, 0.02^2), PEFT's; "lora" P = 0, Q as
            LoRA's A, lambda = 1 and not trained.
        init_lambda: start of lambda for the first two.
        generator: CPU generator the start is drawn from.

    Raises:
        TypeError: base is neither an nn.Linear nor an int.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        base: nn.Linear | int,
        out_features: int | None = None,
        r: int = 8,
        *,
        lora_alpha: float | None = None,
        dropout: float = 0.0,
        init: str = "orthonormal",
        init_lambda: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(base, nn.Linear):
            if out_features is not None:
                raise ValueError("expected either a base layer or in_features and out_features, got both")
        elif isinstance(base, int) and not isinstance(base, bool):
            if out_features is None:
                raise ValueError("expected out_features with in_features, got None")
            base = nn.Linear(base, out_features, bias=bias, device=device, dtype=dtype)
        else:
            raise TypeError(f"expected an nn.Linear or a number of input features, got {type(base).__name__}")
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise ValueError(f"expected a rank r >= 0, got {r!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"expected 0 <= dropout < 1, got {dropout}")
        check_choice("init", init, INITS)
        self.base_layer = base
        base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale = 1.0 if lora_alpha is None or r == 0 else lora_alpha / r
        self.dropout = dropout
        self.merged = False
        self.slot = 0
        self.context = PathContext()
        self.shared: SharedInput | None = None
        self.recompute: Recompute | None = None
        where = base.weight.device
        master = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        self.lora_P = nn.Parameter(torch.empty((r, self.out_features), dtype=master, device=where))
        self.lora_E = nn.Parameter(torch.empty((r,), dtype=master, device=where), requires_grad=init != "lora")
        self.lora_Q = nn.Parameter(torch.empty((r, self.in_features), dtype=master, device=where))
        self.register_buffer("mask", torch.ones((r,), dtype=master, device=where))
        self.mask: Tensor
        if where.type != "meta":
            self.reset_parameters(init, init_lambda, generator)

    @torch.no_grad()
    def reset_parameters(
        self, init: str = "orthonormal", init_lambda: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        """Draw the start of P, lambda and Q again (see the class's ``init``); the same generator gives the same start on any device."""
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(_SEED_RANGE, ())))
        r = self.r
        if init == "orthonormal":
            self.lora_P.copy_(_orthonormal_rows(r, self.out_features, generator))
            self.lora_Q.copy_(_orthonormal_rows(r, self.in_features, generator))
            self.lora_E.fill_(init_lambda)
        elif init == "gaussian":
            self.lora_P.copy_(torch.randn((r, self.out_features), generator=generator) * 0.02)
            self.lora_Q.copy_(torch.randn((r, self.in_features), generator=generator) * 0.02)
            self.lora_E.fill_(init_lambda)
        else:
            bound = 1.0 / math.sqrt(self.in_features)
            self.lora_P.zero_()
            self.lora_Q.copy_(torch.rand((r, self.in_features), generator=generator) * (2 * bound) - bound)
            self.lora_E.fill_(1.0)
        self.mask.fill_(1.0)

    @property
    def r(self) -> int:
        """Stored triplets, live or not."""
        return self.lora_E.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base weight (out, in), as models that look at ``layer.weight`` expect."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias (out,) or None."""
        return self.base_layer.bias

    def dropout_seed(self, x: Tensor) -> Tensor | None:
        """A fresh int64 seed on x's device, drawn from PyTorch's generator; None where nothing is dropped."""
        if not self.training or self.dropout == 0.0:
            return None
        return torch.randint(_SEED_RANGE, (), dtype=torch.int64, device=x.device)

    @property
    def base_runs_itself(self) -> bool:
        """Whether the base has a forward of its own (a subclass of nn.Linear, or one that was replaced): it is called then."""
        base = self.base_layer
        return type(base).forward is not nn.Linear.forward or "forward" in vars(base)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). Inside a path pass alpha and the rows' destinations come from the shared context."""
        context = self.context
        if self.merged or not context.enabled:
            return self.base_layer(x)
        training = self.training and torch.is_grad_enabled()
        if training and self.slot == 0 and context.train_groups != 0:
            context.check_stepped()
        taken = Taken(x) if self.shared is None else self.shared.take(self, x)
        seed = self.dropout_seed(x) if taken.S is None else taken.seed
        path = None if context.path_start is None else context.accumulators[self.slot]
        factors: tuple[Tensor, Tensor, Tensor] = (self.lora_P, self.lora_E, self.lora_Q)
        if context.train_groups == 0:
            # A pure path pass leaves the parameters out of the graph (data-parallel wrappers count on them), but wants a backward.
            factors = (
                self.lora_P.detach().requires_grad_(torch.is_grad_enabled()),
                self.lora_E.detach(),
                self.lora_Q.detach(),
            )
        options: dict[str, Any] = {
            "scale": self.scale,
            "dropout_p": self.dropout,
            "seed": seed,
            "S": taken.S,
            "train_groups": context.train_groups,
            "path_start": context.path_start,
            "path_weight": context.path_weight,
            "path": path,
        }
        recipe = taken.recipe
        if taken.S is None and self.recompute is not None:
            recipe = self.recompute.of(x)
        options["again"] = None if recipe is None else recipe.hold()
        if self.base_runs_itself:
            return svd_update(self.base_layer(x), taken.x, *factors, self.mask, context.alpha, **options)
        base = self.base_layer
        return svd_linear(taken.x, base.weight, base.bias, *factors, self.mask, context.alpha, **options)

    def delta_weight(self) -> Tensor:
        """``s * sum_i m_i lambda_i p_i q_i^T``, (out, in), in the masters' dtype."""
        coef = self.scale * self.mask * self.lora_E
        with as_given(coef):
            return (self.lora_P.t() * coef) @ self.lora_Q

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base weight (rounded once to its dtype). Merging twice is an error."""
        if self.merged:
            raise ValueError("expected an unmerged layer, got a merged one; unmerge it first")
        weight = self.base_layer.weight
        weight.copy_(weight.to(self.lora_P.dtype) + self.delta_weight())
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the update again; in 16-bit weights this returns the base up to rounding."""
        if not self.merged:
            raise ValueError("expected a merged layer, got an unmerged one; nothing to undo")
        weight = self.base_layer.weight
        weight.copy_(weight.to(self.lora_P.dtype) - self.delta_weight())
        self.merged = False

    def _apply(self, fn: Any, recurse: bool = True) -> FusedSVDLinear:
        """``.to``, ``.half`` and kin: masters keep float32 (or float64), and the bank learns that its views broke."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            narrowed = moved.dtype != t.dtype and torch.finfo(moved.dtype).bits < 32
            return t.to(moved.device) if narrowed else moved  # from t: a trip through 16 bits would round the masters

        for child in self.children():
            child._apply(fn)
        super()._apply(keep_dtype, recurse=False)
        self.context.epoch += 1
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.context.epoch += 1  # load_state_dict(assign=True) replaces the parameters

    def __getstate__(self) -> dict[str, Any]:
        """A pickle holds this layer's rows only, not the whole bank that its parameters are views of."""
        state = self.__dict__.copy()
        state["shared"] = None  # a bank groups its layers anew
        state["_parameters"] = {
            name: nn.Parameter(param.detach().clone(), requires_grad=param.requires_grad)
            for name, param in self.named_parameters(recurse=False)
        }
        state["_buffers"] = {name: buffer.clone() for name, buffer in self.named_buffers(recurse=False)}
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedSVDLinear:
        """Parameters are copied one by one, so that ``memo`` maps them; the context (and with it the path accumulators) starts fresh."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        for key, value in self.__dict__.items():
            if key == "_buffers":
                value = {k: v.clone() for k, v in value.items()}
            if key == "shared":
                value = None  # a bank groups its layers anew
            twin.__dict__[key] = copy.deepcopy(value, memo)
        return twin

    def extra_repr(self) -> str:
        """What a printed model shows of the layer."""
        live = "merged" if self.merged else f"r={self.r}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {live}, scale={self.scale:g}"


class SavedModule(nn.Module):
    """A module of ``modules_to_save``: a trained copy beside the original. In a mixed batch only training rows reach its gradients.

    Path rows must not train it: they run through the same weights detached. Inputs and outputs are tensors with the batch first.
    """

    def __init__(self, module: nn.Module, context: PathContext) -> None:
        super().__init__()
        self.original = module.requires_grad_(False)
        self.module = copy.deepcopy(module).requires_grad_(True)
        self.context = context

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward; with path rows under way, training and path rows go through it apart."""
        context = self.context
        if not context.enabled:
            return self.original(*args, **kwargs)
        if context.train_groups is None or context.alpha is None:
            return self.module(*args, **kwargs)
        n, split = context.alpha.numel(), context.train_groups
        if split == n:
            return self.module(*args, **kwargs)
        rest = self._detached_call(self._rows(args, n, split, None), self._rows(kwargs, n, split, None))
        if split == 0:
            return rest
        first = self.module(*self._rows(args, n, 0, split), **self._rows(kwargs, n, 0, split))
        if not isinstance(first, Tensor):
            raise TypeError(
                f"expected a module to save that returns a tensor, got {type(first).__name__} from "
                f'{type(self.module).__name__}; use path_pass="separate"'
            )
        return torch.cat((first, rest))

    def _detached_call(self, args: Any, kwargs: Any) -> Any:
        frozen = {k: v.detach() for k, v in self.module.named_parameters()}
        return torch.func.functional_call(self.module, frozen, args, kwargs)

    @staticmethod
    def _rows(values: Any, n: int, start: int, stop: int | None) -> Any:
        def cut(v: Any) -> Any:
            if not isinstance(v, Tensor) or v.ndim == 0 or n == 1 or v.shape[0] % n:
                return v
            per = v.shape[0] // n
            return v[start * per : None if stop is None else stop * per]

        if isinstance(values, dict):
            return {k: cut(v) for k, v in values.items()}
        return tuple(cut(v) for v in values)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without its adapters inside the block (the base model's own outputs)."""
    contexts = list({id(m.context): m.context for m in model.modules() if isinstance(m, FusedSVDLinear)}.values())
    before = [context.enabled for context in contexts]
    for context in contexts:
        context.enabled = False
    try:
        yield
    finally:
        for context, enabled in zip(contexts, before, strict=True):
            context.enabled = enabled
