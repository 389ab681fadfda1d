"""Controller: what a training loop holds. Runs path passes, keeps windows, scores, budget and masks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .allocation import allocator_of
from .bank import Bank, find_bank, find_config
from .budget import PHASES
from .config import MIN_UPDATES, IGUConfig
from .controller_state import controller_state, load_controller_state
from .distributed import check_averaged, check_synced, find_processes
from .errors import nearest
from .gained import start_anew
from .importance import Importance
from .kernels import orthogonality_grad_
from .objective import LossFn, Objective, TrainFn
from .optimizer_watch import OptimizerWatch
from .path_pass import PathPasses
from .rank_log import RankLog
from .unwrap import check_wrappers, find_ddp, unwrap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class StepInfo:
    """What :meth:`Controller.step` did. ``budget`` in ``budget_unit``; ``scored`` and ``allocated`` say what this step updated."""

    step: int
    budget: int
    phase: str
    scored: bool
    allocated: bool


def add_orthogonality(bank: Bank, config: IGUConfig, scale: float | Tensor = 1.0) -> Tensor:
    """Add ``scale`` times the orthogonality gradient to the flat gradient; returns the penalty R, ()."""
    gamma = config.orthogonality
    bank.bind_grads()
    if isinstance(scale, Tensor):
        bank.grad.div_(scale)  # the kernel takes a number, and reading the scale would wait for the device
    else:
        gamma *= scale  # type: ignore[operator]
    penalty = orthogonality_grad_(
        bank.weight,
        bank.grad,
        list(bank.layout.groups),
        gamma,
        offdiagonal=config.orthogonality_form == "offdiagonal",
        table=bank.matrix_table,
    )
    if isinstance(scale, Tensor):
        bank.grad.mul_(scale)
    return penalty


class Controller:
    """Steps the rank allocation of an adapted model along a training loop.

    Each micro-batch goes through :meth:`backward`, each optimizer step is followed by :meth:`step`::

        loss = ctl.backward(lambda b: model(**b).loss, batch)
        opt.step(); ctl.step(); opt.zero_grad()

    Args:
        model: adapted by :func:`igulora.adapt`; it may be wrapped (DistributedDataParallel, torch.compile).
        accumulation_steps: micro-batches per optimizer step; the loss of each is divided by it.
        trace: adapted modules whose series of y_t, running mean, deviation and SNR_t are recorded (IGU-LoRA figure 7), or "all".
        loss_terms: ``batch -> (batch,)`` number of terms each sequence adds to the mean loss; by default read from the labels
            (:func:`igulora.batches.count_loss_terms`). Needed for mixed batches of models that count otherwise.
        process_group: the processes that train this model on batches of their own; DistributedDataParallel's where ``model`` is one, those
            that :mod:`igulora.distributed` averages its gradients over, else all there are.
        joint_mean: for batches of different sizes. DistributedDataParallel gives the batch of every process the same weight, and so path
            samples are averaged; with ``joint_mean`` losses and samples are weighed by their loss terms, so that gradients and scores are
            those of one process that has all the rows. Costs one all-reduce of a number per micro-batch.
        start_step: optimizer steps that the adapter has behind it, where only the adapter was kept (:func:`igulora.load_checkpoint` goes on
            with the scores, too). The budget goes on from there; allocations wait for three score updates. From the last allocation on, so
            with ``start_step=config.total_steps``, ranks stay what they are.
        optimizer: that trains the adapters, for methods whose matrices gain triplets ("flexlora", "igu-flex"): its moments of a new one
            start at zero. May be set later, as an attribute.

    With several processes every one makes the same number of :meth:`backward` and :meth:`step` calls, in the same order: the path gradient
    is reduced once a window. Scores, masks and, with equal gradients, weights are bit-equal in all of them. With batches of one size (or
    ``joint_mean``) they equal, up to rounding, those of one process that trains on the joint batch; not so for ``aggregate="absolute"``,
    where the micro-batch of each process counts as a mini-batch of its own, and where ``ig_fraction`` < 1 draws other sequences.

    Attributes:
        global_step: optimizer steps so far. budget: what may live now. phase: "warmup", "pruning" or "final".
        penalty: the last orthogonality penalty R, a () tensor, or None.

    Raises:
        ValueError: the model is not adapted, or wrapped by something that takes its adapters apart (says what to use), a traced name is
            unknown, ``process_group`` is not that of the model's averaged gradients, pruning would start before three score updates, a
            mixed batch is asked of a model whose rows influence each other, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        accumulation_steps: int = 1,
        trace: Iterable[str] | str = (),
        loss_terms: Callable[[Any], Tensor] | None = None,
        process_group: ProcessGroup | None = None,
        joint_mean: bool = False,
        start_step: int = 0,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        for name, number, least in (("accumulation_steps", accumulation_steps, 1), ("start_step", start_step, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"expected an int {name} >= {least}, got {number!r}")
        check_wrappers(model)
        check_averaged(model)
        self._ddp = find_ddp(model)
        self.model = model = unwrap(model)
        self.bank = find_bank(model)
        self.config = find_config(model)
        self.accumulation_steps = accumulation_steps
        self.trace = list(self.bank.names) if trace == "all" else list(trace)
        for name in self.trace:
            if name not in self.bank.names:
                raise ValueError(
                    f"expected trace to name adapted modules, got {name!r}.{nearest(name, self.bank.names)}"
                )
        if process_group is None and self._ddp is not None:
            process_group = self._ddp.process_group
        self.processes = find_processes(model, process_group)
        _ = self.processes.rank  # raises where this process is not among them
        self.passes = PathPasses(model, self.bank, self.config, loss_terms, self.processes)
        self.joint_mean = joint_mean
        self.importance = Importance(self.bank, self.config)
        self.allocator = allocator_of(self.bank, self.config)
        self.optimizer = optimizer
        self.global_step = start_step
        self._start_step = start_step
        self.penalty: Tensor | None = None
        self._regularised = False
        self._ran_backward = False
        self.log = RankLog(self.bank, self.trace)
        self._watch = OptimizerWatch(model, self.bank)
        if not start_step:
            self._check_schedule()
        self._take_charge()

    def _take_charge(self) -> None:
        context = self.bank.context
        context.controlled, context.unstepped = True, 0
        context.allowed_unstepped = self.accumulation_steps

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of model and controller together, or a pickle of both, is controlled as the original is."""
        self.__dict__.update(state)
        self._take_charge()

    def _check_schedule(self) -> None:
        config = self.config
        if not (config.adaptive and config.scored):
            return
        first = self.allocator.schedule.first_allocation
        # Step `first` updates the scores before it allocates, except where it is the last: scoring ends one step earlier.
        micro = (first if first < config.prunes_until else first - 1) * self.accumulation_steps
        steps_per_window = -(-config.window // self.accumulation_steps)  # type: ignore[operator]
        updates = micro // (steps_per_window * self.accumulation_steps)
        if updates < MIN_UPDATES:
            raise ValueError(
                f"expected at least {MIN_UPDATES} score updates before the first allocation (step {first}), got {updates} with "
                f"window={config.window} micro-batches and accumulation_steps={self.accumulation_steps}; raise t_init or lower window"
            )

    # -- state a loop may show ----------------------------------------------------------------------------------------

    @property
    def budget(self) -> int:
        """Triplets (or parameters, by ``budget_unit``) allowed at the current step."""
        if not self.config.adaptive:
            return self.bank.triplets
        return self.allocator.budget(self.global_step)

    @property
    def phase(self) -> str:
        """ "warmup", "pruning" or "final"; a method that never prunes stays in "final"."""
        return self.allocator.schedule.phase(self.global_step) if self.config.adaptive else "final"

    @property
    def inside_step(self) -> bool:
        """Whether :meth:`backward` was called since the last :meth:`step`."""
        return self._ran_backward

    @property
    def last_loss_is_joint(self) -> bool:
        """Whether the last loss that :meth:`backward` returned counts path rows too (a mixed batch): not one to plot beside the others."""
        return self.passes.mixed

    def live_ranks(self) -> dict[str, int]:
        """Live triplets of every adapted module (synchronises with the device)."""
        self.bank.refresh()
        return self.bank.ranks()

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per allocation: step, budget and the live rank of every module (synchronises with the device)."""
        return self.log.history()

    @property
    def series(self) -> dict[str, list[dict[str, float]]]:
        """Per traced module and score update: step, y_t, running mean, running deviation and SNR_t (IGU-LoRA appendix G)."""
        return self.log.series(self.config.eps)

    def summary(self) -> dict[str, float]:
        """Numbers for a log entry, read from the device at once: "step", "budget", "phase" (0 warmup, 1 pruning, 2 final), "live" triplets,
        "rank_mean", "rank_min", "rank_max" over modules, and where there are any "penalty" and "score_mean", "score_min", "score_max" of
        the live triplets.
        """
        self.bank.refresh()
        bank, live = self.bank, self.bank.live
        ranks = live.new_zeros(len(bank.layers)).index_add_(0, bank.layer_index, live)
        values = {"live": live.sum()}
        if bank.layers:
            values |= {"rank_mean": ranks.mean(), "rank_min": ranks.min(), "rank_max": ranks.max()}
        if self.penalty is not None:
            values["penalty"] = self.penalty
        if self.config.scored and self.importance.updates and bank.triplets:
            scores = self.importance.triplet_scores()
            values["score_mean"] = (scores * live).sum() / live.sum().clamp(min=1.0)
            values["score_min"] = torch.where(live > 0, scores, torch.inf).min()
            values["score_max"] = torch.where(live > 0, scores, -torch.inf).max()
        numbers = torch.stack([value.to(torch.float64) for value in values.values()]).tolist()
        host = {"step": self.global_step, "budget": self.budget, "phase": PHASES.index(self.phase)}
        return {**host, **dict(zip(values, numbers, strict=True))}

    # -- one micro-batch ----------------------------------------------------------------------------------------------

    @property
    def samples_path(self) -> bool:
        """Whether :meth:`backward` takes samples beside the training gradient now."""
        return self._scoring and self.config.estimator != "instantaneous"

    @property
    def _scoring(self) -> bool:
        """Whether samples taken now can still reach an allocation."""
        config = self.config
        return config.adaptive and config.scored and self.global_step + 1 < config.prunes_until

    def backward(
        self,
        loss_fn: LossFn,
        batch: Any,
        *,
        scale: float | Tensor | None = None,
        step_scale: float | Tensor | None = None,
        items: Tensor | float | None = None,
        train: TrainFn | None = None,
    ) -> Tensor:
        """Loss and gradients of one micro-batch, path sample and orthogonality gradient included.

        Args:
            loss_fn: ``batch -> loss``, a mean over the batch's loss terms (or see ``items``). It may be called with path rows appended to
                the batch (``path_pass="mixed"``), or twice (``"separate"``).
            batch: tensor, tuple, list or mapping of tensors with the sequences in the first dimension.
            scale: factor of the loss; ``1 / accumulation_steps`` by default. A loss scaler's factor S enters as
                ``S / accumulation_steps``: path samples stay free of it, the orthogonality gradient takes it too. A () tensor where only
                the device knows it.
            step_scale: factor that the gradient of the whole step carries, ``scale * accumulation_steps`` by default; to be given where the
                micro-batches of this step are fewer than ``accumulation_steps``, or the loss is over the ``items`` of all of them.
            items: what ``loss_fn`` divides the sum of the batch's terms by (the terms of the whole accumulation), where that is not their
                own number. Path samples are means over their own terms all the same.
            train: ``(batch, factor) -> detached loss``: forward and backward of a training batch in the loop's own code, with the loss
                multiplied by ``factor`` (a () tensor, or None for 1); must give the gradient the factor ``scale``. ``loss_fn`` is then
                called only for path rows alone, and once to check that the loss is what it is said to be.

        Returns:
            The detached () loss, unscaled, or what ``train`` returns; of a mixed batch it is the mean over training and path rows together.

        Raises:
            ValueError: :meth:`step` was forgotten.
            ValueError, TypeError: the batch or the loss does not fit (says how).
        """
        bank = self.bank
        self._check_active()
        bank.refresh()
        self._follow_device()
        bank.context.check_stepped()
        if self._ddp is not None and self._ddp._join_config.enable and self.processes.count > 1:
            raise ValueError(
                "expected every process to run as many micro-batches as the others, got DistributedDataParallel.join(): processes that are "
                "out of data would miss the reduction of the path gradient. Use a DistributedSampler, or accelerate's even_batches"
            )
        if self.joint_mean and items is not None:
            raise ValueError(
                "expected either joint_mean or items, got both: a loss divided by the items of all processes is a joint mean already"
            )
        if bank.layers and bank.layers[0].merged:
            raise ValueError("expected an unmerged model to train, got a merged one; call igulora.unmerge(model) first")
        bank.bind_grads()
        scale = 1.0 / self.accumulation_steps if scale is None else scale
        self._ran_backward = True
        run = self.passes.train_and_sample if self.samples_path else self.passes.train
        share = self.passes.share_of(batch) if self.joint_mean and self.processes.count > 1 else None
        before = bank.context.unstepped
        loss = run(Objective(loss_fn, scale, items, train, share), batch)
        bank.context.unstepped = before + 1  # also where no gradient reached a watched parameter
        self.regularise(scale * self.accumulation_steps if step_scale is None else step_scale)
        return loss

    def _check_active(self) -> None:
        """PEFT's models change which adapter is trained; a controller stays with the one it was made for."""
        if hasattr(self.model, "igulora_banks") and find_bank(self.model) is not self.bank:
            raise ValueError(
                "expected the adapter active that this controller was made for, got another; make a Controller for each adapter, or go "
                "back with model.set_adapter(name)"
            )

    def regularise(self, scale: float | Tensor = 1.0) -> None:
        """Add the orthogonality gradient to the flat gradient, once per optimizer step.

        :meth:`backward` does it; call it before ``optimizer.step()`` only where you call ``loss.backward()`` yourself.

        Args:
            scale: factor that the whole step's gradient carries (a loss scaler's, a number or a () tensor), 1 without one.
        """
        if self._regularised or not self.config.orthogonality:
            return
        self.penalty = add_orthogonality(self.bank, self.config, scale)
        self._regularised = True

    def regularised_elsewhere(self) -> None:
        """This step's gradient has the orthogonality gradient in it (:func:`add_orthogonality`)."""
        self._regularised = True

    def _follow_device(self) -> None:
        if self.importance.mean.device != self.bank.device:
            self.importance.to(self.bank.device)
            self.passes.to(self.bank.device)

    # -- one optimizer step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> StepInfo:
        """Call after ``optimizer.step()`` and before ``zero_grad()``: scores when a window is complete, budget, masks.

        Returns:
            What was done. Nothing is read from the device, but by methods that move triplets, when they do.

        Raises:
            ValueError: an allocation is due and there are too few score updates, or no optimizer is known and one is needed; or no
                optimizer changed an adapter in the last steps. Of a run that diverged under a method that moves triplets (lambda or a score
                is not finite): its ranks stay, but scores and step have moved on.
        """
        bank, config = self.bank, self.config
        self._check_active()
        check_synced(self.model, bank.context.unstepped)
        bank.refresh()
        self._follow_device()
        micro_batches = max(bank.context.unstepped, 1)
        if bank.context.unstepped:
            if not self._ran_backward:
                self._check_own_backward()
            self._watch.check()
        if config.adaptive and self.phase != "final":
            self.allocator.check_optimizer(self.optimizer)
        scored = False
        if self._scoring:
            if config.estimator == "instantaneous":
                self.passes.sample_training_gradient(micro_batches)
            scored = self.passes.complete
            if scored:
                self._update_scores()
        self.global_step += 1
        due = config.adaptive and self.allocator.schedule.is_due(self.global_step) and not self._lacks_scores()
        if due:
            done = self.allocator.allocate(self.importance, self.global_step)
            if done.gained:
                assert self.optimizer is not None  # checked above
                start_anew(bank, self.importance, self.optimizer, done.gained, (bank._path, self.passes.absolute))
            self.log.allocated(self.global_step, self.budget, done.importance)
        self._reset_step()
        self._watch.keep()
        return StepInfo(self.global_step, self.budget, self.phase, scored, due)

    def _lacks_scores(self) -> bool:
        """Whether this allocation is left out because the scores of the steps before ``start_step`` are not there yet."""
        if not (self._start_step and self.config.scored) or self.importance.updates >= MIN_UPDATES:
            return False
        if self.global_step >= self.config.prunes_until:
            warnings.warn(
                f"ranks stay what they were before step {self.global_step}: the last allocation needs {MIN_UPDATES} score updates, and "
                f"there were {self.importance.updates} since training went on without its scores (igulora.load_checkpoint keeps them)",
                stacklevel=3,
            )
            self.bank.mask.copy_(self.bank.live)
        return True

    def _reset_step(self) -> None:
        self.bank.context.unstepped = 0
        self._regularised = False
        self._ran_backward = False

    def _check_own_backward(self) -> None:
        """The loop called ``loss.backward()`` itself: fine where nothing is missing then."""
        config = self.config
        if self._scoring and config.estimator != "instantaneous":
            raise ValueError(
                f"expected ctl.backward(loss_fn, batch) for estimator={config.estimator!r}, got a backward of your own: no path sample "
                'was taken. Use ctl.backward, or estimator="instantaneous"'
            )
        if config.orthogonality and not self._regularised:
            raise ValueError(
                "expected ctl.regularise() between your own loss.backward() and optimizer.step(), got none: the orthogonality penalty was "
                "never applied. Use ctl.backward, call ctl.regularise(), or set orthogonality=0"
            )

    def _update_scores(self) -> None:
        self.importance.update(self.passes.close_window())
        self.log.scored(self.global_step + 1, self.importance)

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``{"tensors": name -> tensor, "meta": JSON-able}``: everything that an exact resume needs beside the adapter itself.

        Of several processes each has sums of its own inside a window; :meth:`PathPasses.reduce_window` of ``passes`` makes them equal.
        """
        return controller_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, on a model with the same adapter.

        Raises:
            ValueError: the state is damaged or belongs to another adapter; nothing is changed then.
        """
        load_controller_state(self, state)
