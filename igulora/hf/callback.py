"""IGUCallback: the controller of an adapted model, stepped by the events of transformers' Trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..adapter_file import CONFIG_FILE
from ..bank import Bank, find_bank, find_config
from ..controller import Controller
from ..folders import place
from ..path_pass import other_trainables
from ..pretrained import save_as_before, warn_when_saved
from ..saved_adapter import restore_adapter, save_adapter
from .adapted import adapted_part, adapter_folder, check_steps, load_best

logger = logging.getLogger(__name__)

PREFIX = "igu/"


class IGUCallback(TrainerCallback):
    """Steps the controller of an adapted model inside any Trainer; alone it suffices for estimators without extra passes.

    ``Trainer(model, ..., callbacks=[IGUCallback()])`` adds the orthogonality gradient, steps scores, schedule and masks after each
    optimizer step, puts numbers under ``igu/`` into the log, and writes and reads adapter and controller with the Trainer's checkpoints
    (which hold the whole model beside them: only IGUTrainer leaves that out). lambda has a learning rate of its own only where you say so:
    ``optimizers=(torch.optim.AdamW(igulora.param_groups(model, lr=...)), None)``.

    Args:
        trace, loss_terms: as in :class:`igulora.Controller`.
        resume_from: folder of the checkpoint that ``train(resume_from_checkpoint=...)`` gets, where it lies outside ``output_dir``.

    Attributes:
        controller: the run's controller, once training has begun.

    Raises:
        ValueError: when training begins: the model is not adapted, its estimator needs path passes, the steps do not fit the schedule, or
            the checkpoint to resume from holds no controller.
    """

    def __init__(
        self,
        trace: Iterable[str] | str = (),
        loss_terms: Callable[[Any], Tensor] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        self.trace = trace if isinstance(trace, str) else list(trace)
        self.loss_terms = loss_terms
        self.resume_from = resume_from
        self.controller: Controller | None = None
        self._alone = True  # no IGUTrainer runs passes, logs and saves
        self._silenced = False

    def start(self, model: nn.Module, accumulation_steps: int) -> Controller:
        """A controller at step 0 for ``model``."""
        model.train()  # the Trainer does it at the first step; rows that batch norm couples show in training only
        self.controller = Controller(adapted_part(model), accumulation_steps, self.trace, self.loss_terms)
        return self.controller

    def restore(self, model: nn.Module, accumulation_steps: int, folder: str | os.PathLike[str]) -> Controller:
        """A controller as it was saved in ``folder``, and the adapter with it."""
        controller = self.start(model, accumulation_steps)
        restore_adapter(adapted_part(model), adapter_folder(model, folder), controller)
        return controller

    # -- the Trainer's events -----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks everything that can be known before the first step; resumes where the Trainer does."""
        model: nn.Module = kwargs["model"]
        part = adapted_part(model)
        bank = find_bank(part)
        config = find_config(part)
        if self._alone and config.adaptive and config.scored and config.estimator != "instantaneous":
            raise ValueError(
                f"expected IGUTrainer (or IGUTrainerMixin) for estimator={config.estimator!r}, whose path passes a callback cannot run; "
                'got IGUCallback in another Trainer. Use igulora.trainer.IGUTrainer, or IGUConfig(estimator="instantaneous")'
            )
        check_steps(config, state.max_steps)
        self._check_saved(part, bank, args)
        ask_gradients = getattr(part, "enable_input_require_grads", None)
        checkpointing = getattr(args, "activation_checkpointing", None) or getattr(
            args, "gradient_checkpointing", False
        )
        if checkpointing and ask_gradients is not None:
            ask_gradients()  # the base is frozen: reentrant checkpointing would see no gradient to make
        accumulation = args.gradient_accumulation_steps
        if self.controller is None or self.controller.bank is not bank:
            self.start(model, accumulation)
        if self._alone and state.global_step:
            self.restore(model, accumulation, self._folder(model, args, state))
        assert self.controller is not None
        if self.controller.global_step != state.global_step:
            if state.global_step:
                raise ValueError(
                    f"expected the controller at step {state.global_step} to resume there, got it at step {self.controller.global_step}; "
                    "the checkpoint was not written by this run"
                )
            self.start(model, accumulation)  # train() once more from the beginning
        self.controller.bank.context.unstepped = 0
        # on_save writes the adapter beside what another Trainer writes.
        self._silenced = self._alone and save_as_before(part)
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            self.controller.optimizer = optimizer
            self.controller.passes.spare(p for group in optimizer.param_groups for p in group["params"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the orthogonality gradient, before the first backward: the only event ahead of clipping."""
        if self._alone and self.controller is not None:
            scaler = getattr(kwargs.get("optimizer"), "scaler", None)
            self.controller.regularise(
                1.0 if scaler is None else scaler.scale(self.controller.bank.weight.new_ones(()))
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between ``optimizer.step()`` and ``zero_grad()``, also when a gradient scaler skipped the step."""
        if self.controller is not None:
            self.controller.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Puts the controller's numbers beside the loss, for callbacks after this one and the log history."""
        if self._alone and logs is not None and "loss" in logs:
            numbers = self.numbers()
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes adapter and controller into the checkpoint that was just made."""
        if self._alone and self.controller is not None and args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if not folder.is_dir():  # a hyper-parameter search keeps its runs elsewhere
                logger.warning("No checkpoint in %s: adapter and controller are not saved. Use IGUTrainer.", folder)
                return
            part, resumable = adapted_part(kwargs["model"]), not args.save_only_model
            save_adapter(part, adapter_folder(part, folder), self.controller, resumable=resumable, write=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up the best checkpoint's masks with its weights; says so when the ranks are not final."""
        if self.controller is None:
            return
        if self._silenced:
            warn_when_saved(adapted_part(kwargs["model"]))
        if self._alone and args.load_best_model_at_end and state.best_model_checkpoint:
            load_best(kwargs["model"], state.best_model_checkpoint)
        if self.controller.phase != "final":
            logger.warning(
                "Training ended at step %s, before the ranks became final (step %s): %s triplets live, the target is %s.",
                self.controller.global_step, self.controller.config.prunes_until, sum(self.controller.live_ranks().values()),
                self.controller.allocator.target,
            )  # fmt: skip

    # -- what they need -----------------------------------------------------------------------------------------------

    def numbers(self) -> dict[str, float]:
        """The controller's :meth:`~igulora.Controller.summary` under ``igu/``, for a log entry."""
        assert self.controller is not None
        summary = self.controller.summary()
        del summary["step"]  # the Trainer logs its own
        return {PREFIX + key: value for key, value in summary.items()}

    @staticmethod
    def _check_saved(part: nn.Module, bank: Bank, args: Any) -> None:
        """Refuse to train what no checkpoint would hold."""
        others = {id(p) for p in other_trainables(part, bank)}
        names = [name for name, p in part.named_parameters() if id(p) in others]
        if names and str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
            raise ValueError(
                f"expected only adapters and modules_to_save to be trainable, got also {', '.join(names[:4])}: the checkpoints would not "
                'hold them. Name their module in IGUConfig(modules_to_save=[...]), or train with save_strategy="no"'
            )

    def _folder(self, model: nn.Module, args: Any, state: Any) -> Path:
        given = [self.resume_from, getattr(args, "resume_from_checkpoint", None)]
        folders = [Path(g) for g in given if isinstance(g, (str, os.PathLike))]
        folders.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        for folder in folders:
            if place(adapter_folder(model, folder), CONFIG_FILE).is_file():
                return folder
        raise ValueError(
            f"expected the adapter and controller of step {state.global_step} in {folders[0]}, found no {CONFIG_FILE} there; was the "
            "checkpoint written with IGUCallback? Name its folder with IGUCallback(resume_from=...)"
        )
