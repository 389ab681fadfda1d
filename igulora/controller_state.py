"""A controller's state: what is saved, and checked as a whole before a controller takes any of it. The other half of ``controller.py``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adapter_file import is_count, is_event
from .allocation import allocator_of
from .distributed import find_averaging

if TYPE_CHECKING:
    from .controller import Controller

_COUNTS = ("global_step", "updates", "initial_budget")


def controller_state(controller: Controller) -> dict[str, Any]:
    """``{"tensors": name -> tensor on the host, "meta": JSON-able}``, what :meth:`Controller.state_dict` returns."""
    bank = controller.bank
    bank.refresh()
    passes, scores = controller.passes.state_dict(), controller.importance.state_dict()
    tensors: dict[str, Tensor] = {
        "live": bank.live,
        **{k: v for k, v in scores.items() if isinstance(v, Tensor)},
        **passes["tensors"],
    }
    meta = {
        "modules": {name: layer.r for name, layer in zip(bank.names, bank.layers, strict=True)},
        "global_step": controller.global_step,
        "start_step": controller._start_step,
        "updates": scores["updates"],
        "initial_budget": controller.allocator.initial_budget,
        "passes": passes["meta"],
        # Of a step under way: its gradients are the model's to keep (save_checkpoint does).
        "pending": {
            "unstepped": bank.context.unstepped,
            "regularised": controller._regularised,
            "ran_backward": controller._ran_backward,
        },
        **controller.log.state_dict(),
    }
    return {"tensors": {k: v.detach().cpu().clone() for k, v in tensors.items()}, "meta": meta}


@torch.no_grad()
def load_controller_state(controller: Controller, state: dict[str, Any]) -> None:
    """Put a state of :func:`controller_state` into a controller of the same adapter, once all of it is checked.

    Raises:
        ValueError: the state is damaged or belongs to another adapter; nothing is changed then.
    """
    bank = controller.bank
    bank.refresh()
    controller._follow_device()
    check_controller_state(controller, state)
    tensors, meta = state["tensors"], state["meta"]
    controller.importance.load_state_dict({**tensors, "updates": meta["updates"]})
    bank.live = tensors["live"].to(bank.device, bank.dtype)
    controller.allocator = allocator_of(bank, controller.config, initial=int(meta["initial_budget"]))
    controller.passes.load_state_dict(tensors, meta["passes"])
    controller.global_step = int(meta["global_step"])
    controller._start_step = int(meta.get("start_step", 0))
    controller.log.load_state_dict(meta)
    controller._reset_step()
    pending = meta.get("pending")  # format 1 saved between steps only
    if pending is not None:
        bank.context.unstepped = pending["unstepped"]
        controller._regularised, controller._ran_backward = pending["regularised"], pending["ran_backward"]
        averaging = find_averaging(controller.model)
        if averaging is not None:
            averaging.averaged = True  # save_checkpoint did it with what it saved


def check_controller_state(controller: Controller, state: dict[str, Any]) -> None:
    """Raise unless ``state`` is one of :meth:`Controller.state_dict` for the adapter of ``controller``.

    Raises:
        ValueError: it is incomplete, damaged, or of another adapter; says which part.
    """
    tensors, meta = state.get("tensors"), state.get("meta")
    if not isinstance(tensors, dict) or not isinstance(meta, dict):
        raise ValueError(f'expected a controller state with "tensors" and "meta", got the keys {sorted(state)}')
    _check_modules(controller, meta)
    for key in _COUNTS:
        if not is_count(meta.get(key)):
            raise _damaged(f"a number of {key!r}", meta.get(key))
    if not is_count(meta.get("start_step", 0)):
        raise _damaged("a number of 'start_step'", meta["start_step"])
    names = controller.bank.names
    if not isinstance(meta.get("history"), list) or not all(is_event(e, set(names)) for e in meta["history"]):
        raise _damaged("a history of step, budget and ranks", meta.get("history"))
    _check_series(meta)
    _check_pending(meta)
    _check_passes(meta.get("passes"))
    _check_tensors(controller, tensors, meta["passes"]["in_window"])


def _damaged(wanted: str, got: object) -> ValueError:
    return ValueError(f"expected {wanted} in the controller's state, got {got!r:.200}; the state is damaged")


def _check_modules(controller: Controller, meta: dict[str, Any]) -> None:
    bank, theirs = controller.bank, meta.get("modules")
    mine = {name: layer.r for name, layer in zip(bank.names, bank.layers, strict=True)}
    if not isinstance(theirs, dict) or not all(is_count(rank) for rank in theirs.values()):
        raise _damaged("the ranks of the modules", theirs)
    if theirs != mine:
        raise ValueError(
            f"expected a controller state for {bank.triplets} triplets of {len(mine)} modules, got one for {sum(theirs.values())} of "
            f"{len(theirs)}: it was saved for another adapter"
        )


def _check_series(meta: dict[str, Any]) -> None:
    trace, series, width = meta.get("trace"), meta.get("series"), len(meta["modules"])
    if not isinstance(trace, list) or not all(isinstance(name, str) for name in trace):
        raise _damaged("names of traced modules", trace)

    def is_row(row: Any) -> bool:
        # None: what format 1 made of NaN.
        return isinstance(row, list) and len(row) == width and all(isinstance(v, (int, float, type(None))) for v in row)

    def is_entry(entry: Any) -> bool:
        return (
            isinstance(entry, list)
            and len(entry) == 2
            and is_count(entry[0])
            and isinstance(entry[1], list)
            and len(entry[1]) == 3
            and all(is_row(row) for row in entry[1])
        )

    if not isinstance(series, list) or not all(is_entry(entry) for entry in series):
        raise _damaged("a series of steps and statistics", series)


def _check_pending(meta: dict[str, Any]) -> None:
    pending = meta.get("pending", {"unstepped": 0, "regularised": False, "ran_backward": False})
    fine = isinstance(pending, dict) and pending.keys() == {"unstepped", "regularised", "ran_backward"}
    if not fine or not is_count(pending["unstepped"]):
        raise _damaged("the step under way", pending)
    if not isinstance(pending["regularised"], bool) or not isinstance(pending["ran_backward"], bool):
        raise _damaged("the step under way", pending)


def _check_passes(passes: Any) -> None:
    if not isinstance(passes, dict) or not is_count(passes.get("in_window")):
        raise _damaged("a position in the window", passes)
    quadrature = passes.get("quadrature")
    if not isinstance(quadrature, dict) or not is_count(quadrature.get("turn")):
        raise _damaged("a position among the nodes", quadrature)
    plan = quadrature.get("plan")

    def is_node(node: Any) -> bool:
        numbers = isinstance(node, list) and len(node) == 2 and all(type(v) in (int, float) for v in node)
        return numbers and all(math.isfinite(v) for v in node)

    if not isinstance(plan, list) or not all(is_node(node) for node in plan):
        raise _damaged("planned nodes and their factors", plan)


def _check_tensors(controller: Controller, tensors: dict[str, Tensor], in_window: int) -> None:
    bank, config = controller.bank, controller.config
    flat = tuple(bank.weight.shape)
    wanted: dict[str, tuple[int, ...]] = {
        "live": (bank.triplets,),
        "mean": flat,
        "deviation": flat,
        "terms": (3, bank.triplets),
    }
    # Inside a window the sums so far: without them its score would be another one.
    if in_window and not controller.passes.reads_grad:
        wanted["path"] = flat
        if config.aggregate == "absolute":
            wanted["absolute"] = flat
    optional = {"path", "absolute", "generator"}
    for name in tensors:
        if name not in wanted and name not in optional:
            raise _damaged(f"only {', '.join(sorted(wanted))}", name)
    for name in ("path", "absolute"):
        if name in tensors:
            wanted.setdefault(name, flat)
    for name, shape in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
            got = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(
                f"expected {name!r} of shape {shape} in the controller's state, got {got}; it is damaged or of another adapter"
            )
    live = tensors["live"]
    if not bool(((live == 0) | (live == 1)).all()):
        raise _damaged("a live mask of 0 and 1", live.unique().tolist()[:4])
    check_generator(tensors.get("generator"), "the nodes", "the controller's state")


def check_generator(state: Tensor | None, what: str, where: str, device: torch.device | str = "cpu") -> Tensor:
    """The state of a random number generator, tried out on one that nobody uses.

    Raises:
        ValueError: it is none.
    """
    if state is None or state.dtype != torch.uint8 or state.ndim != 1:
        got = "nothing" if state is None else f"{tuple(state.shape)} {state.dtype}"
        raise ValueError(f"expected the random numbers of {what} in {where}, got {got}; it is damaged")
    try:
        torch.Generator(device).set_state(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"expected the random numbers of {what} in {where}: {error}; it is damaged") from error
    return state
