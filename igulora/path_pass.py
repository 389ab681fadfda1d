"""Path passes: samples of the path gradient, taken with or beside the training pass, summed over a window (ALGORITHMS 2.2)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .bank import Bank
from .batches import append_rows, batch_size, count_loss_terms, coupling, is_flattened, on_device, take_rows
from .config import IGUConfig
from .distributed import Processes
from .objective import Objective, checked, evaluating
from .quadrature import Quadrature, path_factors
from .saved import TrainedWhole

# Rounding of 16-bit models changes a loss by about 1e-3 when its rows are computed in another batch; class weights change it by more.
_MEAN_TOLERANCE = 0.01


@dataclass(frozen=True)
class _PathRows:
    """Device tensors of one scored micro-batch: which sequences, at which alpha, with which factor; how often each occurs."""

    rows: Tensor
    alpha: Tensor
    factor: Tensor
    copies: int
    endpoint: float  # factor of the training gradient f(1)


class PathPasses:
    """Runs the passes of a micro-batch and keeps the window: which micro-batches are scored and what they add up to.

    Args:
        model, bank, config: the adapted model and its options.
        loss_terms: ``batch -> (batch,)`` loss terms per sequence; read from the labels by default.
        processes: those that train one model on batches of their own.

    Attributes:
        in_window: micro-batches of the current window so far.
        mixed: whether the last micro-batch had path rows appended, so that its loss is that of training and path rows together.
        sampled: whether the path was sampled in the last micro-batch at all.
        absolute: mean over the window of |w| |sample| (``aggregate="absolute"``), flat, or None.

    Raises:
        ValueError: mixed batches are asked of a model whose rows influence each other, or that trains more than adapters and saved modules.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        config: IGUConfig,
        loss_terms: Callable[[Any], Tensor] | None,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.bank, self.config = model, bank, config
        self.loss_terms = loss_terms
        self.processes = processes or Processes()
        self.quadrature = Quadrature(config, self.processes)
        self.in_window = 0
        self.absolute: Tensor | None = None
        self.mixed = self.sampled = False
        self._mean_checked = False
        # Trainable parameters that are neither adapters nor modules to save: path rows must not reach them.
        self._others = other_trainables(model, bank)
        self._wants_rows = config.adaptive and config.scored and self.quadrature.samples_path
        if self._wants_rows and config.path_pass == "mixed":
            self._check_mixed()

    def _check_mixed(self) -> None:
        reason = coupling(self.model)
        if reason:
            raise ValueError(
                f'expected a model whose rows do not influence each other for path_pass="mixed", but {reason}; '
                'use IGUConfig(path_pass="separate")'
            )
        if self._others:
            names = [n for n, p in self.model.named_parameters() if any(p is other for other in self._others)]
            names = names or ["parameters outside the model"]
            raise ValueError(
                'expected only adapters and modules_to_save to be trainable for path_pass="mixed", got also '
                f'{", ".join(names[:4])}; name their module in modules_to_save, or use path_pass="separate"'
            )

    def spare(self, params: Iterable[nn.Parameter]) -> None:
        """Parameters trained beside the model's own (a loss module's): path rows must not reach them either.

        Raises:
            ValueError: there are such parameters, and batches are mixed.
        """
        known = {id(p) for p in self._others} | _ours(self.model, self.bank)
        self._others += [p for p in params if p.requires_grad and id(p) not in known]
        if self._wants_rows and self.config.path_pass == "mixed":
            self._check_mixed()

    # -- passes -------------------------------------------------------------------------------------------------------

    def train(self, task: Objective, batch: Any) -> Tensor:
        """An ordinary training pass; returns the detached loss."""
        self.mixed = self.sampled = False
        return task.train_on(batch)

    @property
    def due(self) -> bool:
        """Whether the next micro-batch is to be sampled."""
        return self.in_window < self.config.window and self.in_window % self.config.ig_every == 0  # type: ignore[operator]

    def train_and_sample(self, task: Objective, batch: Any) -> Tensor:
        """A training pass and, where the window wants one of this micro-batch, a sample of the path gradient."""
        config = self.config
        due = self.due
        if due:
            self._open_accumulator()
        if config.estimator in ("on-path", "on-path-stratified"):
            loss = self._on_path(task, batch, due)
        elif due:
            run = self._mixed if config.path_pass == "mixed" else self._separate
            loss = run(task, batch, self._draw(batch))
        else:
            loss = self.train(task, batch)
        if due:
            self._fold()
        self.sampled = due
        self.in_window += 1
        return loss

    def sample_training_gradient(self, micro_batches: int) -> None:
        """``instantaneous``: T is the training gradient as the optimizer saw it (AdaLoRA; ablation IGU-LoRA-1)."""
        config, bank = self.config, self.bank
        if not bank.has_grads:
            raise ValueError(
                "expected the step's gradients in ctl.step() (of PEFT's models update_and_allocate), got none; call it after "
                "optimizer.step() and before optimizer.zero_grad()"
            )
        bank.bind_grads()
        if not self.reads_grad:
            share = min(micro_batches, config.window - self.in_window) / config.window  # type: ignore[operator]
            self._open_accumulator()
            bank.path.add_(bank.grad, alpha=share)
            self._fold()
        self.in_window += micro_batches

    @property
    def reads_grad(self) -> bool:
        """AdaLoRA's window of one step needs no accumulator: the flat gradient is T."""
        config = self.config
        return config.estimator == "instantaneous" and config.window == 1 and config.aggregate == "signed"

    @property
    def complete(self) -> bool:
        """Whether the window has seen its M micro-batches."""
        return self.in_window >= self.config.window  # type: ignore[operator]

    def close_window(self) -> Tensor:
        """End the window; returns T (or, with absolute aggregation, the mean of |w| |sample|), flat."""
        self.in_window = 0
        self.quadrature.next_window()
        if self.reads_grad:
            return self.bank.grad
        absolute = self.config.aggregate == "absolute"
        total = self.absolute if absolute else self.bank.path
        assert total is not None
        return self._mean_(total)

    def _mean_(self, total: Tensor) -> Tensor:
        """What the processes' samples add up to: the one reduction of a window."""
        # The training gradient was averaged before it was sampled (DistributedDataParallel, igulora.distributed).
        return total if self.config.estimator == "instantaneous" else self.processes.mean_(total)

    def _draw(self, batch: Any) -> _PathRows:
        chosen = self.quadrature.rows_of(batch_size(batch))
        sample = self.quadrature.sample(len(chosen))
        per_window = self.quadrature.per_window
        alphas, factors = [], []
        for copy_alphas, copy_factors in zip(sample.alphas, sample.factors, strict=True):
            for alpha, factor in zip(copy_alphas, copy_factors, strict=True):
                forward, gradient = path_factors(alpha, self.config.path)  # type: ignore[arg-type]
                alphas.append(forward)
                factors.append(factor * gradient / per_window)
        return _PathRows(
            self._on_device(chosen * len(sample.alphas), torch.int64),
            self._on_device(alphas, self.bank.dtype),
            self._on_device(factors, self.bank.dtype),
            len(sample.alphas),
            sample.endpoint / per_window,
        )

    def _mixed(self, task: Objective, batch: Any, path: _PathRows) -> Tensor:
        """Training rows at alpha = 1 and path rows at theirs in one pass, each part rescaled from the joint loss to its own."""
        if is_flattened(batch):
            raise ValueError(
                'expected a batch with one sequence per row for path_pass="mixed", got sequences flattened into one row (packing without '
                'padding), which path rows cannot be added to; use IGUConfig(path_pass="separate")'
            )
        self.mixed = True
        bank, size = self.bank, batch_size(batch)
        terms = self._terms(batch, size)
        path_terms = terms.index_select(0, path.rows)
        train_total = terms.sum().clamp_(min=1.0)
        path_total = path_terms.sum()
        path_mean = (path_total / path.copies).clamp_(min=1.0)  # each copy of the sequences is a mean of its own
        if not self._mean_checked:
            self._check_mean(task, batch, path, terms, path_terms)
        divisor = train_total if task.items is None else task.items
        joint = (train_total + path_total) / train_total
        alpha = torch.cat((torch.ones_like(terms), path.alpha))
        at_one = torch.ones_like(terms) * path.endpoint
        if task.items is not None:
            at_one = at_one * (task.items / train_total)
        weight = task.unscaled(torch.cat((at_one, path.factor * (divisor / path_mean))))
        with bank.context.at(alpha, size, 0 if path.endpoint else size, weight):
            # A sum over terms gives the training rows their share as it is; a mean was divided by the terms of both parts.
            loss = task.train_on(append_rows(batch, path.rows), joint if task.items is None else None)
        if task.share is not None and task.train is not None:
            loss = loss / task.share
        # What the loop's own code reports counts both parts over the terms of one.
        return loss if task.items is None and task.train is None else loss / joint

    @torch.no_grad()
    def _check_mean(self, task: Objective, batch: Any, path: _PathRows, terms: Tensor, path_terms: Tensor) -> None:
        """Once, at the first mixed batch: is the loss a mean (or sum) over the counted terms? (The one place that reads from the device.)

        Compares the joint loss with those of its parts, in evaluation mode; a loss that draws random numbers cannot be compared.
        """
        with evaluating(self.model), _uncompiled():
            train, again = task.loss_fn(batch), task.loss_fn(batch)
            sampled, joint = task.loss_fn(take_rows(batch, path.rows)), task.loss_fn(append_rows(batch, path.rows))
        total, sampled_total = terms.sum(), path_terms.sum()
        if task.items is None:
            parts = zip((total, sampled_total), (train, sampled), strict=True)
            # The mean of no terms is NaN: rows without a label.
            sums = [torch.where(n > 0, n * checked(loss), torch.zeros_like(n)) for n, loss in parts]
            expected = (sums[0] + sums[1]) / (total + sampled_total).clamp(min=1.0)
        else:
            expected = checked(train) + checked(sampled)
        found = (train, again, joint, expected, torch.minimum(total, sampled_total))
        values = torch.stack([checked(v).to(torch.float64) for v in found]).tolist()
        if values[4] == 0:
            return  # one part has no terms: the next batch may tell
        if values[0] != values[1] or abs(values[2] - values[3]) <= _MEAN_TOLERANCE * max(abs(values[3]), 1e-6):
            self._mean_checked = True  # not before: a caller who goes on after the error meets it again
            return
        raise ValueError(
            f"expected the loss of training and path rows together to be the mean over their terms ({values[3]:.6g}), got {values[2]:.6g}: "
            "the loss is a sum, weighs its terms, or couples the rows. Return a mean and say what it counts with "
            'Controller(model, loss_terms=...), or use IGUConfig(path_pass="separate")'
        )

    def _separate(self, task: Objective, batch: Any, path: _PathRows) -> Tensor:
        """The training pass, then a pass of the path rows alone that trains nothing."""
        if path.copies > 1 and is_flattened(batch):
            raise ValueError(
                "expected a batch with one sequence per row for include_f0=True, got sequences flattened into one row (packing without "
                "padding), which cannot run at two alphas at once; use IGUConfig(include_f0=False)"
            )
        context = self.bank.context
        factor = path.factor * path.copies
        endpoint = path.alpha.new_full((1,), path.endpoint)
        if task.items is not None:
            terms = self._terms(batch, batch_size(batch))
            path_total = terms.index_select(0, path.rows).sum().clamp_(min=1.0)
            factor, endpoint = factor * (task.items / path_total), endpoint * (task.items / terms.sum().clamp_(min=1.0))
        if path.endpoint:
            with context.at(torch.ones_like(endpoint), 1, 0, task.unscaled(endpoint)):
                loss = self.train(task, batch)
        else:
            loss = self.train(task, batch)
        for param in self._others:
            param.requires_grad_(False)
        try:
            with context.at(path.alpha, 0, 0, task.unscaled(factor)):
                task.sample_on(take_rows(batch, path.rows))
        finally:
            for param in self._others:
                param.requires_grad_(True)
        return loss

    def _on_path(self, task: Objective, batch: Any, due: bool) -> Tensor:
        """The training pass itself runs on the path, and its gradient is the sample (the released code)."""
        stratified = self.config.estimator == "on-path-stratified"
        alphas = self.quadrature.on_path(batch_size(batch) if stratified else None)
        pairs = [path_factors(alpha, self.config.path) for alpha in alphas]  # type: ignore[arg-type]
        context, dtype = self.bank.context, self.bank.dtype
        alpha = self._on_device([forward for forward, _ in pairs], dtype)
        if not due:
            with context.at(alpha):
                return self.train(task, batch)
        weight = self._on_device([gradient / self.quadrature.per_window for _, gradient in pairs], dtype)
        if task.items is not None:
            weight = weight * (task.items / self._terms(batch, batch_size(batch)).sum().clamp_(min=1.0))
        with context.at(alpha, alpha.numel(), 0, task.unscaled(weight)):
            return self.train(task, batch)

    # -- accumulators -------------------------------------------------------------------------------------------------

    def _open_accumulator(self) -> None:
        """Zero T at the start of a window, or of every sample where their absolute values are averaged."""
        path = self.bank.path
        if self.in_window == 0 or self.config.aggregate == "absolute":
            path.zero_()

    @torch.no_grad()
    def _fold(self) -> None:
        """Eq. 7: the mean over micro-batches of |w| |sample|; the factor 1/J is in the samples already."""
        if self.config.aggregate != "absolute":
            return
        if self.absolute is None:
            self.absolute = torch.zeros_like(self.bank.weight)
        if self.in_window == 0:
            self.absolute.zero_()
        self.absolute.add_((self.bank.weight * self.bank.path).abs_())

    def share_of(self, batch: Any) -> Tensor:
        """() loss terms of this process's batch over their mean over the processes."""
        return self.processes.share(self._terms(batch, batch_size(batch)).sum())

    def _terms(self, batch: Any, size: int) -> Tensor:
        terms = self.loss_terms(batch) if self.loss_terms is not None else count_loss_terms(batch, self.model)
        if not isinstance(terms, Tensor) or tuple(terms.shape) != (size,):
            shape = tuple(terms.shape) if isinstance(terms, Tensor) else type(terms).__name__
            raise ValueError(
                f"expected loss_terms to give a tensor of shape ({size},), one count per sequence, got {shape}"
            )
        return terms.to(self.bank.device, self.bank.dtype, non_blocking=True)

    def _on_device(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        return on_device(values, dtype, self.bank.device)

    def to(self, device: torch.device) -> None:
        """Follow the bank to another device."""
        self.absolute = None if self.absolute is None else self.absolute.to(device)

    def reduce_window(self) -> None:
        """Make the sums of an unfinished window those of all data-parallel processes: what one of them saves, all may go on from.

        A collective: all of them call it. What the window adds up to in the end stays the same.
        """
        if self.in_window and self.bank.context.accumulators:
            self._mean_(self.bank.path)
        if self.in_window and self.absolute is not None:
            self._mean_(self.absolute)

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``{"tensors", "meta"}``: generator, nodes still planned, and the sums of an unfinished window."""
        quadrature = self.quadrature.state_dict()
        tensors: dict[str, Tensor] = {"generator": quadrature.pop("generator")}
        if self.in_window and self.bank.context.accumulators:
            tensors["path"] = self.bank.path
        if self.in_window and self.absolute is not None:
            tensors["absolute"] = self.absolute
        meta = {"in_window": self.in_window, "quadrature": quadrature, "mean_checked": self._mean_checked}
        return {"tensors": tensors, "meta": meta}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Continue inside the window where :meth:`state_dict` was taken."""
        self.quadrature.load_state_dict({**meta["quadrature"], "generator": tensors["generator"]})
        self.in_window = int(meta["in_window"])
        # A loss that draws random numbers would draw more of them if it were checked again.
        self._mean_checked = bool(meta.get("mean_checked", False))
        if "path" in tensors:
            self.bank.path.copy_(tensors["path"])
        if "absolute" in tensors:
            self.absolute = tensors["absolute"].to(self.bank.device)


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled functions run as written inside: a comparison made once is not worth four graphs."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and the import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _ours(model: nn.Module, bank: Bank) -> set[int]:
    saved = [copy for m in model.modules() if isinstance(m, TrainedWhole) for copy in m.copies()]
    return {id(p) for p in bank.parameters()} | {id(p) for copy in saved for p in copy.parameters()}


def other_trainables(model: nn.Module, bank: Bank) -> list[nn.Parameter]:
    """Trainable parameters of the model that are neither adapters nor modules to save."""
    ours = _ours(model, bank)
    return [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
