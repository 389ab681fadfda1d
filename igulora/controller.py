"""Controller: what a training loop holds. Runs path passes, keeps windows, scores, budget and masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import saved_modules
from .allocation import Allocator
from .bank import find_bank
from .batches import append_rows, batch_size, count_loss_terms, coupling, take_rows
from .config import MIN_UPDATES, IGUConfig
from .errors import nearest
from .importance import Importance
from .kernels import orthogonality_grad_
from .quadrature import Quadrature, path_factors

LossFn = Callable[[Any], Tensor]


@dataclass(frozen=True)
class StepInfo:
    """What :meth:`Controller.step` did. ``budget`` in ``budget_unit``; ``scored`` and ``allocated`` say what this step updated."""

    step: int
    budget: int
    phase: str
    scored: bool
    allocated: bool


@dataclass(frozen=True)
class _PathRows:
    """Device tensors of one scored micro-batch's path rows: which sequences, at which alpha, with which factor."""

    rows: Tensor
    alpha: Tensor
    factor: Tensor
    copies: int


class Controller:
    """Steps the rank allocation of an adapted model along a training loop.

    Each micro-batch goes through :meth:`backward`, each optimizer step is followed by :meth:`step`::

        loss = ctl.backward(lambda b: model(**b).loss, batch)
        opt.step(); ctl.step(); opt.zero_grad()

    Args:
        model: adapted by :func:`igulora.adapt`.
        accumulation_steps: micro-batches per optimizer step; the loss of each is divided by it.
        trace: adapted modules whose series of y_t, running mean, deviation and SNR_t are recorded (IGU-LoRA figure 7), or "all".
        loss_terms: ``batch -> (batch,)`` number of terms each sequence adds to the mean loss; by default read from the labels
            (:func:`igulora.batches.count_loss_terms`). Needed for mixed batches of models that count otherwise.

    Attributes:
        global_step: optimizer steps so far. budget: what may live now. phase: "warmup", "pruning" or "final".
        penalty: the last orthogonality penalty R, a () tensor, or None.

    Raises:
        ValueError: the model is not adapted, a traced name is unknown, pruning would start before three score updates, or a mixed batch is
            asked of a model whose rows influence each other.
    """

    def __init__(
        self,
        model: nn.Module,
        accumulation_steps: int = 1,
        trace: Iterable[str] | str = (),
        loss_terms: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if accumulation_steps < 1:
            raise ValueError(f"expected accumulation_steps >= 1, got {accumulation_steps}")
        self.model, self.bank = model, find_bank(model)
        self.config: IGUConfig = model.igulora_config  # type: ignore[assignment]
        self.accumulation_steps = accumulation_steps
        self.loss_terms = loss_terms
        self.trace = list(self.bank.names) if trace == "all" else list(trace)
        for name in self.trace:
            if name not in self.bank.names:
                raise ValueError(f"expected trace to name adapted modules, got {name!r}.{nearest(name, self.bank.names)}")
        self.quadrature = Quadrature(self.config)
        self.importance = Importance(self.bank, self.config)
        self.allocator = Allocator(self.bank, self.config)
        self.global_step = 0
        self.penalty: Tensor | None = None
        self._in_window = 0  # micro-batches of the current window
        self._regularised = False
        self._absolute: Tensor | None = None
        self._events: list[tuple[int, int, Tensor]] = []
        self._series: list[tuple[int, Tensor]] = []
        self._check_schedule()
        # Trainable parameters that are neither adapters nor modules to save: path rows must not reach them.
        self._others = _other_trainables(model)
        if self._wants_rows and self.config.path_pass == "mixed":
            self._check_mixed(model)
        context = self.bank.context
        context.controlled, context.unstepped = True, 0
        context.allowed_unstepped = accumulation_steps

    def _check_mixed(self, model: nn.Module) -> None:
        reason = coupling(model)
        if reason:
            raise ValueError(
                f'expected a model whose rows do not influence each other for path_pass="mixed", but {reason}; '
                'use IGUConfig(path_pass="separate")'
            )
        if self._others:
            names = [n for n, p in model.named_parameters() if any(p is other for other in self._others)]
            raise ValueError(
                'expected only adapters and modules_to_save to be trainable for path_pass="mixed", got also '
                f"{', '.join(names[:4])}; name their module in modules_to_save, or use path_pass=\"separate\""
            )

    def _check_schedule(self) -> None:
        config = self.config
        if not (config.adaptive and config.scored):
            return
        first = self.allocator.schedule.first_allocation
        micro = (first - 1) * self.accumulation_steps  # the update due after `first` itself comes too late for the final step
        if first < config.prunes_until:
            micro += self.accumulation_steps
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
        return self.allocator.schedule.budget(self.global_step)

    @property
    def phase(self) -> str:
        """ "warmup", "pruning" or "final"; a method that never prunes stays in "final"."""
        return self.allocator.schedule.phase(self.global_step) if self.config.adaptive else "final"

    def live_ranks(self) -> dict[str, int]:
        """Live triplets of every adapted module (synchronises with the device)."""
        self.bank.refresh()
        return self.bank.ranks()

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per allocation: step, budget and the live rank of every module (synchronises with the device)."""
        return [
            {"step": step, "budget": budget, "ranks": dict(zip(self.bank.names, map(int, ranks.tolist()), strict=True))}
            for step, budget, ranks in self._events
        ]

    @property
    def series(self) -> dict[str, list[dict[str, float]]]:
        """Per traced module and score update: step, y_t, running mean, running deviation and SNR_t (IGU-LoRA appendix G)."""
        out: dict[str, list[dict[str, float]]] = {name: [] for name in self.trace}
        where = [self.bank.names.index(name) for name in self.trace]
        for step, stats in self._series:
            values = stats[:, where].tolist()
            for k, name in enumerate(self.trace):
                y, mean, deviation = values[0][k], values[1][k], values[2][k]
                snr = mean / (deviation + self.config.eps)
                out[name].append({"step": step, "y": y, "mean": mean, "deviation": deviation, "snr": snr})
        return out

    # -- one micro-batch ----------------------------------------------------------------------------------------------

    @property
    def _wants_rows(self) -> bool:
        return self.config.adaptive and self.config.scored and self.quadrature.samples_path

    @property
    def _scoring(self) -> bool:
        """Whether samples taken now can still reach an allocation."""
        config = self.config
        return config.adaptive and config.scored and self.global_step + 1 < config.prunes_until

    def backward(self, loss_fn: LossFn, batch: Any, *, scale: float | None = None) -> Tensor:
        """Loss and gradients of one micro-batch, path sample and orthogonality gradient included.

        Args:
            loss_fn: ``batch -> loss``, a mean over the batch's loss terms. It may be called with path rows appended to the batch
                (``path_pass="mixed"``), or twice (``"separate"``).
            batch: tensor, tuple, list or mapping of tensors with the sequences in the first dimension.
            scale: factor of the loss; ``1 / accumulation_steps`` by default.

        Returns:
            The detached () loss, unscaled; of a mixed batch it is the mean over training and path rows together.

        Raises:
            RuntimeError: :meth:`step` was forgotten.
            ValueError, TypeError: the batch or the loss does not fit (says how).
        """
        bank = self.bank
        bank.refresh()
        self._follow_device()
        bank.context.check_stepped()
        bank.bind_grads()
        scale = 1.0 / self.accumulation_steps if scale is None else scale
        if not (self._scoring and self.config.estimator != "instantaneous"):
            loss = self._train_pass(loss_fn, batch, scale)
        else:
            loss = self._scored_backward(loss_fn, batch, scale)
            self._in_window += 1
        self.regularise()
        return loss

    def regularise(self) -> None:
        """Add the orthogonality gradient to the flat gradient, once per optimizer step.

        :meth:`backward` does it; call it before ``optimizer.step()`` only where you call ``loss.backward()`` yourself.
        """
        if self._regularised or not self.config.orthogonality or not self.config.adaptive:
            return
        bank, config = self.bank, self.config
        bank.bind_grads()
        self.penalty = orthogonality_grad_(
            bank.weight,
            bank.grad,
            list(bank.layout.groups),
            config.orthogonality,  # type: ignore[arg-type]
            offdiagonal=config.orthogonality_form == "offdiagonal",
        )
        self._regularised = True

    def _train_pass(self, loss_fn: LossFn, batch: Any, scale: float) -> Tensor:
        loss = _checked(loss_fn(batch))
        (loss * scale).backward()
        return loss.detach()

    def _scored_backward(self, loss_fn: LossFn, batch: Any, scale: float) -> Tensor:
        config, per_window = self.config, self.quadrature.per_window
        if self._in_window == 0:
            self.quadrature.start_window()
        due = self._in_window < config.window and self._in_window % config.ig_every == 0  # type: ignore[operator]
        if config.estimator in ("on-path", "on-path-stratified"):
            loss = self._on_path_pass(loss_fn, batch, scale, due)
        elif not due:
            return self._train_pass(loss_fn, batch, scale)
        else:
            rows, endpoint = self._draw(batch, per_window)
            if config.path_pass == "mixed":
                loss = self._mixed_pass(loss_fn, batch, scale, rows, endpoint)
            else:
                loss = self._separate_passes(loss_fn, batch, scale, rows, endpoint)
        if due and config.aggregate == "absolute":
            self._fold_absolute()
        return loss

    def _draw(self, batch: Any, per_window: int) -> tuple[_PathRows, float]:
        """The path rows of this micro-batch, and the factor of its training gradient."""
        chosen = self.quadrature.rows_of(batch_size(batch))
        sample = self.quadrature.sample(len(chosen))
        alphas, factors = [], []
        for copy_alphas, copy_factors in zip(sample.alphas, sample.factors, strict=True):
            for alpha, factor in zip(copy_alphas, copy_factors, strict=True):
                forward, gradient = path_factors(alpha, self.config.path)  # type: ignore[arg-type]
                alphas.append(forward)
                factors.append(factor * gradient / per_window)
        copies = len(sample.alphas)
        rows = _PathRows(
            self._on_device(chosen * copies, torch.int64),
            self._on_device(alphas, self.bank.dtype),
            self._on_device(factors, self.bank.dtype),
            copies,
        )
        return rows, sample.endpoint / per_window

    def _mixed_pass(self, loss_fn: LossFn, batch: Any, scale: float, path: _PathRows, endpoint: float) -> Tensor:
        """Training rows at alpha = 1 and path rows at theirs in one pass, each part rescaled from the joint mean to its own."""
        bank, size = self.bank, batch_size(batch)
        terms = self._terms(batch, size)
        path_terms = terms.index_select(0, path.rows)
        train_total = terms.sum().clamp_(min=1.0)
        # Path rows hold `copies` times the same sequences: each copy is a mean over its own terms.
        path_mean = (path_terms.sum() / path.copies).clamp_(min=1.0)
        path_weight = path.factor * (train_total / path_mean / scale)
        alpha = torch.cat((torch.ones(size, dtype=bank.dtype, device=bank.device), path.alpha))
        weight = torch.cat((torch.full((size,), endpoint / scale, dtype=bank.dtype, device=bank.device), path_weight))
        self._touch_path()
        with bank.context.at(alpha, size, 0 if endpoint else size, weight):
            loss = _checked(loss_fn(append_rows(batch, path.rows)))
            joint = scale * (train_total + path_terms.sum()) / train_total
            loss.backward(joint.to(loss.dtype))
        return loss.detach()

    def _separate_passes(self, loss_fn: LossFn, batch: Any, scale: float, path: _PathRows, endpoint: float) -> Tensor:
        bank = self.bank
        self._touch_path()
        if endpoint:
            one = torch.ones(1, dtype=bank.dtype, device=bank.device)
            with bank.context.at(one, 1, 0, one * (endpoint / scale)):
                loss = self._train_pass(loss_fn, batch, scale)
        else:
            loss = self._train_pass(loss_fn, batch, scale)
        for param in self._others:
            param.requires_grad_(False)
        try:
            with bank.context.at(path.alpha, 0, 0, path.factor * path.copies):
                _checked(loss_fn(take_rows(batch, path.rows))).backward()
        finally:
            for param in self._others:
                param.requires_grad_(True)
        return loss

    def _on_path_pass(self, loss_fn: LossFn, batch: Any, scale: float, due: bool) -> Tensor:
        """The training pass itself runs on the path, and its gradient is the sample (the released code)."""
        bank, config = self.bank, self.config
        stratified = config.estimator == "on-path-stratified"
        alphas = self.quadrature.on_path(batch_size(batch) if stratified else None)
        pairs = [path_factors(alpha, config.path) for alpha in alphas]  # type: ignore[arg-type]
        alpha = self._on_device([forward for forward, _ in pairs], bank.dtype)
        if not due:
            with bank.context.at(alpha):
                return self._train_pass(loss_fn, batch, scale)
        per_window = self.quadrature.per_window
        weight = self._on_device([gradient / (per_window * scale) for _, gradient in pairs], bank.dtype)
        self._touch_path()
        with bank.context.at(alpha, alpha.numel(), 0, weight):
            return self._train_pass(loss_fn, batch, scale)

    def _terms(self, batch: Any, size: int) -> Tensor:
        terms = self.loss_terms(batch) if self.loss_terms is not None else count_loss_terms(batch, self.model)
        if not isinstance(terms, Tensor) or tuple(terms.shape) != (size,):
            shape = tuple(terms.shape) if isinstance(terms, Tensor) else type(terms).__name__
            raise ValueError(f"expected loss_terms to give a tensor of shape ({size},), one count per sequence, got {shape}")
        return terms.to(self.bank.device, self.bank.dtype, non_blocking=True)

    def _touch_path(self) -> None:
        """Make the accumulator and its leaves; zero it at the start of a window (and of a micro-batch when absolute)."""
        path = self.bank.path
        if self._in_window == 0 or self.config.aggregate == "absolute":
            path.zero_()

    @torch.no_grad()
    def _fold_absolute(self) -> None:
        """Eq. 7: the mean over micro-batches of |w| |sample|. The factor 1/J is in the samples already."""
        if self._absolute is None:
            self._absolute = torch.zeros_like(self.bank.weight)
        if self._in_window == 0:
            self._absolute.zero_()
        self._absolute.add_((self.bank.weight * self.bank.path).abs_())

    def _on_device(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        host = torch.tensor(values, dtype=dtype)
        if self.bank.device.type == "cuda":
            return host.pin_memory().to(self.bank.device, non_blocking=True)
        return host.to(self.bank.device)

    def _follow_device(self) -> None:
        if self.importance.mean.device != self.bank.device:
            self.importance.to(self.bank.device)
            self._absolute = None if self._absolute is None else self._absolute.to(self.bank.device)

    # -- one optimizer step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> StepInfo:
        """Call after ``optimizer.step()`` and before ``zero_grad()``: scores when a window is complete, budget, masks.

        Returns:
            What was done. Nothing is read from the device.

        Raises:
            ValueError: an allocation is due and there are too few score updates.
        """
        bank, config = self.bank, self.config
        bank.refresh()
        self._follow_device()
        micro_batches = max(bank.context.unstepped, 1)
        if not self.config.adaptive:
            self.global_step += 1
            self._reset_step()
            return StepInfo(self.global_step, self.budget, self.phase, False, False)
        scored = False
        if self._scoring:
            if config.estimator == "instantaneous":
                self._take_training_gradient(micro_batches)
            scored = self._in_window >= config.window  # type: ignore[operator]
            if scored:
                self._close_window()
        self.global_step += 1
        due = self.allocator.schedule.is_due(self.global_step)
        if due:
            self.allocator.allocate(self.importance, self.global_step)
            ranks = bank.live.new_zeros(len(bank.layers)).index_add_(0, bank.layer_index, bank.live)
            self._events.append((self.global_step, self.budget, ranks))
        self._reset_step()
        return StepInfo(self.global_step, self.budget, self.phase, scored, due)

    def _reset_step(self) -> None:
        self.bank.context.unstepped = 0
        self._regularised = False

    def _take_training_gradient(self, micro_batches: int) -> None:
        """AdaLoRA's sensitivity and ablation IGU-LoRA-1: T is the training gradient as the optimizer saw it."""
        self.bank.bind_grads()
        if self.config.window == 1 and self.config.aggregate == "signed":
            self._in_window = 1
            return
        share = min(micro_batches, self.config.window - self._in_window) / self.config.window  # type: ignore[operator]
        self._touch_path()
        self.bank.path.add_(self.bank.grad, alpha=share)
        if self.config.aggregate == "absolute":
            self._fold_absolute()
        self._in_window += micro_batches

    def _close_window(self) -> None:
        config, bank = self.config, self.bank
        if config.aggregate == "absolute":
            assert self._absolute is not None
            path = self._absolute
        elif config.estimator == "instantaneous" and config.window == 1:
            path = bank.grad
        else:
            path = bank.path
        self.importance.update(path)
        self._in_window = 0
        if self.trace:
            stats = self.importance.module_stats()
            self._series.append((self.global_step + 1, torch.stack([stats[k] for k in ("y", "mean", "deviation")])))

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``{"tensors": name -> tensor, "meta": JSON-able}``: everything that an exact resume needs beside the adapter itself."""
        quadrature = self.quadrature.state_dict()
        scores = self.importance.state_dict()
        tensors: dict[str, Tensor] = {
            "generator": quadrature.pop("generator"),
            "live": self.bank.live,
            **{k: v for k, v in scores.items() if isinstance(v, Tensor)},
        }
        if self._in_window and self.bank.context.leaves:
            tensors["path"] = self.bank.path.detach()
        if self._in_window and self._absolute is not None:
            tensors["absolute"] = self._absolute
        meta = {
            "global_step": self.global_step,
            "in_window": self._in_window,
            "updates": scores["updates"],
            "initial_budget": self.allocator.schedule.initial,
            "quadrature": quadrature,
            "history": self.history,
            "trace": self.trace,
            "series": [[step, stats.tolist()] for step, stats in self._series],
        }
        return {"tensors": {k: v.detach().cpu().clone() for k, v in tensors.items()}, "meta": meta}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, on a model with the same adapter.

        Raises:
            ValueError: the state belongs to an adapter of another shape; nothing is changed then.
        """
        tensors, meta = state["tensors"], state["meta"]
        bank = self.bank
        if tensors["live"].shape != bank.live.shape or tensors["mean"].numel() != bank.weight.numel():
            raise ValueError(
                f"expected a controller state for {bank.triplets} triplets and {bank.weight.numel()} elements, got "
                f"{tensors['live'].numel()} and {tensors['mean'].numel()}: it was saved for another adapter"
            )
        self.importance.load_state_dict({**tensors, "updates": meta["updates"]})
        bank.live.copy_(tensors["live"])
        self.allocator = Allocator(bank, self.config, initial=int(meta["initial_budget"]))
        self.quadrature.load_state_dict({**meta["quadrature"], "generator": tensors["generator"]})
        self.global_step, self._in_window = int(meta["global_step"]), int(meta["in_window"])
        if "path" in tensors:
            bank.path.copy_(tensors["path"])
        if "absolute" in tensors:
            self._absolute = tensors["absolute"].to(bank.device)
        self._events = [
            (int(e["step"]), int(e["budget"]), torch.tensor([e["ranks"][name] for name in bank.names]))
            for e in meta["history"]
        ]
        if meta["trace"] == self.trace:
            self._series = [(int(step), torch.tensor(stats)) for step, stats in meta["series"]]
        self._reset_step()


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"expected loss_fn to return a scalar loss tensor, got {got}; return a mean over the batch's loss terms")
    return loss.reshape(())


def _other_trainables(model: nn.Module) -> list[nn.Parameter]:
    ours = {id(p) for layer in find_bank(model).layers for p in (layer.lora_P, layer.lora_E, layer.lora_Q)}
    ours |= {id(p) for saved in saved_modules(model).values() for p in saved.module.parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
