"""Which modules of a model are adapted, and which are trained whole."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .bases import EmbeddingBase, describe
from .config import IGUConfig
from .errors import nearest
from .layers import AdaptedLayer
from .saved import SavedModule


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def tied_weights(model: nn.Module) -> set[int]:
    """Ids of parameters that occur under several names (an output head tied to the embedding)."""
    seen: dict[int, tuple[int, str]] = {}
    tied: set[int] = set()
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) in seen and seen[id(param)] != (id(module), name):
                tied.add(id(param))
            seen.setdefault(id(param), (id(module), name))
    return tied


def _bypassed(module: nn.Module) -> bool:
    """Whether the parent reads this layer's weight itself and never calls it (the output projection of nn.MultiheadAttention)."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def find_saved(model: nn.Module, config: IGUConfig) -> list[str]:
    """Full names of the modules named in ``modules_to_save``.

    Raises:
        ValueError: a name matches no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for wanted in config.modules_to_save:
        matches = [name for name in names if _ends_with(name, wanted)]
        if not matches:
            raise ValueError(
                f"expected modules_to_save to name modules of the model, got {wanted!r}, which matches none."
                f"{nearest(wanted, {n.split('.')[-1] for n in names})}"
            )
        found += matches
    found = list(dict.fromkeys(found))
    # A module inside another one to save is trained as a part of that one.
    return [n for n in found if not any(n.startswith(outer + ".") for outer in found)]


def find_targets(model: nn.Module, config: IGUConfig, saved: list[str]) -> list[str]:
    """Full names of the layers to adapt, in model order.

    "all-linear" takes every linear layer (``nn.Linear``, quantised or not, and transformers' ``Conv1D``) but the output head, layers with
    tied weights and modules to save. A string is a regular expression that must match a whole name; a list holds name endings: these two
    can also name embeddings (tied to the head or not) and convolutions.

    Raises:
        ValueError: nothing matched (lists the linear layers there are), a name of the list matched nothing, no adapter exists for a match,
            or its weight is tied.
        TypeError: ``target_modules`` is neither a string nor a list of strings.
    """
    wanted = config.target_modules
    if not isinstance(wanted, str) and not (
        isinstance(wanted, (list, tuple)) and all(isinstance(w, str) for w in wanted)
    ):
        raise TypeError(
            f'expected target_modules to be "all-linear", a regular expression or a list of names, got {wanted!r}'
        )
    modules = {name: module for name, module in model.named_modules() if name}
    for ending in config.exclude_modules:
        if not any(_ends_with(n, ending) for n in modules):
            raise ValueError(
                f"expected exclude_modules to name modules of the model, got {ending!r}, which matches none."
                f"{nearest(ending, {n.split('.')[-1] for n in modules})}"
            )
    inside_saved = [n for n in modules if any(n == s or n.startswith(s + ".") for s in saved)]
    excluded = {n for n in modules for e in config.exclude_modules if _ends_with(n, e)} | set(inside_saved)
    tied, head = tied_weights(model), _output_head(model)
    bases = {n: describe(m) for n, m in modules.items()}
    linears = [n for n, base in bases.items() if base is not None and base.linear]
    if wanted == "all-linear":
        found = [
            n
            for n in linears
            if n not in excluded
            and modules[n] is not head
            and id(modules[n].weight) not in tied
            and not _bypassed(modules[n])
        ]
    elif isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ValueError(f"expected target_modules to be a regular expression, got {wanted!r}: {error}") from error
        found = [n for n in modules if pattern.fullmatch(n) and n not in excluded]
    else:
        found = [n for n in modules if n not in excluded and any(_ends_with(n, w) for w in wanted)]
        endings = {n.split(".")[-1] for n in linears}
        others = {n.split(".")[-1] for n, base in bases.items() if base is not None} - endings
        for w in wanted:
            if not any(_ends_with(n, w) for n in modules):
                raise ValueError(
                    f"expected target_modules to name layers of the model, got {w!r}, which matches none.{nearest(w, endings | others)} "
                    f"Linear layers end in: {', '.join(sorted(endings)) or 'none'}"
                    + (f"; embeddings and convolutions in: {', '.join(sorted(others))}" if others else "")
                )
    if not found and not (config.target_parameters and not wanted):
        shown = ", ".join(linears[:8]) + (", ..." if len(linears) > 8 else "")
        raise ValueError(
            f"expected target_modules={wanted!r} to match at least one linear layer, embedding or convolution, got none. "
            f"The model's linear layers: {shown or 'none'}"
        )
    for name in found:
        module = modules[name]
        if isinstance(module, (AdaptedLayer, SavedModule)):
            raise ValueError(f"expected a plain model, got {name!r} adapted already; call igulora.remove(model) first")
        base = bases[name]
        if base is None:
            raise ValueError(
                "expected target_modules to match linear layers, embeddings and convolutions only, got "
                f"{name!r} ({type(module).__name__}); name such layers or exclude it with exclude_modules"
            )
        if _bypassed(module):
            raise ValueError(
                f"expected layers that their parent calls, got {name!r}: nn.MultiheadAttention reads its weight directly, so that an "
                "adapter there would do nothing; leave it out of target_modules"
            )
        if id(module.weight) in tied and not isinstance(base, EmbeddingBase):
            raise ValueError(
                f"expected layers with weights of their own, got {name!r}, whose weight is tied to another module; "
                "leave it out of target_modules"
            )
    return found
