"""igulora under transformers' Trainer: :class:`IGUTrainer`, a mixin for its subclasses, and a callback where no path passes are needed.

A module of its own, so that ``import igulora`` does not import transformers.
"""

from __future__ import annotations

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("igulora.trainer needs transformers and accelerate; pip install 'igulora[hf]'") from error

from .hf.callback import IGUCallback
from .hf.mixin import IGUTrainerMixin

__all__ = ["IGUCallback", "IGUTrainer", "IGUTrainerMixin"]


class IGUTrainer(IGUTrainerMixin, Trainer):
    """transformers' Trainer for adaptive-rank models; see :class:`IGUTrainerMixin` for what it adds."""
