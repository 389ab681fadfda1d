"""Experts stored as 3-D parameters (mixture models of transformers): every expert's slice of a parameter gets triplets of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bases import Base, describe
from .config import IGUConfig
from .context import PathContext
from .errors import nearest
from .kinds import LinearAdapter
from .layers import AdaptedLayer

# The parameters of the contract that transformers' ``use_experts_implementation`` gives a module of experts, and the flags it sets.
_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts")
_PLAIN = (nn.Parameter, Tensor)


class ExpertSlice:
    """One expert's part of a 3-D parameter, seen as a linear layer whose weight is a view. Not a module: it owns nothing.

    Args:
        experts: the module that holds the parameter.
        parameter: its name there.
        index: the expert.
    """

    def __init__(self, experts: nn.Module, parameter: str, index: int) -> None:
        self.experts: Any = experts
        self.parameter, self.index = parameter, index

    @property
    def training(self) -> bool:
        """The mode of the module."""
        return self.experts.training

    @property
    def transposed(self) -> bool:
        """Whether the parameter is stored as (experts, in, out)."""
        return bool(self.experts.is_transposed)

    @property
    def weight(self) -> Tensor:
        """(out, in), a view."""
        stored = getattr(self.experts, self.parameter)[self.index]
        return stored.t() if self.transposed else stored

    @property
    def bias(self) -> Tensor | None:
        """(out,), a view, or None."""
        return getattr(self.experts, f"{self.parameter}_bias")[self.index] if self.experts.has_bias else None

    def requires_grad_(self, requires_grad: bool = True) -> ExpertSlice:
        """Freeze or free the whole parameter, all experts of it."""
        getattr(self.experts, self.parameter).requires_grad_(requires_grad)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class ExpertBase(Base):
    """An expert's slice as a matrix."""

    kind = "expert"
    linear = False

    def __init__(self, module: ExpertSlice) -> None:
        self.module = module
        self.out_features, self.in_features = module.weight.shape

    def dense(self) -> Tensor:
        return self.module.weight

    def assign(self, dense: Tensor) -> float:
        self.module.weight.copy_(dense)
        return 0.0


class ExpertLinear(AdaptedLayer, LinearAdapter):
    """The triplets of one expert's slice; ``options`` as for :class:`SVDAdapter`."""

    def __init__(self, part: ExpertSlice, r: int, **options: Any) -> None:
        super().__init__(ExpertBase(part), r, **options)

    @property
    def base(self) -> Base:
        """The slice as a matrix."""
        return ExpertBase(self.base_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out)."""
        return self.call(self.base_layer, x, fused=not self.base_layer.transposed)


class _Routed(NamedTuple):
    """(token, choice) pairs in the order of their experts, and within an expert in that of the batch.

    Attributes:
        order: (tokens k,) which pair comes at each place. token: (tokens k,) whose it is.
        counts, train, path: for each expert how many pairs it has, how many of them train, and how many come before the first path row.
        per_group: tokens of a sequence; all of them where nothing tells sequences apart.
    """

    order: Tensor
    token: Tensor
    counts: list[int]
    train: list[int]
    path: list[int]
    per_group: int


class AdaptedExperts(nn.Module):
    """A module of experts with an :class:`ExpertLinear` for every expert of the named parameters.

    Runs expert by expert, as transformers' eager form does; how many tokens each gets is read from the device once a call. In a batch with
    path rows, alpha and the rows' destinations are handed on from sequences to tokens.

    Args:
        experts: the module, whose parameters are used, never copied.
        adapters: parameter name -> one layer per expert.
    """

    def __init__(self, experts: nn.Module, adapters: dict[str, list[ExpertLinear]]) -> None:
        super().__init__()
        self.base_layer = experts
        self.adapted = tuple(adapters)
        for name, layers in adapters.items():
            setattr(self, name, nn.ModuleList(layers))

    def layers(self, parameter: str) -> list[ExpertLinear]:
        """The adapted slices of a parameter, by expert."""
        layers: Any = self._modules[parameter]
        return list(layers)

    @property
    def context(self) -> PathContext:
        """The pass under way."""
        return self.layers(self.adapted[0])[0].context

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden), (tokens, k) experts of each token, (tokens, k) their weights -> (tokens, hidden)."""
        if not self.context.enabled or all(layer.merged for name in self.adapted for layer in self.layers(name)):
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        routed = self._route(top_k_index)
        start, outputs = 0, []
        for index, count in enumerate(routed.counts):
            if count:
                token = routed.token[start : start + count]
                with self._told(routed, index, token):
                    outputs.append(self._expert(index, hidden_states[token]))
            start += count
        weighted = torch.cat(outputs) * top_k_weights.reshape(-1, 1)[routed.order]
        in_batch_order = torch.empty_like(weighted).index_copy(0, routed.order, weighted)
        y = in_batch_order.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)
        return self._with_gradients_of_idle(y, routed)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        experts: Any = self.base_layer
        if experts.has_gate:
            h = experts._apply_gate(self._product("gate_up_proj", index, x))
        else:
            h = experts.act_fn(self._product("up_proj", index, x))
        y = self._product("down_proj", index, h)
        return experts.post_expert_norm(y) if getattr(experts, "has_post_expert_norm", False) else y

    def _product(self, parameter: str, index: int, x: Tensor) -> Tensor:
        if parameter in self.adapted:
            return self._modules[parameter][index](x)  # type: ignore[index]
        return ExpertSlice(self.base_layer, parameter, index)(x)

    def _route(self, top_k_index: Tensor) -> _Routed:
        context, (tokens, k) = self.context, top_k_index.shape
        groups = 1 if context.alpha is None else context.alpha.numel()
        if tokens % groups:
            raise ValueError(
                f"expected tokens of {groups} sequences of one length at the experts, got {tokens} tokens: the model drops or packs some, "
                'and which position of the path a token has is unknown; use IGUConfig(estimator="instantaneous")'
            )
        per = tokens // groups
        train = tokens if context.train_groups is None else context.train_groups * per
        path = train if context.path_start is None else context.path_start * per
        choice = top_k_index.reshape(-1)
        order = torch.argsort(choice, stable=True)
        experts = int(self.base_layer.num_experts)  # type: ignore[arg-type]
        upto = [torch.bincount(choice[: rows * k], minlength=experts) for rows in (tokens, train, path)]
        counts, trains, paths = torch.stack(upto).tolist()
        return _Routed(order, order // k, counts, trains, paths, per)

    def _told(self, routed: _Routed, index: int, token: Tensor) -> AbstractContextManager[None]:
        """The pass under way, told token by token for the tokens of one expert."""
        context = self.context
        if context.alpha is None or context.alpha.numel() == 1:
            return nullcontext()
        group, weight = token // routed.per_group, context.path_weight
        return context.at(
            context.alpha.reshape(-1)[group],
            None if context.train_groups is None else routed.train[index],
            None if context.path_start is None else routed.path[index],
            None if weight is None else weight[group],
        )

    def _with_gradients_of_idle(self, y: Tensor, routed: _Routed) -> Tensor:
        """Zero gradients for the triplets of experts that no training token chose: data-parallel wrappers wait for every parameter's."""
        if self.context.train_groups == 0 or not torch.is_grad_enabled():
            return y
        idle = [
            param
            for name in self.adapted
            for layer, count in zip(self.layers(name), routed.train, strict=True)
            if not count
            for param in layer.masters
            if param.requires_grad
        ]
        return _Joined.apply(y, *idle) if idle else y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class _Joined(torch.autograd.Function):
    """The first argument; the others get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *params: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in params]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like)


def _unsupported(experts: nn.Module, parameter: str) -> str | None:
    """Why the experts of this parameter cannot be adapted, or None where they can."""
    value = getattr(experts, parameter)
    if value.ndim != 3:
        return f"it has {value.ndim} dimensions, not three; name its module in target_modules"
    missing = [flag for flag in _FLAGS if not hasattr(experts, flag)]
    if missing or parameter not in _PARAMETERS:
        return (
            f"{type(experts).__name__} is none of the experts that transformers' use_experts_implementation describes "
            f"(no {', '.join(missing) or 'such parameter'}), so that what it computes is unknown"
        )
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts lie on several devices (expert parallelism)"
    if type(value) not in _PLAIN or not value.is_floating_point() or value.dtype.itemsize < 2:
        return f"it is stored as {type(value).__name__} of {value.dtype}"
    return None


def find_slices(model: nn.Module, config: IGUConfig, saved: list[str]) -> dict[str, str]:
    """Slice -> parameter (``...experts.gate_up_proj.3`` -> ``...experts.gate_up_proj``) of what ``target_parameters`` names.

    Raises:
        ValueError: a name matches nothing, or a parameter that cannot be adapted (says why).
    """
    values = dict(model.named_parameters(remove_duplicate=False))
    closed = [*saved, *config.exclude_modules]
    found: dict[str, str] = {}
    for wanted in config.target_parameters:
        matches = [name for name in values if name == wanted or name.endswith("." + wanted)]
        if not matches:
            endings = sorted({name.rpartition(".")[2] for name, value in values.items() if value.ndim == 3})
            raise ValueError(
                f"expected target_parameters to name parameters of the model, got {wanted!r}, which matches none."
                f"{nearest(wanted, values)} 3-D parameters end in: {', '.join(endings) or 'none'}"
            )
        for name in matches:
            if any(name.startswith(f"{c}.") or f".{c}." in name for c in closed):
                continue
            owner, _, parameter = name.rpartition(".")
            reason = _unsupported(model.get_submodule(owner), parameter)
            if reason:
                raise ValueError(
                    f"expected target_parameters to name 3-D parameters of experts, got {name!r}: {reason}"
                )
            found |= {f"{name}.{index}": name for index in range(values[name].shape[0])}
    return found


def bases_of(model: nn.Module) -> dict[str, Base]:
    """Everything in a model that an adapter can sit on, in model order: layers by their full names, slices of experts by theirs."""
    found: dict[str, Base] = {}
    for name, module in model.named_modules():
        base = describe(module)
        if base is not None:
            found[name] = base
        for parameter in _PARAMETERS:
            value = module._parameters.get(parameter)
            if value is not None and value.ndim == 3 and _unsupported(module, parameter) is None:
                for index in range(value.shape[0]):
                    found[f"{name}.{parameter}.{index}"] = ExpertBase(ExpertSlice(module, parameter, index))
    return found


def wrap_experts(layers: list[AdaptedLayer]) -> dict[int, nn.Module]:
    """What replaces the modules of experts whose slices are among ``layers``, by the modules' ids."""
    grouped: dict[int, tuple[nn.Module, dict[str, list[ExpertLinear]]]] = {}
    for layer in layers:
        if isinstance(layer, ExpertLinear):
            part: ExpertSlice = layer.base_layer
            _, adapters = grouped.setdefault(id(part.experts), (part.experts, {}))
            adapters.setdefault(part.parameter, []).append(layer)
    return {key: AdaptedExperts(module, adapters).train(module.training) for key, (module, adapters) in grouped.items()}
