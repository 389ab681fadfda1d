"""align: how many directions the gradient of every frozen matrix has, and the blocks and ranks that fit it (RaLoRA; ALGORITHMS 5)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import check_plain
from .bases import Base, describe
from .config import IGUConfig
from .distributed import Processes
from .objective import checked, evaluating
from .spectra import EXACT_UP_TO, effective_rank
from .targets import find_saved, find_targets

Loss = Callable[[Any], Tensor]
MAX_BLOCKS = 16  # n_max, of which the source says no more than that it bounds n for stability


@dataclass(frozen=True)
class Measured:
    """What was found of one matrix, and what follows from it.

    Attributes:
        in_features, out_features: of the layer.
        dimensionality: effective rank of the gradient.
        sensitivity: mean of |W * G| (RaLoRA-Pro).
        rank: triplets per block. blocks: n, a power of two.
    """

    in_features: int
    out_features: int
    dimensionality: float
    sensitivity: float
    rank: int
    blocks: int


@dataclass(frozen=True)
class Alignment:
    """What :func:`align` found, by full names of layers in model order."""

    layers: dict[str, Measured]

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> r, for ``IGUConfig.rank_pattern``."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def blocks(self) -> dict[str, int]:
        """Layer -> n."""
        return {name: layer.blocks for name, layer in self.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {name: dataclasses.asdict(layer) for name, layer in self.layers.items()}


def align(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Loss | None = None,
    *,
    r: int = 8,
    pro: bool = False,
    target_modules: str | list[str] = "all-linear",
    exclude_modules: list[str] | None = None,
    modules_to_save: list[str] | None = None,
    max_blocks: int = MAX_BLOCKS,
    r_min: int = 1,
    r_max: int | None = None,
    exact_up_to: int = EXACT_UP_TO,
    memory: float | None = None,
    seed: int = 0,
) -> Alignment:
    """Measure the gradient of every matrix over a few batches and choose its blocks, before anything is adapted.

    ``n = 2^floor(log2(erank / r))``, between 1 and ``max_blocks``, halved until it divides in and out (RaLoRA). With ``pro``, ranks first:
    ``a_l = I_l / sum I``, ``r_l = floor(P a_l / sqrt(in + out))`` within ``r_min`` and ``r_max``, where ``P = sum sqrt(in + out) r`` and
    ``I_l = mean |W * G|`` (RaLoRA-Pro).

    With several processes all of them call this; the first one measures its batches, and all get its answer, or its error.

    On the model's device one gradient is alive at a time; sums over the batches are kept on the host, in float32. The model runs in
    evaluation mode, and is afterwards what it was.

    Args:
        model: a plain model.
        batches: a few of training; all are held in memory at once.
        loss_fn: ``batch -> loss``; ``model(**batch).loss`` by default.
        r: rank of a block, and r_ref of ``pro``.
        target_modules, exclude_modules, modules_to_save: as in :class:`igulora.IGUConfig`.
        max_blocks: n_max, a power of two.
        r_min, r_max: bounds of ``pro``; by default 1 and 4 r.
        exact_up_to: the smaller side up to which spectra are exact; above, they are sampled (:mod:`igulora.spectra`).
        memory: bytes on the host that sums may take; where they take more, the batches run several times, each time for some of the
            layers (at least one). None: no bound.
        seed: of the samples.

    Raises:
        ValueError: the model is adapted already, there are no batches, a gradient is missing, zero or not finite (names the layer), or a
            number is out of range. Nothing is changed then.
        TypeError: the loss is no scalar tensor.
    """
    _check_numbers(r, max_blocks, r_min, r_max)
    check_plain(model)
    names: dict[str, Any] = {
        "exclude_modules": list(exclude_modules or []),
        "modules_to_save": list(modules_to_save or []),
    }
    config = IGUConfig(method="lora", r=r, target_modules=target_modules, **names)
    modules = dict(model.named_modules())
    layers: dict[str, Base] = {}
    for name in find_targets(model, config, find_saved(model, config)):
        base = describe(modules[name])
        if base is None or not base.linear:
            raise ValueError(f"expected linear layers to align, got {name!r}; leave it out of target_modules")
        if type(base).run is not Base.run:
            raise ValueError(
                f"expected layers whose own forward passes gradients on, got {name!r} ({base.kind}); measure the unquantised model"
            )
        layers[name] = base
    held = list(batches)
    if not held:
        raise ValueError("expected batches to measure gradients on, got none")
    loss_fn = (lambda batch: model(**batch).loss) if loss_fn is None else loss_fn
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, tuple[float, float]] = {}

    def measure() -> None:
        with evaluating(model), _frozen(model):
            for group in _groups(layers, memory):
                sums = _gradients(group, held, loss_fn)
                for name in group:
                    found[name] = _measure(name, group[name], sums.pop(name, None), exact_up_to, generator)

    processes = Processes()
    processes.first_only(measure, "measure the gradients")
    found = processes.gather(found)[0]
    ranks = (
        _shared_out(layers, {n: s for n, (_, s) in found.items()}, r, r_min, r_max) if pro else dict.fromkeys(layers, r)
    )
    return Alignment(
        {
            name: Measured(
                base.in_features,
                base.out_features,
                *found[name],
                ranks[name],
                blocks_for(found[name][0], ranks[name], base.in_features, base.out_features, max_blocks),
            )
            for name, base in layers.items()
        }
    )


def blocks_for(dimensionality: float, rank: int, in_features: int, out_features: int, most: int) -> int:
    """``2^floor(log2(erank / r))`` within 1 and ``most``, halved until it divides both sides."""
    if rank < 1 or dimensionality <= rank:
        return 1
    n = min(2 ** int(math.log2(dimensionality / rank)), most)
    while in_features % n or out_features % n:
        n //= 2
    return n


def _check_numbers(r: int, max_blocks: int, r_min: int, r_max: int | None) -> None:
    for name, value in (
        ("r", r),
        ("max_blocks", max_blocks),
        ("r_min", r_min),
        ("r_max", r if r_max is None else r_max),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"expected {name} to be an int >= 1, got {value!r}")
    if max_blocks & (max_blocks - 1):
        raise ValueError(f"expected max_blocks to be a power of two, got {max_blocks}")
    most = 4 * r if r_max is None else r_max
    if not r_min <= r <= most:
        raise ValueError(f"expected r_min <= r <= r_max, got {r_min}, {r}, {most}")


def _groups(layers: dict[str, Base], memory: float | None) -> Iterator[dict[str, Base]]:
    """Layers whose sums fit into ``memory`` together; at least one."""
    group: dict[str, Base] = {}
    held = 0.0
    for name, base in layers.items():
        size = 4.0 * base.in_features * base.out_features
        if group and memory is not None and held + size > memory:
            yield group
            group, held = {}, 0.0
        group[name] = base
        held += size
    if group:
        yield group


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient inside: what is measured is computed from a layer's input and its output's gradient."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in trained:
            p.requires_grad_(flag)


def _gradients(layers: dict[str, Base], batches: list[Any], loss_fn: Loss) -> dict[str, Tensor]:
    """Layer -> dL/dW (out, in), the mean over the batches, float32 on the host."""
    sums: dict[str, Tensor] = {}

    def watch(name: str, base: Base) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = given(args, kwargs)
            if x.requires_grad:
                return None
            x = x.detach().requires_grad_()
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})

        def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"expected {name!r} to be called with its input alone, or by the name 'input', got {sorted(kwargs)}; leave it out of "
                    "target_modules"
                )
            return x

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            x = given(args, kwargs).detach()

            def add(dy: Tensor) -> None:
                flat = dy.reshape(-1, base.out_features).to(torch.float32)
                g = flat.t() @ x.reshape(-1, base.in_features).to(torch.float32)  # (out, rows) @ (rows, in)
                g = g.cpu() / len(batches)
                sums[name] = g if name not in sums else sums[name].add_(g)

            if y.requires_grad:
                y.register_hook(add)

        before = base.module.register_forward_pre_hook(enter, with_kwargs=True)
        return [before, base.module.register_forward_hook(leave, with_kwargs=True)]

    handles = [handle for name, base in layers.items() for handle in watch(name, base)]
    try:
        for batch in batches:
            with torch.enable_grad():
                loss = checked(loss_fn(batch))
            if not loss.requires_grad:
                raise ValueError(
                    f"expected a loss that depends on the layers to align ({next(iter(layers))}, ...), got one without a gradient; is it "
                    "computed under torch.no_grad, or detached?"
                )
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _measure(
    name: str, base: Base, gradient: Tensor | None, exact_up_to: int, generator: torch.Generator
) -> tuple[float, float]:
    """Effective rank of a gradient, and the mean of |W * G|."""
    if gradient is None:
        raise ValueError(
            f"expected a gradient for {name!r}, got none: the loss of these batches does not pass through it"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError(
            f"expected finite gradients, got NaN or infinity for {name!r}; look at these batches and the model's dtype"
        )
    if not bool(gradient.any()):
        raise ValueError(f"expected a gradient for {name!r}, got zeros; do these batches have labels?")
    weight = base.dense().detach().to("cpu", torch.float32)
    return effective_rank(gradient, exact_up_to, generator), float((weight * gradient).abs_().mean())


def _shared_out(
    layers: dict[str, Base], sensitivity: dict[str, float], r: int, r_min: int, r_max: int | None
) -> dict[str, int]:
    """RaLoRA-Pro's ranks."""
    smooth = {name: math.sqrt(base.in_features + base.out_features) for name, base in layers.items()}
    total, everything = sum(smooth.values()) * r, sum(sensitivity.values())
    most = 4 * r if r_max is None else r_max
    shares = {name: total * sensitivity[name] / everything / smooth[name] for name in layers}
    return {name: min(max(int(share), r_min), most) for name, share in shares.items()}
