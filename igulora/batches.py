"""Batches of any shape: how many sequences they hold, picking and appending sequences, counting loss terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .bank import base_model

IGNORED_LABEL = -100


def _leaves(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in _leaves(value)]
    if isinstance(batch, (tuple, list)):
        return [t for value in batch for t in _leaves(value)]
    return []


def map_tensors(batch: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``fn`` to every tensor of a tensor, tuple, list or mapping; other values stay."""
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(value, fn) for key, value in batch.items()}
        try:
            return type(batch)(mapped)  # type: ignore[call-arg]
        except TypeError:
            return mapped
    if isinstance(batch, (tuple, list)):
        values = [map_tensors(value, fn) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def is_flattened(batch: Any) -> bool:
    """Whether several sequences lie behind one another in one row (packing without padding): none of them can be picked or added.

    By its shapes: token ids in one row beside the lengths of sequences, or beside positions and no attention mask.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim < 2 or ids.shape[0] != 1:
        return False
    if any(t.ndim > 0 and t.shape[0] != 1 for t in _leaves(batch)):
        return True
    return isinstance(batch.get("position_ids"), Tensor) and batch.get("attention_mask") is None


def batch_size(batch: Any) -> int:
    """The first dimension that the batch's tensors share; 1 where sequences lie flattened in one row.

    Raises:
        TypeError: there is no tensor in the batch.
        ValueError: tensors disagree about the first dimension, or the batch is empty.
    """
    if is_flattened(batch):
        return 1
    leaves = [t for t in _leaves(batch) if t.ndim > 0]
    if not leaves:
        raise TypeError(
            f"expected a batch of tensors (a tensor, tuple, list or mapping), got {type(batch).__name__}; path passes pick sequences "
            'from it. Pass the batch as second argument of ctl.backward, or use estimator="instantaneous"'
        )
    sizes = {t.shape[0] for t in leaves}
    if len(sizes) > 1:
        examples = isinstance(batch, list) and all(isinstance(example, Mapping) for example in batch)
        hint = "; this is a list of examples: collate them into one mapping of tensors" if examples else ""
        raise ValueError(
            f"expected tensors with one batch size in their first dimension, got sizes {sorted(sizes)}{hint}"
        )
    size = sizes.pop()
    if size == 0:
        raise ValueError("expected at least one sequence in the batch, got none")
    return size


def _chosen(t: Tensor, rows: Tensor) -> Tensor:
    # To the host the copy has to be waited for: an index that is still on its way would be read as it is.
    return t.index_select(0, rows.to(t.device, non_blocking=t.device.type != "cpu"))


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on a device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()  # a copy from pageable memory would wait for the device
    return host.to(device, non_blocking=True)


def take_rows(batch: Any, rows: Tensor) -> Any:
    """The sequences ``rows`` (int64 index on any device) of a batch; on the batch's own device nothing waits.

    A flattened batch is one sequence and given as it is.
    """
    if is_flattened(batch):
        return batch
    return map_tensors(batch, lambda t: t if t.ndim == 0 else _chosen(t, rows))


def append_rows(batch: Any, rows: Tensor) -> Any:
    """The batch with the sequences ``rows`` of it appended."""

    def extended(t: Tensor) -> Tensor:
        return t if t.ndim == 0 else torch.cat((t, _chosen(t, rows)))

    return map_tensors(batch, extended)


def count_loss_terms(batch: Any, model: nn.Module) -> Tensor:
    """How many terms each sequence adds to a loss that is a mean over all terms: float32 (batch,), on the labels' device.

    Read from ``batch["labels"]``: labels of shape (batch, length) count the entries other than -100 (shifted by one for causal language
    models; ``batch["shift_labels"]`` are shifted already); labels of shape (batch,), floating-point labels, or none at all count one term
    per sequence.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    shifted = batch.get("shift_labels") if isinstance(batch, Mapping) else None
    if isinstance(shifted, Tensor):
        return (shifted != IGNORED_LABEL).flatten(1).sum(1).to(torch.float32)
    if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_floating_point():
        where = _leaves(batch)[0]
        return torch.ones(batch_size(batch), dtype=torch.float32, device=where.device)
    if is_causal_lm(model):
        labels = labels[:, 1:]
    return (labels != IGNORED_LABEL).flatten(1).sum(1).to(torch.float32)


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model's loss shifts the labels by one token, by the class names that transformers gives its models."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    model = base_model(model)
    return any(mark in cls.__name__ for cls in type(model).__mro__ for mark in ("ForCausalLM", "LMHead"))


def coupling(model: nn.Module) -> str | None:
    """Why the rows of a batch influence each other in this model beyond the loss, or None when they do not."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats:
            return f"{name} ({type(module).__name__}) computes statistics over the batch in training"
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0):
        return "its router balancing loss (output_router_logits) couples the rows of a batch"
    return None
