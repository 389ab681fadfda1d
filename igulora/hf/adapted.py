"""The adapted model inside a Trainer: found in its wrappers, held against the schedule, restored from a checkpoint."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torch import nn

from ..bank import find_bank
from ..config import IGUConfig
from ..saved_adapter import restore_adapter
from ..unwrap import keeps_adapters

logger = logging.getLogger(__name__)


def adapted_part(model: nn.Module) -> nn.Module:
    """The module that :func:`igulora.adapt` was given, in whatever wraps it (data parallel, compiled, sentence-transformers, PEFT).

    Raises:
        ValueError: no part of the model is adapted, or more than one.
    """
    found = [module for module in model.modules() if keeps_adapters(module)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"expected one adapted model to train, got {len(found)} parts that were adapted apart")
    find_bank(model)  # a wrapper may know its bank in a way of its own; raises where there is none
    return model


def adapter_folder(model: nn.Module, checkpoint: str | os.PathLike[str]) -> Path:
    """Where adapter and controller lie in a Trainer's checkpoint: in a folder of their own where PEFT writes its files beside them.

    Two folders deep, since the Trainer takes a folder with an ``adapter_model.safetensors`` for one of PEFT's adapters.

    Raises:
        ValueError: as :func:`adapted_part`.
    """
    return Path(checkpoint) / "igulora" / "state" if "igulora_banks" in vars(adapted_part(model)) else Path(checkpoint)


def check_steps(config: IGUConfig, steps: int) -> None:
    """Hold the schedule of the ranks against the optimizer steps that the Trainer will take.

    Raises:
        ValueError: training ends before the last allocation: the ranks would never become final.
    """
    if not config.adaptive or steps == config.total_steps:
        return
    if steps < config.prunes_until:
        raise ValueError(
            f"expected at least {config.prunes_until} optimizer steps (total_steps={config.total_steps} - t_final={config.t_final} of the "
            f"IGUConfig), got {steps} by the TrainingArguments: the ranks would never become final. Train longer (num_train_epochs, "
            f"max_steps), or adapt with IGUConfig(total_steps={steps})"
        )
    logger.warning(
        "The ranks' schedule is made for total_steps=%s, training takes %s steps: they are final from step %s on. "
        "For the usual proportions adapt with IGUConfig(total_steps=%s).",
        config.total_steps, steps, config.prunes_until, steps,
    )  # fmt: skip


def load_best(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Put the adapter of a checkpoint into the model, without the state of its controller; warns when its ranks were not final."""
    file = restore_adapter(adapted_part(model), adapter_folder(model, folder))
    history, config = file.meta["history"], file.config
    reached = history[-1]["step"] if history else 0
    if config.adaptive and not config.bidirectional and reached < config.prunes_until:
        logger.warning(
            "The best checkpoint %s is from before the ranks became final (step %s): %s triplets live. "
            "Begin to evaluate later (eval_delay) to choose among models of the target size.",
            folder, config.prunes_until, sum(file.meta["ranks"].values()),
        )  # fmt: skip
