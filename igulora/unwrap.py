"""The adapted model inside its wrappers (DistributedDataParallel, torch.compile), and the wrappers that adapters cannot live in."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

_INSTEAD = (
    "adapters are small, so there is nothing to shard in their gradients and optimizer states: use DistributedDataParallel, or FSDP2 by "
    "igulora.distributed.shard where the base model is too large for one device"
)

_PARTS = ("lora_P", "lora_E", "lora_Q")


def unwrap(model: nn.Module) -> nn.Module:
    """The adapted model that ``model`` is or wraps; ``model`` itself where none is found."""
    innermost = _chain(model)[-1]
    return innermost if _is_adapted(innermost) else model


def _is_adapted(model: nn.Module) -> bool:
    """Whether a model knows its bank: igulora.adapt's, or PEFT's, which passes its inner model's attributes on (compiled ones do, too)."""
    return "igulora_bank" in vars(model) or ("_orig_mod" not in model._modules and hasattr(model, "igulora_banks"))


def _chain(model: nn.Module) -> list[nn.Module]:
    """``model``, what it wraps (``module``; ``_orig_mod`` of torch.compile), and so on down to the adapted model."""
    found = [model]
    while not _is_adapted(found[-1]):
        inner = found[-1]._modules.get("_orig_mod", found[-1]._modules.get("module"))
        if inner is None:
            inner = found[-1]._modules.get("_fsdp_wrapped_module")
        if inner is None:
            break
        found.append(inner)
    return found


def keeper(model: nn.Module) -> nn.Module:
    """The module that keeps what igulora knows of an adapted model, the same one whichever of its wrappers is asked.

    It has ``igulora_bank`` (igulora.adapt) or ``igulora_banks`` (PEFT, whose model and tuner lie around it) of its own; the model itself
    where none is found.
    """
    inner = unwrap(model)
    return next((m for m in inner.modules() if keeps_adapters(m)), inner)


def keeps_adapters(module: nn.Module) -> bool:
    """Whether a module has the bank of an adapted model, or PEFT's banks, of its own."""
    return not vars(module).keys().isdisjoint(("igulora_bank", "igulora_banks"))


def find_ddp(model: nn.Module) -> Any:
    """The DistributedDataParallel around the adapted model, if ``model`` is or holds one."""
    return next((m for m in _chain(model) if isinstance(m, nn.parallel.DistributedDataParallel)), None)


def check_wrappers(model: nn.Module) -> None:
    """Raise where a wrapper around or inside ``model`` takes the adapters' parameters out of their flat buffers.

    Raises:
        ValueError: DeepSpeed (any ZeRO stage), FSDP1, DataParallel, or FSDP2 with adapters sharded; says what to use instead.
    """
    for wrapper in _chain(model):
        kinds = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(wrapper).__mro__}
        if ("torch", "DataParallel") in kinds:
            raise ValueError(
                "expected one process per device, got a model in nn.DataParallel, whose replicas hold copies of the adapters; "
                "use DistributedDataParallel, or show one device to the process"
            )
        if any(package == "deepspeed" for package, _ in kinds):
            raise ValueError(f"expected a model outside DeepSpeed, got a {type(wrapper).__name__}; {_INSTEAD}")
    if _accelerate_runs_deepspeed():
        raise ValueError(f"expected an Accelerator without DeepSpeed, got one with a DeepSpeed plugin; {_INSTEAD}")
    inner = unwrap(model)
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in (*_chain(model), *inner.modules())):
        raise ValueError(
            "expected FSDP2 for a model with adapters, got FullyShardedDataParallel (FSDP1), which flattens their parameters into its own; "
            "call igulora.distributed.shard(model) instead"
        )
    for name, layer in _trained_layers(model):
        for part in _PARTS:
            param = getattr(layer, part)
            if hasattr(param, "ds_id") or getattr(param, "_hp_mapping", None) is not None:
                raise ValueError(
                    f"expected plain parameters, got {name}.{part} partitioned by DeepSpeed ZeRO; {_INSTEAD}"
                )
            if not isinstance(param, nn.Parameter) or (part != "lora_E" and param.ndim < 2):
                raise ValueError(
                    f"expected plain parameters, got {name}.{part} flattened by a wrapper (FSDP1 does that); {_INSTEAD}"
                )
            if is_sharded(param):
                raise ValueError(
                    f"expected the adapters replicated in every process, got {name}.{part} sharded; shard the base model alone: "
                    "igulora.distributed.shard(model), or fully_shard(..., ignored_params=igulora.distributed.replicated_parameters(model))"
                )


def _trained_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and layers of the banks that are trained, as they are: a refresh would fail on what is to be refused."""
    kept = vars(keeper(model))
    banks = [kept["igulora_bank"]] if "igulora_bank" in kept else list(kept.get("igulora_banks", {}).values())
    return [
        pair
        for bank in banks
        if any(getattr(layer, part).requires_grad for layer in bank.layers for part in _PARTS)
        for pair in zip(bank.names, bank.layers, strict=True)
    ]


def is_sharded(value: object) -> bool:
    """Whether a tensor is a DTensor; imports nothing for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def placed_as(update: Tensor, weight: Tensor) -> Tensor:
    """``update``, which every process has whole, as ``weight`` is: this process's part of it where that is sharded."""
    if not is_sharded(weight):
        return update
    module = sys.modules["torch.distributed.tensor"]
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    return module.distribute_tensor(update, mesh, placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Put back what FSDP2 keeps gathered after a forward: a change of gathered weights would be lost."""
    module = sys.modules.get("torch.distributed.fsdp")
    for part in model.modules() if module is not None else ():
        if isinstance(part, module.FSDPModule):  # type: ignore[union-attr]
            part.reshard()


def _accelerate_runs_deepspeed() -> bool:
    state = sys.modules.get("accelerate.state")
    shared = getattr(getattr(state, "AcceleratorState", None), "_shared_state", None) or {}
    return getattr(shared.get("distributed_type"), "name", None) == "DEEPSPEED"
