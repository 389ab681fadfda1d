"""What a checkpoint holds beside the adapter: optimizer, random number generators and the gradients of a step under way.

Every function that reads comes in two parts: one that checks everything and changes nothing, and what it returns, which makes the change.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .adapter_file import is_count
from .controller_state import check_generator
from .packing import pack, unpack

_GRADIENT = "gradient."


# -- optimizer --------------------------------------------------------------------------------------------------------


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state as JSON-able values and ``tensors``: groups, states, and which parameters they belong to.

    Raises:
        TypeError: the optimizer keeps something that is neither a tensor nor a plain value.
    """
    state = optimizer.state_dict()
    return {
        "kind": _kind(optimizer),
        "parameters": _parameters(model, optimizer),
        "groups": pack(state["param_groups"], "the optimizer's groups", tensors),
        "state": pack(state["state"], "state", tensors),
    }


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's class, without accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[Any]]:
    """Name (None: not the model's) and shape of each parameter, in the optimizer's order."""
    names = {id(param): _bare(name) for name, param in model.named_parameters()}
    ours = [param for group in optimizer.param_groups for param in group["params"]]
    return [[names.get(id(param)), list(param.shape)] for param in ours]


def _bare(name: str) -> str:
    """Without what DistributedDataParallel and torch.compile put into names."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def check_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Any, tensors: dict[str, Tensor], where: str
) -> Callable[[], None]:
    """Check a state of :func:`optimizer_state` against ``optimizer``; returns what loads it. Takes its tensors out of ``tensors``.

    Raises:
        ValueError: it is damaged, or of an optimizer of another kind, other groups or other parameters.
    """
    if not isinstance(saved, dict) or not saved.keys() >= {"kind", "parameters", "groups", "state"}:
        raise ValueError(f"expected an optimizer's state in {where}, got {saved!r:.200}; the file is damaged")
    groups = unpack(saved["groups"], f"the optimizer's groups in {where}", tensors)
    state = unpack(saved["state"], f"the optimizer's state in {where}", tensors)
    merged = _check_groups(optimizer, groups, where)
    if saved["kind"] not in (None, _kind(optimizer)):
        raise ValueError(
            f"expected the optimizer saved in {where}, {saved['kind']!r:.100}, got {_kind(optimizer)}; build the same one"
        )
    mine = _parameters(model, optimizer)
    if saved["parameters"] is not None and saved["parameters"] != mine:
        theirs = saved["parameters"] if isinstance(saved["parameters"], list) else []
        pairs: list[tuple[Any, Any]] = [(a, b) for a, b in zip(theirs, mine, strict=False) if a != b] or [
            (len(theirs), len(mine))
        ]
        raise ValueError(
            f"expected an optimizer over the parameters saved in {where}, in their order, got others: {pairs[0][0]!r:.200} then, "
            f"{pairs[0][1]!r:.200} now; build it the same way"
        )
    if not isinstance(state, dict) or not all(
        isinstance(entries, dict) and (is_count(index) and index < len(mine))
        for index, entries in state.items()
        if not isinstance(index, str)
    ):
        raise ValueError(
            f"expected states of {len(mine)} parameters in {where}, got {state!r:.200}; the file is damaged"
        )

    def load() -> None:
        optimizer.load_state_dict({"state": state, "param_groups": merged})
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for index, entries in state.items():
            held: dict[str, Any] = optimizer.state.get(params[index], {}) if is_count(index) else {}
            for key, value in entries.items():
                if key in held and not _alike(held[key], value):
                    held[key] = _on_device(value, params[index].device)

    return load


def _alike(held: Any, saved: Any) -> bool:
    """Whether ``Optimizer.load_state_dict`` has kept a value: it casts codes in uint8 to float, and makes other strings of strings."""
    if isinstance(saved, Tensor):
        return isinstance(held, Tensor) and held.dtype == saved.dtype
    if type(held) is not type(saved):
        return False
    if isinstance(saved, dict):
        return held.keys() == saved.keys() and all(_alike(held[key], saved[key]) for key in saved)
    if isinstance(saved, (list, tuple)):
        return len(held) == len(saved) and all(_alike(a, b) for a, b in zip(held, saved, strict=True))
    return held == saved or held != held


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on_device(item, device) for key, item in value.items()}
    return type(value)(_on_device(item, device) for item in value) if isinstance(value, (list, tuple)) else value


def _check_groups(optimizer: torch.optim.Optimizer, groups: Any, where: str) -> list[dict[str, Any]]:
    """The optimizer's groups with the saved values; a value that is a tensor there (a learning rate of a captured graph) stays one."""
    mine = optimizer.state_dict()["param_groups"]
    fine = isinstance(groups, list) and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
    if not fine or [len(g["params"]) for g in groups] != [len(g["params"]) for g in mine]:
        raise ValueError(
            f"expected an optimizer with the parameter groups saved in {where}, got other groups; build it the same way"
        )
    merged = []
    for own, theirs in zip(mine, groups, strict=True):
        group = {**own, **theirs, "params": own["params"]}
        for key, value in own.items():
            if isinstance(value, Tensor) and isinstance(group[key], (int, float, Tensor)):
                group[key] = torch.as_tensor(group[key], dtype=value.dtype, device=value.device).reshape(value.shape)
        merged.append(group)
    return merged


def from_format_1(
    trainer: dict[str, Any], tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, where: str
) -> None:
    """Bring a ``checkpoint.json`` of format 1 and its tensors into today's form, in place. It recorded no parameters: shapes are compared.

    Raises:
        ValueError: it is damaged.
    """
    groups, scalars = trainer.get("groups"), trainer.get("scalars")
    if not isinstance(groups, list) or not isinstance(scalars, dict) or "extra" not in trainer:
        raise ValueError(f'expected "groups", "scalars" and "extra" in {where}, got {sorted(trainer)}; it is damaged')
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("rng."):
            continue
        index, _, name = key.partition(".")
        if not (index.isascii() and index.isdigit()) or not name or int(index) >= len(params):
            raise ValueError(f"expected optimizer states in {where}, got the tensor {key!r}; the file is foreign")
        shape = params[int(index)].shape
        dims = zip(value.shape, shape, strict=False)
        if value.numel() != 1 and (value.ndim != len(shape) or any(a not in (1, b) for a, b in dims)):
            raise ValueError(
                f"expected the optimizer state {key!r} in {where} to fit a parameter of shape {tuple(shape)}, got {tuple(value.shape)}"
            )
        state.setdefault(int(index), {})[name] = {"$tensor": key}
    for index, entries in scalars.items():
        if not index.isdigit() or not isinstance(entries, dict):
            raise ValueError(f"expected optimizer states in {where}, got {index!r}; the file is damaged")
        state.setdefault(int(index), {}).update(entries)
    trainer["optimizer"] = {
        "kind": None, "parameters": None, "groups": groups, "state": {"$dict": [list(pair) for pair in state.items()]},
    }  # fmt: skip
    trainer["random"] = {"cuda": sum(key.startswith("rng.cuda.") for key in tensors)}


# -- random numbers ---------------------------------------------------------------------------------------------------


def random_state(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """States of the generators of PyTorch (CPU and CUDA), NumPy and Python that programs draw from without naming one."""
    tensors["rng.cpu"] = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    tensors |= {f"rng.cuda.{i}": state for i, state in enumerate(cuda)}
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["rng.python"] = torch.tensor(words, dtype=torch.int64)
    tensors["rng.numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return {
        "cuda": len(cuda),
        "python": pack([version, gauss], "Python's random numbers"),
        "numpy": pack([name, position, has_gauss, cached], "NumPy's random numbers"),
    }


def check_random(saved: Any, tensors: dict[str, Tensor], where: str) -> Callable[[], None]:
    """Check states of :func:`random_state`; returns what sets them. Takes its tensors out of ``tensors``.

    CUDA devices that are not here are left out, and a file of format 1 leaves Python's and NumPy's generators alone.

    Raises:
        ValueError: they are damaged.
    """
    if not isinstance(saved, dict) or not is_count(saved.get("cuda")):
        raise ValueError(f"expected the states of random number generators in {where}, got {saved!r:.200}")
    cpu = check_generator(tensors.pop("rng.cpu", None), "PyTorch", where)
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = {}
    for i in range(min(saved["cuda"], len(tensors))):
        state = tensors.pop(f"rng.cuda.{i}", None)
        if i < here:
            cuda[i] = check_generator(state, f"CUDA device {i}", where, f"cuda:{i}")
    others: list[Callable[[], None]] = []
    try:
        if "python" in saved:
            version, gauss = unpack(saved["python"], where, {})
            ours = (version, tuple(tensors.pop("rng.python").tolist()), gauss)
            random.Random(0).setstate(ours)
            others.append(lambda: random.setstate(ours))
        if "numpy" in saved:
            name, position, has_gauss, cached = unpack(saved["numpy"], where, {})
            keys = tensors.pop("rng.numpy").numpy()
            theirs = (name, keys.astype(np.uint32), position, has_gauss, cached)
            if keys.min(initial=0) < 0 or keys.max(initial=0) >= 2**32 or not 0 <= position <= 624:
                raise ValueError("words of other than 32 bits")
            np.random.RandomState(0).set_state(theirs)
            others.append(lambda: np.random.set_state(theirs))
    except (ValueError, TypeError, KeyError, OverflowError, IndexError) as error:
        raise ValueError(f"expected the random numbers of Python and NumPy in {where}, got {error!r:.200}") from error

    def restore() -> None:
        torch.set_rng_state(cpu)
        for i, state in cuda.items():
            torch.cuda.set_rng_state(state, i)
        for put in others:
            put()

    return restore


# -- the step under way -----------------------------------------------------------------------------------------------


def gradients(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the gradients of the trainable parameters into ``tensors``."""
    for name, param in model.named_parameters():
        if param.requires_grad and param.grad is not None:
            tensors[_GRADIENT + name] = param.grad


def check_gradients(model: nn.Module, tensors: dict[str, Tensor], where: str) -> Callable[[], None]:
    """Check what :func:`gradients` saved; returns what puts them back, and clears all others. Takes them out of ``tensors``.

    Raises:
        ValueError: one is of another shape, or of a parameter that is not trained.
    """
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    found = {key[len(_GRADIENT) :]: tensors.pop(key) for key in list(tensors) if key.startswith(_GRADIENT)}
    for name, value in found.items():
        if name not in trained or value.shape != trained[name].shape or value.dtype != trained[name].dtype:
            raise ValueError(
                f"expected gradients of the trained parameters in {where}, got one of {name!r} of shape {tuple(value.shape)} and dtype "
                f"{value.dtype}; it is damaged or of another model"
            )

    def restore() -> None:
        for name, param in trained.items():
            param.grad = found[name].to(param.device).clone() if name in found else None

    return restore
