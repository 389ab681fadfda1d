"""Bank: all triplets of a model in flat buffers, of which the module parameters are views.

Layout of a buffer: P and Q matrices sorted by row length, then rank, then module, so that rows of one length form one matrix (what
scoring walks over) and matrices of one shape form one batch (what the orthogonality penalty walks over); the lambdas of all modules
come last. Triplets are numbered by module, then row; the row table maps every stored row to (offset, length, triplet).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapter import SVDAdapter, own_storage
from .config import IGUConfig
from .context import PathContext
from .kernels.importance import row_table
from .kernels.orthogonality import work_table
from .shared import share_inputs
from .unwrap import unwrap

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_ALIGN = 64  # elements: every region starts on a 256-byte boundary, so that kernels may use 16-byte accesses

# The parts of a triplet, in the order in which score terms are kept.
PARTS = ("lora_E", "lora_P", "lora_Q")


@dataclass(frozen=True)
class _Slice:
    """Where a matrix of one layer lies in a flat buffer."""

    slot: int
    name: str
    offset: int
    rows: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Offsets of every matrix, and the same facts in the forms the operators take."""

    slices: tuple[_Slice, ...]
    size: int
    regions: tuple[int, ...]
    groups: tuple[int, ...]
    lambda_offset: int
    triplets: int

    @classmethod
    def of(cls, layers: list[SVDAdapter]) -> Layout:
        """Lay out the matrices of ``layers``."""
        # Triplets per block: rows of one block are what the orthogonality penalty takes for a matrix.
        wanted = [
            (length, layer.r // layer.blocks, slot, name)
            for slot, layer in enumerate(layers)
            for name, length in (("lora_P", layer.p_length), ("lora_Q", layer.q_length))
            if layer.r
        ]
        wanted.sort(key=lambda w: (w[0], w[1], w[2], w[3]))
        slices: list[_Slice] = []
        regions: list[int] = []
        groups: list[int] = []
        offset = 0
        for length, of_length in groupby(wanted, key=lambda w: w[0]):
            offset = _aligned(offset)
            start, rows = offset, 0
            for rank, of_shape in groupby(of_length, key=lambda w: w[1]):
                first, matrices = offset, 0
                for _, _, slot, name in of_shape:
                    blocks = layers[slot].blocks
                    slices.append(_Slice(slot, name, offset, rank * blocks, length))
                    offset += rank * blocks * length
                    matrices += blocks
                groups += [first, matrices, rank, length]
                rows += matrices * rank
            regions += [start, rows, length]
        lambda_offset = offset = _aligned(offset)
        triplets = sum(layer.r for layer in layers)
        for slot, layer in enumerate(layers):
            slices.append(_Slice(slot, "lora_E", offset, layer.r, 1))
            offset += layer.r
        if triplets:
            regions += [lambda_offset, triplets, 1]
        return cls(tuple(slices), offset, tuple(regions), tuple(groups), lambda_offset, triplets)

    def row_table(self, starts: list[int]) -> Tensor:
        """(rows, 3) int64: offset, length and triplet of every stored row, in the order of the regions.

        Args:
            starts: number of the first triplet of each layer.
        """
        table = [(s.offset + i * s.length, s.length, starts[s.slot] + i) for s in self.slices for i in range(s.rows)]
        return torch.tensor(table, dtype=torch.int64).reshape(-1, 3)


def _aligned(offset: int) -> int:
    return (offset + _ALIGN - 1) // _ALIGN * _ALIGN


class Bank:
    """The flat storage of all adapted layers of a model (parameters, gradients, path accumulator, masks) and its row table.

    Args:
        names: full module names, in model order.
        layers: the adapted layers, in the same order; all on one device.
        context: the pass state they share.

    Attributes:
        weight, grad, path: flat (size,) masters, their gradients, the path accumulator T (made when first asked for).
        mask, live: flat (triplets,): the masks the layers compute with, and which triplets live by the last allocation.
        row_table, slots: what every stored row is (:meth:`Layout.row_table`), and which row statistic it yields.
        score_table, matrix_table: rows and matrices as the kernels of scoring and of the orthogonality penalty walk them.
        watched: one trained parameter of every layer that has any.
        layer_index, cost: int64 (triplets,): layer of each triplet, and its ``in + out`` (of its block's windows).
        triplet_table: int64 (layers, most triplets of one): each layer's triplets, -1 where it has fewer. triplet_place: int64 (triplets,),
            where each stands in the flattened table.

    Raises:
        ValueError: the layers lie on several devices.
    """

    def __init__(self, names: list[str], layers: list[SVDAdapter], context: PathContext) -> None:
        self.names, self.layers, self.context = list(names), list(layers), context
        for slot, layer in enumerate(self.layers):
            layer.slot, layer.context = slot, context
        self._epoch = -1
        self._live: Tensor | None = None
        self._path: Tensor | None = None
        self._on_gradient: Callable[[Tensor], None] | None = None
        self.repack()

    # -- storage ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def repack(self) -> None:
        """Gather the layers' parameters into fresh flat buffers and make them views again; values, live mask and T are kept."""
        devices = {p.device for layer in self.layers for p in (*layer.masters, layer.mask)}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"expected all adapted layers on one device, got {found}; move the whole model with model.to(device)"
            )
        self.device = next(iter(devices), torch.device("cpu"))
        self.dtype = self.layers[0].lora_E.dtype if self.layers else torch.float32
        self.layout = Layout.of(self.layers)
        self.starts = [0]
        for layer in self.layers:
            self.starts.append(self.starts[-1] + layer.r)
        self.weight = torch.zeros(self.layout.size, dtype=self.dtype, device=self.device)
        self.grad = torch.zeros_like(self.weight)
        self.mask = torch.ones(self.layout.triplets, dtype=self.dtype, device=self.device)
        self._bind_parameters()
        self._bind_masks()
        self._index_tables()
        if self._live is not None and self._live.numel() == self.layout.triplets:
            self._live = self._live.to(self.device)
        else:
            self._live = self.mask.clone()
        path, self._path = self._path, None
        self.context.accumulators, self.context.stand_ins = [], []
        if path is not None and path.numel() == self.layout.size:
            self.path.copy_(path)
        self._watch_backward()
        share_inputs(self.names, self.layers)
        self._epoch = self.context.epoch

    def _bind_parameters(self) -> None:
        self._grad_views: list[tuple[nn.Parameter, Tensor]] = []
        self._frozen: list[nn.Parameter] = []
        for s in self.layout.slices:
            param: nn.Parameter = getattr(self.layers[s.slot], s.name)
            view = self._view(self.weight, s)
            view.copy_(param)
            old_grad = param.grad
            param.data = view
            param.grad = None
            if param.requires_grad:
                grad_view = self._view(self.grad, s)
                if old_grad is not None:
                    grad_view.copy_(old_grad)
                param.grad = grad_view
                self._grad_views.append((param, grad_view))
            else:
                self._frozen.append(param)

    def _bind_masks(self) -> None:
        for slot, layer in enumerate(self.layers):
            view = self.mask[self.starts[slot] : self.starts[slot + 1]]
            view.copy_(layer.mask)
            layer.mask = view

    def _index_tables(self) -> None:
        layout = self.layout
        table = layout.row_table(self.starts)
        self.row_table = table.to(self.device)
        # Where a row's statistics go: (part, triplet) in a (3, triplets) table, parts in the order of PARTS.
        parts = torch.tensor([PARTS.index(s.name) for s in layout.slices for _ in range(s.rows)], dtype=torch.int64)
        slots = parts * layout.triplets + table[:, 2]
        self.slots = slots.to(self.device)
        self.score_table = row_table(list(layout.regions), slots).to(self.device)
        self.matrix_table = work_table(list(layout.groups)).to(self.device)
        ranks = torch.tensor([layer.r for layer in self.layers], dtype=torch.int64)
        costs = torch.tensor([layer.p_length + layer.q_length for layer in self.layers], dtype=torch.int64)
        self.layer_index = torch.repeat_interleave(torch.arange(len(self.layers)), ranks).to(self.device)
        self.cost = torch.repeat_interleave(costs, ranks).to(self.device)
        width = max([layer.r for layer in self.layers], default=0)
        starts, column = torch.tensor(self.starts[:-1], dtype=torch.int64)[:, None], torch.arange(width)
        has = column < ranks[:, None]
        self.triplet_table = torch.where(has, starts + column, -1).to(self.device)
        self.triplet_place = torch.nonzero(has.flatten()).flatten().to(self.device)

    def _watch_backward(self) -> None:
        """Gradient hooks on one parameter of every layer count training backward passes (the guard against a forgotten step)."""
        for handle in getattr(self, "_hooks", ()):
            handle.remove()
        trained = [
            next((p for p in (layer.lora_E, layer.lora_P, layer.lora_Q) if p.requires_grad and p.numel()), None)
            for layer in self.layers
        ]
        self.watched = [p for p in trained if p is not None]
        hooks = list(zip(self.watched, self.context.watch(len(self.watched)), strict=True))
        if self._on_gradient is not None:
            hooks += [(p, self._on_gradient) for p in self.watched]
        self._hooks: list[RemovableHandle] = [p.register_post_accumulate_grad_hook(hook) for p, hook in hooks]

    def on_gradient(self, hook: Callable[[Tensor], None] | None) -> None:
        """Call ``hook`` in every backward pass, once per layer that it reaches; None ends that."""
        if self._on_gradient != hook:
            self._on_gradient = hook
            self._watch_backward()

    def _view(self, flat: Tensor, s: _Slice) -> Tensor:
        part = flat[s.offset : s.offset + s.rows * s.length]
        return part if s.name == "lora_E" else part.view(s.rows, s.length)

    def refresh(self) -> None:
        """Repack when something replaced the parameters since (``.to``, ``load_state_dict``, a copy); O(1) otherwise."""
        if self._epoch == self.context.epoch:
            return
        self.repack()

    @property
    def has_grads(self) -> bool:
        """Whether any parameter holds a gradient (none does after ``zero_grad(set_to_none=True)``)."""
        return any(param.grad is not None for param, _ in self._grad_views)

    def bind_grads(self) -> None:
        """Give every parameter its view of the flat gradient back after ``zero_grad(set_to_none=True)``.

        When all still have their views nothing is touched. Otherwise the flat gradient is zeroed in one launch and the views are set
        again; a gradient that was kept or made meanwhile is kept.
        """
        views = self._grad_views
        if all(param.grad is view for param, view in views):
            return
        strangers = [(v, p.grad) for p, v in views if p.grad is not None and p.grad is not v]
        kept = any(p.grad is v for p, v in views)
        with torch.no_grad():
            if not kept:
                self.grad.zero_()
            else:
                torch._foreach_zero_([v for p, v in views if p.grad is not v])
            if strangers:
                torch._foreach_copy_([v for v, _ in strangers], [g for _, g in strangers])
        for param, view in views:
            param.grad = view

    def follow_trainable(self) -> None:
        """Give parameters that are trained by now, and were not when the buffers were packed, their views of the flat gradient."""
        if self._epoch == self.context.epoch:
            waiting = self._frozen
        else:  # other parameters may be there by now, and a copy has no views yet
            viewed = {id(param) for param, _ in self._grad_views} if self._epoch >= 0 else set()
            waiting = [p for p in self.parameters() if p.numel() and id(p) not in viewed]
        if any(param.requires_grad for param in waiting):
            self.repack()

    @property
    def path(self) -> Tensor:
        """The path accumulator T, flat (size,); made, with the views that the layers add to, when first asked for."""
        if self._path is None:
            self._path = torch.zeros_like(self.weight)
            views: list[dict[str, Tensor]] = [{} for _ in self.layers]
            for s in self.layout.slices:
                views[s.slot][s.name] = _accumulator(self._view(self._path, s))
            for slot, layer in enumerate(self.layers):
                for name in ("lora_P", "lora_Q"):
                    if name not in views[slot]:  # rank 0 has no rows in the buffers
                        views[slot][name] = torch.zeros_like(getattr(layer, name))
            self.context.accumulators = [(view["lora_P"], view["lora_E"], view["lora_Q"]) for view in views]
            self.context.stand_ins = [
                (layer.lora_P.detach().requires_grad_(), layer.lora_E.detach(), layer.lora_Q.detach().requires_grad_())
                for layer in self.layers
            ]
        return self._path

    @property
    def live(self) -> Tensor:
        """(triplets,) 0/1: which triplets live by the last allocation."""
        assert self._live is not None
        return self._live

    @live.setter
    def live(self, mask: Tensor) -> None:
        self._live = mask

    def forget_live(self) -> None:
        """Which triplets live is read from the layers' masks at the next :meth:`refresh`: these are about to be loaded."""
        self._live = None
        self.context.epoch += 1

    def parameters(self) -> list[nn.Parameter]:
        """P, lambda and Q of every layer, trained or not."""
        return [param for layer in self.layers for param in layer.masters]

    def others(self, model: nn.Module) -> list[nn.Parameter]:
        """What of the model is trained beside the adapters."""
        ours = {id(param) for param in self.parameters()}
        return [param for param in model.parameters() if param.requires_grad and id(param) not in ours]

    # -- views by triplet ---------------------------------------------------------------------------------------------

    @property
    def triplets(self) -> int:
        """Stored triplets of the whole model."""
        return self.layout.triplets

    @property
    def lambdas(self) -> Tensor:
        """(triplets,) view of all lambda, in triplet order."""
        return self.weight[self.layout.lambda_offset :]

    def ranks(self) -> dict[str, int]:
        """Live triplets of every module (synchronises with the device)."""
        live = self.live.tolist()
        return {name: int(sum(live[self.starts[i] : self.starts[i + 1]])) for i, name in enumerate(self.names)}

    def matrix_views(self, flat: Tensor) -> dict[tuple[str, str], Tensor]:
        """Views of any buffer with the bank's layout, by (module name, parameter name)."""
        return {(self.names[s.slot], s.name): self._view(flat, s) for s in self.layout.slices}

    # -- copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle needs: the layers hold the values, the buffers are rebuilt by :meth:`refresh`."""
        return {
            "names": self.names,
            "layers": self.layers,
            "context": self.context,
            "_live": None if self._live is None else self._live.clone(),
            "_path": None if self._path is None else self._path.detach().clone(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._on_gradient = None
        self._epoch = -1  # not packed yet: the layers may still be incomplete while a copy is under way


def _accumulator(view: Tensor) -> Tensor:
    """A view of the path accumulator as compiled graphs take it best: written in place, not copied before and after each layer.

    Of tensors that share a storage Inductor copies all that lies before the one that is changed. A parameter, because those have constant
    sizes in every graph: with variable ones (torch 2.13) wrong places are written.
    """
    return nn.Parameter(own_storage(view), requires_grad=False)


def find_bank(model: nn.Module) -> Bank:
    """The bank of an adapted model (or of one inside DistributedDataParallel or torch.compile), its views intact.

    Raises:
        ValueError: the model is not adapted.
    """
    model = unwrap(model)
    bank = getattr(model, "igulora_bank", None)
    if bank is None and hasattr(model, "igulora_banks"):
        bank = model.igulora_banks.active(model)  # type: ignore[operator, union-attr]
    if bank is None:
        raise ValueError(
            f"expected a model adapted by igulora.adapt, got a plain {type(model).__name__}; call igulora.adapt(model, config) first"
        )
    bank.refresh()
    return bank


def find_config(model: nn.Module) -> IGUConfig:
    """The options of an adapted model; where PEFT keeps several adapters, those of the active one.

    Raises:
        ValueError: the model is not adapted.
    """
    find_bank(model)
    model = unwrap(model)
    config = getattr(model, "igulora_config", None)
    return model.igulora_banks.config(model) if config is None else config  # type: ignore[operator, union-attr]


def base_model(model: nn.Module) -> nn.Module:
    """The model that module names are relative to: the one inside PEFT's wrappers, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
