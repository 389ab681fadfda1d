"""Fine-tuning runs: data, tasks, the training loop, its pictures and its report. ``igulora finetune`` is built on this.

Needs what the ``demo`` extra installs (transformers, pyarrow, rich, matplotlib); the core of igulora does not.
"""

from .data import DataSource, Example, load_table
from .loop import Interrupted, NonFiniteLoss, Trainer
from .run import RunResult, finetune
from .settings import RunSettings

__all__ = [
    "DataSource",
    "Example",
    "Interrupted",
    "NonFiniteLoss",
    "RunResult",
    "RunSettings",
    "Trainer",
    "finetune",
    "load_table",
]
