"""RunSettings: everything about a training run that is not one of IGUConfig's scientific options."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..alignment import MAX_BLOCKS
from ..errors import check_choice, first_line

TASKS = ("causal-lm", "classification", "regression")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class RunSettings:
    """How a run trains, evaluates and writes. Steps are optimizer steps throughout; lengths are tokens.

    ``steps`` wins over ``epochs``. ``batch_size`` sequences make a micro-batch, ``accumulation_steps`` micro-batches an optimizer
    step. ``warmup`` is the fraction of the steps in which the learning rate rises, ``lambda_lr_ratio`` the learning rate of λ over
    ``lr`` (None: the library's default). 0 switches ``eval_every``, ``save_every`` and ``patience`` (evaluations without
    improvement after pruning) off; ``eval_every`` None is once an epoch. ``trace`` names modules (by name endings) whose score
    series is recorded; None takes the first, a middle and the last one. ``max_grad_norm`` 0 does not clip. ``align_batches``
    micro-batches are measured before a run of RaLoRA, for at most ``align_max_blocks`` blocks (a power of two) and ranks from
    ``align_r_min`` to ``align_r_max`` (RaLoRA-Pro; None: 4 r).

    Raises:
        ValueError, TypeError: an option is unknown or out of range; says what was expected.
    """

    task: str = "causal-lm"
    lr: float = 5e-4
    lambda_lr_ratio: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.06
    schedule: str = "linear"
    max_grad_norm: float = 0.0
    batch_size: int = 8
    eval_batch_size: int | None = None
    accumulation_steps: int = 1
    epochs: float = 3.0
    steps: int | None = None
    max_length: int = 512
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    system_prompt: str | None = None
    seed: int = 0
    eval_every: int | None = None
    save_every: int = 500
    log_every: int = 10
    patience: int = 10
    keep_checkpoints: int = 2
    threads: int | None = None
    device: str = "auto"
    trace: tuple[str, ...] | None = None
    align_batches: int = 8
    align_max_blocks: int = MAX_BLOCKS
    align_r_min: int = 1
    align_r_max: int | None = None

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("schedule", self.schedule, SCHEDULES)
        whole = {
            "batch_size": 1, "accumulation_steps": 1, "max_length": 2, "seed": 0, "eval_every": 0, "save_every": 0,
            "log_every": 1, "patience": 0, "keep_checkpoints": 1, "steps": 1, "threads": 1, "eval_batch_size": 1,
            "align_batches": 1, "align_max_blocks": 1, "align_r_min": 1, "align_r_max": 1,
        }  # fmt: skip
        for name, low in whole.items():
            value = getattr(self, name)
            if value is None and name in ("steps", "threads", "eval_batch_size", "eval_every", "align_r_max"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"expected {name} to be an int, got {value!r} ({type(value).__name__})")
            if value < low:
                raise ValueError(f"expected {name} >= {low}, got {value}")
        for name in ("lr", "epochs"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"expected {name} > 0 and finite, got {getattr(self, name)}")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"expected {name} >= 0 and finite, got {getattr(self, name)}")
        if self.align_max_blocks & (self.align_max_blocks - 1):
            raise ValueError(f"expected align_max_blocks to be a power of two, got {self.align_max_blocks}")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"expected warmup, a fraction of the steps, in [0, 1), got {self.warmup}")
        if self.lambda_lr_ratio is not None and not 0.0 <= self.lambda_lr_ratio < float("inf"):
            raise ValueError(f"expected lambda_lr_ratio >= 0 and finite, got {self.lambda_lr_ratio}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return dataclasses.asdict(self) | {"trace": None if self.trace is None else list(self.trace)}


# Options that may differ between a run and its resumption without changing what is learned.
RESUMABLE = frozenset({"save_every", "log_every", "keep_checkpoints", "threads", "eval_batch_size"})


def find_device(name: str) -> torch.device:
    """The device of this name; of "auto" a GPU where there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).tolist()  # the meta device would make a tensor, too
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"expected a device of this machine such as cpu or cuda, got {name!r} ({first_line(error)})"
        ) from error


def schedule_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Learning rate at ``step`` (0-based) over the base rate: a linear rise over ``warmup * total`` steps, then the schedule."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - rising) / max(1, total - rising))
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
