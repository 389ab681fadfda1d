"""The training loop: steps, schedule, evaluation, early stopping, checkpoints, and stopping without losing anything."""

from __future__ import annotations

import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter_file import TRAINER_FILE
from ..bank import find_bank
from ..checkpoint import load_checkpoint, save_checkpoint
from ..controller import Controller
from ..errors import nearest
from ..folders import finish, place
from ..optim import param_groups
from ..saved_adapter import save_adapter
from .data import BatchStream
from .progress import MetricsFile, Progress
from .settings import RunSettings, schedule_factor
from .tasks import Row, Task, to_device

CHECKPOINTS = "checkpoints"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the step under way was finished and a checkpoint written."""


class NonFiniteLoss(ValueError):
    """The loss became NaN or infinite; names the step and the last good checkpoint."""


@dataclass
class Outcome:
    """What a training loop did. ``seconds`` holds one figure per step, evaluation and saving left out."""

    step: int
    stopped_early: bool
    seconds: list[float] = field(default_factory=list)
    best: dict[str, float] | None = None
    best_step: int | None = None

    @property
    def step_seconds(self) -> float:
        """Median time of an optimizer step."""
        return statistics.median(self.seconds) if self.seconds else 0.0


_REMEDY = "Lower --lr or --lambda-lr-ratio, set --max-grad-norm, or use --dtype float32"


class StopRequest:
    """Ctrl-C as a flag that the loop reads between steps; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch SIGINT inside the block (in the main thread; elsewhere Python delivers no signals)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        former = signal.signal(signal.SIGINT, self._handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, former)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Trainer:
    """Trains an adapted model on encoded rows and writes checkpoints and metrics to ``output``.

    Args:
        model: adapted by :func:`igulora.adapt`, on its device.
        task: makes batches, the loss and the metrics.
        train_rows, eval_rows: encoded by the task; no evaluation rows, no evaluation.
        total_steps: optimizer steps of the whole run.
        settings: see :class:`RunSettings`.
        output: an existing folder.
        console: a rich console, or None to say nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        train_rows: Sequence[Row],
        eval_rows: Sequence[Row],
        total_steps: int,
        settings: RunSettings,
        output: Path,
        console: Any = None,
    ) -> None:
        self.model, self.task, self.settings, self.output, self.console = model, task, settings, output, console
        self.train_rows, self.eval_rows, self.total_steps = train_rows, eval_rows, total_steps
        self.device = next(model.parameters()).device
        self.controller = Controller(model, accumulation_steps=settings.accumulation_steps, trace=self._traced())
        groups = param_groups(model, settings.lr, settings.lambda_lr_ratio, settings.weight_decay)
        self.base_lrs = [group["lr"] for group in groups]
        self.optimizer = self.controller.optimizer = torch.optim.AdamW(groups, fused=True)
        self.trainable = [p for group in groups for p in group["params"]]
        self.stream = BatchStream(len(train_rows), settings.batch_size, settings.seed)
        self.live = sum(self.controller.live_ranks().values())
        self._losses: list[torch.Tensor] = []
        self._joint: list[bool] = []
        self._bad_evaluations = 0
        self._evaluation_due = False
        self._outcome = Outcome(0, False)
        self._last_checkpoint: Path | None = None

    def _traced(self) -> list[str]:
        """Full names of the modules whose series is recorded."""
        names = find_bank(self.model).names
        if self.settings.trace is None:
            return list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
        found = []
        for wanted in self.settings.trace:
            matches = [name for name in names if name == wanted or name.endswith("." + wanted)]
            if not matches:
                raise ValueError(f"expected trace to name adapted modules, got {wanted!r}.{nearest(wanted, names)}")
            found += matches
        return list(dict.fromkeys(found))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.controller.global_step

    @property
    def eval_every(self) -> int:
        """Steps between evaluations; once an epoch unless the settings say otherwise, 0 for none."""
        if not self.eval_rows:
            return 0
        if self.settings.eval_every is None:
            return max(1, self.stream.per_epoch // self.settings.accumulation_steps)
        return self.settings.eval_every

    def evaluate(self) -> dict[str, float]:
        """Metrics of the model as it is on the evaluation rows."""
        batch_size = self.settings.eval_batch_size or 2 * self.settings.batch_size
        return self.task.evaluate(self.model, self.eval_rows, batch_size, self.device)

    def resume(self) -> dict[str, Any]:
        """Take up the latest checkpoint of ``output``; returns the extra values that :meth:`run` was given.

        Raises:
            ValueError: there is none, or it does not fit.
        """
        folder = latest_checkpoint(self.output)
        if folder is None:
            raise ValueError(
                f"expected a checkpoint in {self.output / CHECKPOINTS}, found none; start anew with --overwrite"
            )
        extra = load_checkpoint(folder, self.model, self.optimizer, self.controller)
        self._last_checkpoint = folder
        loop = extra["loop"]
        self._bad_evaluations, self._evaluation_due = loop["bad_evaluations"], loop["evaluation_due"]
        self._outcome = Outcome(self.step, False, loop["seconds"], loop["best"], loop["best_step"])
        self.live = sum(self.controller.live_ranks().values())
        return extra["extra"]

    def run(self, extra: dict[str, Any] | None = None, resumed: bool = False) -> Outcome:
        """Train to the last step, or until evaluations stop improving after pruning.

        ``extra`` is kept in the checkpoints; its "before" holds the metrics before training.

        Raises:
            Interrupted: Ctrl-C; a checkpoint was written.
            NonFiniteLoss: the loss is NaN or infinite; earlier checkpoints stay.
        """
        self._extra = extra or {}
        metrics = MetricsFile(self.output / "metrics.jsonl", self.step if resumed else None)
        if not resumed and self._extra.get("before"):
            metrics.write("eval", 0, **self._extra["before"])
        self.model.train()
        outcome = self._outcome
        with Progress(self.console, self.total_steps, self.step) as progress, StopRequest().listening() as stop:
            if self._evaluation_due:
                self._evaluate_on_the_way(metrics, progress)
            window_start, window_steps = time.perf_counter(), 0
            while self.step < self.total_steps and not outcome.stopped_early:
                started = time.perf_counter()
                self._train_step()
                window_steps += 1
                step, last = self.step, self.step == self.total_steps
                progress.step(step)
                if self.device.type != "cuda":
                    outcome.seconds.append(time.perf_counter() - started)
                evaluate = bool(self.eval_every) and step % self.eval_every == 0 and not last
                save = bool(self.settings.save_every) and step % self.settings.save_every == 0 and not last
                if step % self.settings.log_every == 0 or evaluate or save or last or stop.requested:
                    loss = self._flush_losses()
                    now = time.perf_counter()
                    if (
                        self.device.type == "cuda"
                    ):  # reading the losses waited for the device: this window's mean is true
                        outcome.seconds += [(now - window_start) / window_steps] * window_steps
                    rate = window_steps / max(now - window_start, 1e-9)
                    progress.show(step, loss, self.controller.budget, self.live, rate)
                    metrics.write(
                        "train", step, loss=loss, lr=self.optimizer.param_groups[0]["lr"], budget=self.controller.budget,
                        live=self.live, phase=self.controller.phase, steps_per_second=rate,
                    )  # fmt: skip
                    self._evaluation_due = evaluate
                    if evaluate and not stop.requested:  # a stopped run makes it up when it is resumed
                        self._evaluate_on_the_way(metrics, progress)
                    if save or stop.requested:
                        self.checkpoint()
                    if stop.requested and not last:
                        raise Interrupted(
                            f"stopped at step {step} of {self.total_steps}; checkpoint in {self._last_checkpoint}"
                        )
                    window_start, window_steps = time.perf_counter(), 0
        self._check_finite()
        outcome.step = self.step
        return outcome

    def checkpoint(self) -> Path:
        """Write a checkpoint of the current step and remove the oldest beyond ``keep_checkpoints``."""
        folder = self.output / CHECKPOINTS / f"step-{self.step:08d}"
        loop = {
            "bad_evaluations": self._bad_evaluations,
            "evaluation_due": self._evaluation_due,
            "seconds": self._outcome.seconds[-1000:],
            "best": self._outcome.best,
            "best_step": self._outcome.best_step,
        }
        self._check_finite()
        save_checkpoint(folder, self.model, self.optimizer, self.controller, {"loop": loop, "extra": self._extra})
        self._last_checkpoint = folder
        keep_newest(self.output, self.settings.keep_checkpoints)
        return folder

    def _check_finite(self) -> None:
        """Refuse to write weights that an update has ruined: the earlier checkpoints stay the good ones.

        Raises:
            NonFiniteLoss: a trained parameter is NaN or infinite.
        """
        sums = torch.stack([p.detach().sum(dtype=torch.float64) for p in self.trainable])
        if not bool(torch.isfinite(sums).all()):
            raise NonFiniteLoss(
                f"expected finite weights after step {self.step}, got NaN or infinity; {self._kept()}. {_REMEDY}"
            )

    def _kept(self) -> str:
        if self._last_checkpoint:
            return f"the last good checkpoint is kept in {self._last_checkpoint}"
        return "no checkpoint had been written yet (see --save-every)"

    def _train_step(self) -> None:
        settings, accumulated = self.settings, self.settings.accumulation_steps
        factor = schedule_factor(self.step, self.total_steps, settings.warmup, settings.schedule)
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        total: torch.Tensor | None = None
        joint = False
        loss_fn: Callable[[Any], torch.Tensor] = lambda batch: self.task.loss(self.model, batch)  # noqa: E731
        for k in range(accumulated):
            rows = [self.train_rows[i] for i in self.stream[self.step * accumulated + k]]
            loss = self.controller.backward(loss_fn, to_device(self.task.collate(rows), self.device)) / accumulated
            total = loss if total is None else total + loss
            joint = joint or self.controller.last_loss_is_joint
        assert total is not None
        self._losses.append(total)
        self._joint.append(joint)
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trainable, settings.max_grad_norm)
        self.optimizer.step()
        info = self.controller.step()
        self.optimizer.zero_grad()
        if info.allocated:
            self.live = sum(self.controller.live_ranks().values())

    def _flush_losses(self) -> float:
        """Mean training loss since the last flush; waits for the device.

        Steps whose loss counts path rows too (at smaller alpha, so larger) are left out, unless there are no others.

        Raises:
            NonFiniteLoss: one of them is NaN or infinite.
        """
        values = torch.stack(self._losses).tolist()
        first = self.step - len(values) + 1
        joint, self._losses, self._joint = self._joint, [], []
        for offset, value in enumerate(values):
            if value - value != 0.0:  # NaN and infinity alone differ from themselves
                raise NonFiniteLoss(
                    f"expected a finite loss, got {value} at step {first + offset}; {self._kept()}. {_REMEDY}"
                )
        plain = [value for value, is_joint in zip(values, joint, strict=True) if not is_joint] or values
        return sum(plain) / len(plain)

    def _evaluate_on_the_way(self, metrics: MetricsFile, progress: Progress) -> None:
        values = self.evaluate()
        self._evaluation_due = False
        outcome, name = self._outcome, self.task.metric
        metrics.write("eval", self.step, **values)
        progress.say(f"step {self.step}  " + "  ".join(f"{key} {value:.4f}" for key, value in values.items()))
        if self.controller.phase != "final":
            return  # ranks still change: neither the best adapter nor patience is about these
        best, value = outcome.best, values[name]
        if best is None or (value != best[name] and (value > best[name]) == self.task.higher_is_better):
            outcome.best, outcome.best_step, self._bad_evaluations = values, self.step, 0
            save_adapter(self.model, self.output / "best", self.controller)
            return
        self._bad_evaluations += 1
        if self.settings.patience and self._bad_evaluations >= self.settings.patience:
            outcome.stopped_early = True
            progress.say(
                f"stopped early at step {self.step}: {self._bad_evaluations} evaluations without a better {name} "
                f"than {best[name]:.4f} at step {outcome.best_step}"
            )


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    folders = sorted((output / CHECKPOINTS).glob("step-*"))
    return [folder for folder in folders if place(folder, TRAINER_FILE).is_file()]


def keep_newest(output: Path, count: int) -> None:
    """Remove all but the ``count`` newest checkpoints of a run, and what killed saves and removals left of others."""
    kept = checkpoints(output)[-count:]
    for folder in sorted((output / CHECKPOINTS).glob("step-*")):
        finish(folder)
        if folder not in kept:
            # First what makes it a checkpoint: a removal that is cut short must not leave one that cannot be loaded.
            (folder / TRAINER_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder)


def latest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint folder of a run, or None."""
    found = checkpoints(output)
    return found[-1] if found else None
