"""SVDAdapter: the triplets of one layer, without the layer: start, dropout seed, copies, what a pass hands to the operators."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import CHOICES, initial_lambda
from .context import PathContext
from .errors import check_choice
from .kernels.backend import as_given
from .kernels.windows import widened
from .recompute import Recompute
from .shared import SharedInput

INITS = CHOICES["init"]
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


def check_blocks(blocks: int, r: int, in_features: int, out_features: int) -> None:
    """Raise ValueError unless a layer of these sides takes ``blocks`` blocks of ``r`` triplets together."""
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"expected blocks to be an int >= 1, got {blocks!r}")
    for what, size in (("in features", in_features), ("out features", out_features), ("triplets", r)):
        if size % blocks:
            raise ValueError(f"expected blocks that divide the layer's {size} {what}, got {blocks}")


def own_storage(view: Tensor) -> Tensor:
    """A contiguous view of a flat buffer as a tensor with a storage of its own, on the same memory, which it keeps alive.

    Who saves tensors by their storages (safetensors, accelerate) takes tensors that share one for copies of each other.
    """
    if type(view) is not Tensor or view.device.type not in ("cpu", "cuda") or not view.numel():
        return view  # elsewhere addresses are no plain numbers
    start, width = view.storage_offset() * view.element_size(), view.numel() * view.element_size()
    storage = view.untyped_storage()[start : start + width]
    return view.new_empty(0).set_(storage, 0, view.shape, view.stride())


class SVDAdapter(nn.Module):
    """``Delta W = s sum_i m_i lambda_i p_i q_i^T`` of a layer from ``in_features`` to ``out_features`` (IGU-LoRA Eq. 2; ALGORITHMS 1).

    Parameters: ``lora_P (r, out)``, ``lora_E (r,)`` (lambda), ``lora_Q (r, in)``; buffer ``mask (r,)`` of 0 and 1. A bank makes them views
    of its flat buffers and sets ``slot`` and ``context``. Subclasses say what the update of a kind of layer is.

    With ``blocks`` n > 1 the update is block-diagonal (RaLoRA; ALGORITHMS 5): r / n triplets per block, one block after another, with
    vectors over their block's window: ``lora_P (r, out / n)``, ``lora_Q (r, in / n)``.

    Args:
        r: number of stored triplets, from 0 up; of all blocks together.
        blocks: n; divides r, in and out.
        lora_alpha: the update is scaled by ``lora_alpha / r``; r by default.
        dropout: probability of dropping an input entry on its way to Q, in training.
        init: "zero" P = 0, Q as LoRA's A, lambda = ``init_lambda`` (default); "orthonormal" rows of P and Q; "gaussian" N(0, 0.02^2),
            PEFT's; "lora" as "zero" with lambda = 1, not trained.
        init_lambda: start of lambda for the first three; None for 1 with "zero", 0 with the others.
        dtype: of the masters.
        generator: CPU generator the start is drawn from.

    Raises:
        ValueError: an argument is out of range.
    """

    # Whether the update is a product with an input (..., in): of siblings that read one such input, S may come from one pass over it.
    reads_features: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        blocks: int = 1,
        lora_alpha: float | None = None,
        dropout: float = 0.0,
        init: str = "zero",
        init_lambda: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise ValueError(f"expected a rank r >= 0, got {r!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"expected 0 <= dropout < 1, got {dropout}")
        check_choice("init", init, INITS)
        check_blocks(blocks, r, in_features, out_features)
        if blocks > 1 and not self.reads_features:
            raise ValueError(f"expected blocks=1 for a layer that is not linear, got {blocks}")
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        self.scale = 1.0 if lora_alpha is None or r == 0 else lora_alpha * blocks / r
        self.dropout = dropout
        self.merged = False
        self.slot = 0
        self.context = PathContext()
        self.shared: SharedInput | None = None
        self.recompute: Recompute | None = None
        self.fixed_lambda = init == "lora"
        self.lora_P = nn.Parameter(torch.empty((r, self.p_length), dtype=dtype, device=device))
        self.lora_E = nn.Parameter(torch.empty((r,), dtype=dtype, device=device), requires_grad=not self.fixed_lambda)
        self.lora_Q = nn.Parameter(torch.empty((r, self.q_length), dtype=dtype, device=device))
        self.register_buffer("mask", torch.ones((r,), dtype=dtype, device=device))
        self.mask: Tensor
        if self.lora_P.device.type != "meta":
            self.reset_parameters(init, init_lambda, generator)

    @torch.no_grad()
    def reset_parameters(
        self, init: str = "zero", init_lambda: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Draw the start of P, lambda and Q again (see the class's ``init``); the same generator gives the same start on any device."""
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(_SEED_RANGE, ())))
        r = self.r
        self.lora_E.fill_(1.0 if init == "lora" else initial_lambda(init, init_lambda))
        if init == "orthonormal":
            for param in (self.lora_P, self.lora_Q):
                for block in param.split(max(r // self.blocks, 1)):
                    block.copy_(_orthonormal_rows(block.shape[0], block.shape[1], generator))
        elif init == "gaussian":
            self.lora_P.copy_(torch.randn((r, self.p_length), generator=generator) * 0.02)
            self.lora_Q.copy_(torch.randn((r, self.q_length), generator=generator) * 0.02)
        else:
            bound = 1.0 / math.sqrt(self.q_length)
            self.lora_P.zero_()
            self.lora_Q.copy_(torch.rand((r, self.q_length), generator=generator) * (2 * bound) - bound)
        self.mask.fill_(1.0)

    @property
    def r(self) -> int:
        """Stored triplets, live or not."""
        return self.lora_E.shape[0]

    @property
    def p_length(self) -> int:
        """Entries of a left direction: out, or a block's share of it."""
        return self.out_features // self.blocks

    @property
    def q_length(self) -> int:
        """Entries of a right direction: in, or a block's share of it."""
        return self.in_features // self.blocks

    @property
    def masters(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """P, lambda and Q."""
        return self.lora_P, self.lora_E, self.lora_Q

    def dropout_seed(self, x: Tensor) -> Tensor | None:
        """A fresh int64 seed on x's device, drawn from PyTorch's generator; None where nothing is dropped."""
        if not self.training or self.dropout == 0.0:
            return None
        return torch.randint(_SEED_RANGE, (), dtype=torch.int64, device=x.device)

    def check_stepped(self) -> None:
        """The guard against training without a controller, once per training pass (in the model's first layer)."""
        context = self.context
        if self.slot == 0 and context.train_groups != 0 and self.training and torch.is_grad_enabled():
            context.check_stepped()

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """P, lambda and Q as the pass under way takes them."""
        if self.context.train_groups != 0:
            return self.lora_P, self.lora_E, self.lora_Q
        # A pure path pass leaves the parameters out of the graph (data-parallel wrappers count on them), but wants a backward.
        return self.context.stand_ins[self.slot]

    def rows(self) -> dict[str, Any]:
        """The pass under way as arguments of the operators: scale, and which rows train or are samples of the path."""
        context = self.context
        return {
            "scale": self.scale,
            "train_groups": context.train_groups,
            "path_start": context.path_start,
            "path_weight": context.path_weight,
            "path": None if context.path_start is None else context.accumulators[self.slot],
        }

    def delta_weight(self) -> Tensor:
        """``s * sum_i m_i lambda_i p_i q_i^T``, (out, in), in the masters' dtype."""
        coef = self.scale * self.mask * self.lora_E
        with as_given(coef):
            return (widened(self.lora_P, self.blocks).t() * coef) @ widened(self.lora_Q, self.blocks)

    def _apply(self, fn: Any, recurse: bool = True) -> SVDAdapter:
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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A state dict holds tensors on the parameters' memory, as ever, but each with a storage of its own."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name in ("lora_P", "lora_E", "lora_Q", "mask"):
                destination[prefix + name] = own_storage(destination[prefix + name])

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

    def __deepcopy__(self, memo: dict[int, Any]) -> SVDAdapter:
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
        blocks = f", blocks={self.blocks}" if self.blocks > 1 else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {live}{blocks}, scale={self.scale:g}"
