"""IGUTrainerMixin: path passes, optimizer groups, log and checkpoints of an adaptive-rank model in transformers' Trainer.

Only public or long-standing methods of the Trainer are overridden, each with the reason beside it: ``training_step`` (wrapped, never
replaced, so that subclasses' own code runs), ``create_optimizer``, ``log``, ``_save``, ``_save_checkpoint``, ``_load_from_checkpoint``,
``_load_best_model``. The controller itself is stepped by :class:`IGUCallback`, whose events lie where a plain loop calls it.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ..adapt import adapt
from ..adapter_file import CONFIG_FILE
from ..bank import find_bank
from ..config import IGUConfig
from ..controller import Controller
from ..folders import place
from ..objective import evaluating
from ..optim import split_lambda
from ..saved_adapter import save_adapter
from .adapted import adapted_part, adapter_folder, load_best
from .callback import IGUCallback

if TYPE_CHECKING:  # what the mixin's super() is; at run time it may lie before any subclass of Trainer

    class _Trainer(Trainer):
        compute_loss: Any

else:
    _Trainer = object

logger = logging.getLogger(__name__)

# What the gradient carries is computed from the Trainer's rule and measured once; these are far apart when the rule is another one.
_SCALE_TOLERANCE = 1e-3


class IGUTrainerMixin(_Trainer):
    """Adaptive ranks for any subclass of transformers' Trainer: ``class IGUSFTTrainer(IGUTrainerMixin, SFTTrainer): pass``.

    Runs the path passes, steps the controller, gives lambda its learning rate (an optimizer passed by the user is left alone), logs under
    ``igu/``, and writes and resumes adapter and controller with the Trainer's checkpoints, which hold no base weights, as PEFT's do.

    Args:
        *args, **kwargs: the Trainer's own.
        igu_config: adapts the (plain) model; an IGUConfig, or its options as a mapping, in which case a missing ``total_steps`` is what the
            TrainingArguments come to. None for a model that is adapted already.
        lambda_lr_ratio: as in :func:`igulora.param_groups`.
        igu_trace, igu_loss_terms: ``trace`` and ``loss_terms`` of :class:`igulora.Controller`.

    Raises:
        ValueError: the model is not adapted, or adapted and ``igu_config`` given, or the arguments ask for what adapters cannot do
            (DeepSpeed, FSDP, nn.DataParallel).
    """

    def __init__(
        self,
        *args: Any,
        igu_config: IGUConfig | Mapping[str, Any] | None = None,
        lambda_lr_ratio: float | None = None,
        igu_trace: Iterable[str] | str = (),
        igu_loss_terms: Callable[[Any], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        model = kwargs.get("model", args[0] if args else None)
        with _counts_as_adapted(model):
            super().__init__(*args, **kwargs)
        self._lambda_lr_ratio = lambda_lr_ratio
        self._check_setting()
        if igu_config is not None:
            self._adapt(igu_config)
        try:
            adapted_part(self.model)
        except ValueError as error:
            raise ValueError(f"{error}, or give the trainer igu_config={{...}}") from error
        given = [c for c in self.callback_handler.callbacks if isinstance(c, IGUCallback)]
        self._igu = given[0] if given else IGUCallback(igu_trace, igu_loss_terms)
        self._igu._alone = False
        if not given:
            self.add_callback(self._igu)
        # Does the loss divide by num_items_in_batch? Nobody says; asked of the loss itself at the first sample.
        self._divides_by_items: bool | None = None
        self._scale_checked = False
        self._resumable = False

    def _check_setting(self) -> None:
        # Each of these takes parameters apart or copies modules, and the flat buffers of the adapters with them.
        for used, name in (
            (self.is_deepspeed_enabled, "DeepSpeed"),
            (self.is_fsdp_enabled, "FSDP"),
            (self.args.n_gpu > 1, "nn.DataParallel (several visible GPUs in one process)"),
        ):
            if used:
                raise ValueError(
                    f"expected one process per device (torchrun with DistributedDataParallel), got {name}, which igulora's trainer does "
                    "not support; start with torchrun, or show one GPU with CUDA_VISIBLE_DEVICES"
                )

    def _adapt(self, config: IGUConfig | Mapping[str, Any]) -> None:
        if self.model_init is not None or self.optimizer is not None:
            raise ValueError(
                "expected igu_config with a model alone, got also model_init or an optimizer, which would be built for a model without "
                "adapters; adapt the model yourself with igulora.adapt"
            )
        if hasattr(config, "peft_type") or not isinstance(config, (IGUConfig, Mapping)):
            raise TypeError(
                f"expected igu_config to be an IGUConfig or a mapping of its options, got {type(config).__name__}; for PEFT's method give "
                "the trainer model=peft.get_peft_model(model, config)"
            )
        if not isinstance(config, IGUConfig):
            options = dict(config)
            if options.get("total_steps") is None:
                options["total_steps"] = self._total_steps()
            config = IGUConfig.from_dict(options)
        adapt(self.model, config)

    def _total_steps(self) -> int:
        args = self.args
        if args.max_steps > 0:
            return args.max_steps
        with torch.random.fork_rng(devices=[]):  # building a loader may draw
            loader = self.get_train_dataloader()
        try:
            per_epoch = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1)
        except TypeError as error:
            raise ValueError(
                "expected total_steps in igu_config, or max_steps in the TrainingArguments, for a data set without a length; got neither"
            ) from error
        return math.ceil(args.num_train_epochs * per_epoch)

    @property
    def igu_controller(self) -> Controller:
        """The controller of the run: history, series, ranks, budget."""
        controller = self._igu.controller
        if controller is None or controller.bank is not find_bank(adapted_part(self.model)):
            controller = self._igu.start(self.model, self.args.gradient_accumulation_steps)
        return controller

    # -- a micro-batch ------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's own step, on a batch with path rows appended or followed by a pass of them where a sample is due.

        Everything that makes the training gradient (loss, accumulation, scaler, autocast, what subclasses add) stays the Trainer's.
        """
        controller = self.igu_controller
        step: Callable[..., Tensor] = super().training_step
        sampling = controller.samples_path
        scale = self._gradient_scale(num_items_in_batch)

        def loss_fn(batch: Any, items: Any = num_items_in_batch) -> Tensor:
            with self.compute_loss_context_manager(), self._unrecorded():
                # compute_loss may take entries out of its inputs; what _prepare_inputs returns is a copy
                return self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=items)

        def train(batch: Any, factor: Tensor | None) -> Tensor:
            if factor is None and (self._scale_checked or not sampling):
                return step(model, batch, num_items_in_batch)
            with self._watched_loss(factor, scale):
                return step(model, batch, num_items_in_batch)

        items = self._divisor(loss_fn, inputs, num_items_in_batch) if sampling else None
        return controller.backward(
            loss_fn, inputs, scale=scale, step_scale=self._loss_scale(), items=items, train=train
        )

    def _loss_scale(self) -> float | Tensor:
        """The gradient scaler's factor, unread."""
        scaler = getattr(self.accelerator, "scaler", None)
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.args.device))

    def _gradient_scale(self, num_items_in_batch: Any) -> float | Tensor:
        """What the Trainer multiplies this micro-batch's loss with on its way backward (the rule of its ``training_step``)."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            over_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = over_items or self.compute_loss_func is not None
        scale = self._loss_scale()
        return scale if scaled else scale / self.current_gradient_accumulation_steps

    def _divisor(self, loss_fn: Callable[..., Tensor], inputs: Any, items: Any) -> Tensor | float | None:
        """What the loss divides its sum of terms by, or None where it is a mean of its own.

        ``num_items_in_batch`` is handed to every loss and heeded by some (cross entropy, not the squared error of regression; a
        ``compute_loss`` of the user's may do either), so the loss is asked once: does doubling the number halve it?
        """
        if items is None or self._divides_by_items is False:
            return None
        if self._divides_by_items is None:
            with torch.no_grad(), evaluating(self.model):
                once, twice = torch.stack([loss_fn(inputs, n).detach().double() for n in (items, items * 2)]).tolist()
            share = twice / once if once else 0.5  # no term in this batch: nothing to decide by, and no gradient either
            if min(abs(share - 0.5), abs(share - 1.0)) > 0.05 or not math.isfinite(share):
                raise ValueError(
                    "expected a loss that is a mean over its own terms, or their sum over num_items_in_batch, got one that changes from "
                    f"{once:.6g} to {twice:.6g} when num_items_in_batch doubles: its path samples cannot be weighed. Return one of the two "
                    'from compute_loss, or use IGUConfig(estimator="instantaneous")'
                )
            if once:
                self._divides_by_items = share < 0.75
            if share >= 0.75:
                return None
        # The number is that of all processes then, and the loss is multiplied by their count.
        return items / self.args.world_size if self.args.average_tokens_across_devices else items

    @contextmanager
    def _watched_loss(self, factor: Tensor | None, scale: float | Tensor) -> Iterator[None]:
        """Inside, ``compute_loss`` (whosever it is) gives its loss times ``factor``; once, what its gradient carries is checked.

        The method is shadowed on the instance rather than overridden: a subclass's own compute_loss may lie before this class or after it.
        """
        original, shadow = self.compute_loss, vars(self).get("compute_loss")
        carried: list[Tensor] = []
        used = False

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            nonlocal used
            loss = original(*args, **kwargs)
            loss = loss if factor is None else loss * factor.to(loss.dtype)
            used = True
            if not self._scale_checked and loss.requires_grad:
                loss.register_hook(carried.append)
            return loss

        self.compute_loss = compute_loss
        try:
            yield
        finally:
            if shadow is None:
                del self.compute_loss
            else:
                self.compute_loss = shadow
        if not used:
            raise ValueError(
                f"expected {type(self).__name__}.training_step to call self.compute_loss once, got no call: path rows cannot be weighed "
                'there. Use IGUConfig(path_pass="separate"), or an estimator without path passes'
            )
        if carried and not self._scale_checked:
            told, found = float(scale), float(carried[0])
            if abs(found - told) > _SCALE_TOLERANCE * abs(told):
                raise ValueError(
                    f"expected the loss to go backward times {told:.6g} (gradient accumulation and loss scale), got {found:.6g}: path "
                    "samples would be off by as much. Set loss_is_scaled_for_ga to what compute_loss does"
                )
            self._scale_checked = True

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """Passes of path rows alone, and looks at the loss, are no steps: what subclasses note beside the loss stays as it was."""
        names = [
            n for n in ("_metrics", "accum_loss_components") if isinstance(vars(self).get(n), dict)
        ]  # TRL, sentence-transformers
        before = {name: copy.deepcopy(vars(self)[name]) for name in names}
        try:
            yield
        finally:
            self.__dict__.update(before)

    # -- optimizer and log --------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, by its arguments, with lambda in groups of its own. An optimizer passed by the user is left alone."""
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made_here:
            split_lambda(optimizer, adapted_part(self.model), self._lambda_lr_ratio)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Entries with a training loss get the controller's numbers; only then is anything read from the device."""
        if "loss" in logs and self._igu.controller is not None:
            logs.update(self._igu.numbers())
        super().log(logs, *args, **kwargs)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter, not the model: overridden because it is the one place through which every model is written (save_model calls it)."""
        try:
            part = adapted_part(self.model)
        except ValueError:  # merged and removed: a plain model again
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        save_adapter(part, adapter_folder(part, folder), self._igu.controller, resumable=self._resumable, write=True)
        if adapter_folder(part, folder) != folder:
            super()._save(output_dir, state_dict)
            return
        tokenizer = self.processing_class
        if tokenizer is None:
            tokenizer = getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        torch.save(self.args, folder / TRAINING_ARGS_NAME)  # as the Trainer does beside its models

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Runs on every process, ``_save`` on one: here the processes' unfinished windows become one."""
        if self._igu.controller is not None:
            self._igu.controller.passes.reduce_window()
        self._resumable = not self.args.save_only_model
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._resumable = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Overridden because the Trainer takes ``adapter_model.safetensors`` for PEFT's and finds no PEFT model."""
        if not place(adapter_folder(self.model, resume_from_checkpoint), CONFIG_FILE).is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
            return
        self._igu.restore(self.model, self.args.gradient_accumulation_steps, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """As for resuming; the controller stays where training ended."""
        best = self.state.best_model_checkpoint
        if best is None or not place(adapter_folder(self.model, best), CONFIG_FILE).is_file():
            super()._load_best_model()
            return
        logger.info("Loading the best adapter from %s (score: %s).", best, self.state.best_metric)
        load_best(self.model, best)


@contextmanager
def _counts_as_adapted(model: Any) -> Iterator[None]:
    """The Trainer refuses a quantised model without adapters, and knows PEFT's only by this mark."""
    mark = "_hf_peft_config_loaded"
    wanted = (
        isinstance(model, nn.Module)
        and getattr(model, "is_quantized", False)
        and (hasattr(model, "igulora_bank") or hasattr(model, "igulora_banks"))
        and not getattr(model, mark, False)
    )
    if not wanted:
        yield
        return
    setattr(model, mark, True)
    try:
        yield
    finally:
        setattr(model, mark, False)
