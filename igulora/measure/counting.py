"""Launches, host syncs, bytes and FLOPs of what runs inside a block, counted at the dispatcher, by part of the step.

Nothing is timed and no device is needed: counts follow from shapes, on the CPU, on the meta device or on a GPU alike, and say what a GPU
would have to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .costs import FREE, Cost, tensors_in
from .operators import Architecture, cost_of

# Operators that hand a value to the host, or whose result's shape depends on values.
SYNCS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
# Methods that copy a tensor to the host, which leave no operator behind where it lies there already.
HOST_METHODS = {Tensor.tolist: "Tensor.tolist", Tensor.cpu: "Tensor.cpu", Tensor.numpy: "Tensor.numpy"}
WHOLE = "step"
# A pass of path rows alone has no products of another part.
PATH_PASS = "path pass"


class Counting(TorchDispatchMode):
    """Counts operators that would each be at least one launch on a GPU, and what they move and compute.

    Neither views nor mere allocation count. Numbers drawn from a CPU generator, and what is computed from nothing else, stay on the host
    on any machine: neither launches nor syncs. Of a model that lies elsewhere, everything computed from CPU tensors alone stays there.

    Args:
        part: says which part of the step the operator belongs to that is being dispatched; one part, "step", by default. igulora's
            operators know better: a layer's cost goes to "base products" and "adapter products", that of the others to "orthogonality",
            "scores" and "allocation". Only "path pass", as the answer, keeps all of them.
        device: of the model; by default the CPU.
        where: the architecture that igulora's operators are counted for (see :func:`igulora.measure.operators.cost_of`).

    Attributes:
        launches: calls by operator, one of igulora's counting once, whatever its kernels.
        syncs: waits for the device, by operator or method; ``syncs_by_part``: the same by part.
        costs: by part; here ``launches`` are those of kernels.
    """

    def __init__(
        self,
        part: Callable[[], str] | None = None,
        device: torch.device | str = "cpu",
        where: Architecture | None = None,
    ) -> None:
        super().__init__()
        self._part = part
        self._device = torch.device(device).type
        self._where = where
        self._host: dict[int, UntypedStorage] = {}
        self._methods = _HostMethods(self)
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.syncs_by_part: Counter[str] = Counter()
        self.costs: dict[str, Cost] = {}

    def __enter__(self) -> Counting:
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    @property
    def total(self) -> Cost:
        """Of all parts."""
        return sum(self.costs.values(), Cost())

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator; a subclass may answer in its stead."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        short = name.split("::")[1]
        result = self.run(func, args, kwargs)
        given = tensors_in((args, kwargs))
        if not given and not tensors_in(result):
            return result  # a mark for the profiler
        if self._on_host(given, kwargs, result):
            for tensor in tensors_in(result):
                self._mark(tensor)
            return result
        part = WHOLE if self._part is None else self._part()
        if short in SYNCS or _masks_by_index(short, args) or self._leaves_device(short, given, result, kwargs):
            self.sync(name, part)
        elif not func.is_view and short not in FREE and not self._enters_device(short, given, result):
            self.launches[name] += 1
            for own, cost in cost_of(func, args, kwargs, result, self._where).items():
                key = part if self._part is None or part == PATH_PASS else own or part
                self.costs[key] = self.costs.get(key, Cost()) + cost
        return result

    def sync(self, name: str, part: str | None = None) -> None:
        """Note a wait for the device."""
        self.syncs[name] += 1
        self.syncs_by_part[part or (WHOLE if self._part is None else self._part())] += 1

    # -- what lies on the host ----------------------------------------------------------------------------------------

    def is_host(self, tensor: Tensor) -> bool:
        """Whether a tensor would lie on the host on any machine."""
        if self._device != "cpu":
            return tensor.device.type == "cpu"
        return tensor.untyped_storage()._cdata in self._host

    def _mark(self, tensor: Tensor) -> None:
        if self._device == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()  # kept, so that its address is not given away again
            self._host[storage._cdata] = storage

    def _on_host(self, given: list[Tensor], kwargs: dict[str, Any], result: Any) -> bool:
        if self._device != "cpu":
            results = tensors_in(result)
            return bool(given or results) and all(t.device.type == "cpu" for t in (*given, *results))
        generator = kwargs.get("generator")
        if generator is not None and all(self.is_host(t) for t in given):
            return generator.device.type == "cpu"
        return bool(given) and all(self.is_host(t) for t in given)

    def _leaves_device(self, short: str, given: list[Tensor], result: Any, kwargs: dict[str, Any]) -> bool:
        """A copy to the host that waits."""
        if self._device == "cpu" or short not in ("_to_copy", "copy_") or kwargs.get("non_blocking"):
            return False
        (out,) = tensors_in(result)
        return out.device.type == "cpu" and any(t.device.type != "cpu" for t in given)

    def _enters_device(self, short: str, given: list[Tensor], result: Any) -> bool:
        """A copy from the host: a transfer, no kernel."""
        return self._device != "cpu" and short == "_to_copy" and all(t.device.type == "cpu" for t in given)


class _HostMethods(TorchFunctionMode):
    """Notes calls of :data:`HOST_METHODS` on tensors that a GPU would have."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = HOST_METHODS.get(func)
        if name is not None and args[0].device.type == "cpu" and not self.counting.is_host(args[0]):
            self.counting.sync(name)
        return func(*args, **(kwargs or {}))


def _masks_by_index(short: str, args: tuple[Any, ...]) -> bool:
    """Whether an indexing operator is given a boolean mask, whose count of true entries the host must know."""
    if short not in ("index", "index_put", "index_put_") or len(args) < 2:
        return False
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
