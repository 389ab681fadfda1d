"""Whether what was saved belongs to a model: layers, ranks, modules to save, and the options of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from .adapt import saved_modules
from .adapter_file import AdapterFile, Description
from .bank import find_bank
from .controller import Controller
from .experts import bases_of

# Options that a resumed run may change: what they decided is in the tensors, or they change no bit.
_FREE_OPTIONS = {
    "recompute_inputs", "target_modules", "target_parameters", "exclude_modules", "modules_to_save", "rank_pattern", "init", "init_lambda",
    "seed",
}  # fmt: skip


def check_model(description: Description, model: nn.Module) -> None:
    """Raise ValueError unless a described adapter fits a base model: layers and modules to save, names and shapes."""
    shapes = {name: (base.out_features, base.in_features) for name, base in bases_of(model).items()}
    _check_shapes(description, shapes)
    _check_saved(description, dict(model.named_modules()))


def check_fits(model: nn.Module, file: AdapterFile, directory: Path) -> None:
    """Raise ValueError unless what was read from ``directory`` fits a base model: layers and modules to save, names and shapes."""
    shapes: dict[str, tuple[int, int]] = {
        name: (parts["lora_P"].shape[1], parts["lora_Q"].shape[1]) for name, parts in file.modules.items()
    }
    saved = {name: {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} for name, state in file.saved.items()}
    check_model(Description(directory, file.meta, file.config, shapes, saved, None), model)


def _check_shapes(file: Description, shapes: dict[str, tuple[int, int]]) -> None:
    wrong = []
    for name, (p_length, q_length) in file.shapes.items():
        blocks = file.config.blocks_of(name)
        wanted = (p_length * blocks, q_length * blocks)
        if name not in shapes:
            wrong.append(f"{name}: (out, in) = {wanted}, not in the model")
        elif shapes[name] != wanted:
            wrong.append(f"{name}: (out, in) = {wanted}, the model's is {shapes[name]}")
    if wrong:
        more = f"\n  ... and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            f"expected the model that the adapter in {file.directory} was trained on, got another:\n  "
            + "\n  ".join(wrong[:10])
            + more
        )


def _check_saved(file: Description, modules: dict[str, nn.Module]) -> None:
    for name, state in file.saved.items():
        if name not in modules:
            raise ValueError(f"expected a model with the module {name!r} saved in {file.directory}, got one without it")
        theirs = {key: shape for key, (_, shape) in state.items()}
        mine = {key: tuple(value.shape) for key, value in modules[name].state_dict().items()}
        if theirs != mine:
            raise ValueError(
                f"expected the module {name!r} to have the tensors saved in {file.directory}: {theirs}, got a model with {mine}"
            )
        for key, value in modules[name].state_dict().items():
            if state[key][0].is_floating_point != value.dtype.is_floating_point:
                raise ValueError(
                    f"expected {name}.{key} in {file.directory} to be {value.dtype} as in the model, got {state[key][0]}"
                )


def check_same(file: Description, model: nn.Module) -> None:
    """Raise ValueError unless a described adapter is that of an adapted model: layers, ranks, modules to save."""
    bank = find_bank(model)
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in zip(bank.names, bank.layers, strict=True)}
    _check_shapes(file, shapes)
    mine = {name: layer.r for name, layer in zip(bank.names, bank.layers, strict=True)}
    if list(file.modules.items()) != list(mine.items()):
        raise ValueError(
            f"expected the modules and ranks of the model in {file.directory}, got others; resume with the same options"
        )
    if any(layer.merged for layer in bank.layers):
        raise ValueError("expected an unmerged model to resume, got a merged one; call igulora.unmerge(model) first")
    modules: dict[str, nn.Module] = {name: module.trained for name, module in saved_modules(model).items()}
    if sorted(modules) != sorted(file.saved):
        raise ValueError(
            f"expected the modules to save of the model, {sorted(modules)}, in {file.directory}, got {sorted(file.saved)}; resume with the "
            "same options"
        )
    _check_saved(file, modules)


def check_options(file: Description, model: nn.Module, controller: Controller) -> None:
    """Raise ValueError unless the run that was saved had the options of this one."""
    if controller.bank is not find_bank(model):
        raise ValueError("expected the controller of this model, got one of another model")
    now, then = dataclasses.asdict(controller.config), dataclasses.asdict(file.config)
    changed = [f"{key}: {then[key]!r} then, {now[key]!r} now" for key in now if now[key] != then[key]]
    changed = [text for text in changed if text.split(":")[0] not in _FREE_OPTIONS]
    if changed:
        raise ValueError(
            f"expected the options of the run saved in {file.directory}, got others ({'; '.join(changed)}); resume with the same options"
        )
