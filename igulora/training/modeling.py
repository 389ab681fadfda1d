"""Loading what a run fine-tunes: a model from a folder or the hub, its tokenizer, and the names of a fresh head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import first_line
from .extras import require
from .tasks import pad_token


def load_tokenizer(name: str) -> Any:
    """The tokenizer of ``name``, a folder or a hub model.

    Raises:
        ValueError: there is none.
    """
    transformers = require("transformers", "demo", "fine-tuning a transformers model")
    _check_folder(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"expected a model with a tokenizer at {name!r}, got: {first_line(error)}") from error


def load_causal_lm(name: str, dtype: str) -> Any:
    """The causal language model ``name`` in ``dtype`` ("auto": the one it is stored in).

    Raises:
        ValueError: there is no such model, or it is of another kind.
    """
    transformers = require("transformers", "demo", "fine-tuning a transformers model")
    model = _load(transformers.AutoModelForCausalLM, name, dtype)[0]
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as encoders

    if model.config.model_type in encoders and not getattr(model.config, "is_decoder", False):
        raise ValueError(
            f"expected a causal language model at {name!r} for task causal-lm, got the encoder {type(model).__name__}; "
            "use --task classification or regression"
        )
    return model


def load_sequence_model(name: str, dtype: str, classes: Sequence[str] | None, tokenizer: Any) -> tuple[Any, list[str]]:
    """A sequence classifier over ``classes`` (None: regression, one number) on the model ``name``, and its head's modules.

    The head is what the checkpoint does not hold, and whatever lies outside the encoder; it is trained and saved whole.

    Raises:
        ValueError: there is no such model, or it is of another kind.
    """
    transformers = require("transformers", "demo", "fine-tuning a transformers model")
    options: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if classes is not None:
        names = dict(enumerate(classes))
        options = {"num_labels": len(names), "id2label": names, "label2id": {label: i for i, label in names.items()}}
    model, missing = _load(
        transformers.AutoModelForSequenceClassification, name, dtype, ignore_mismatched_sizes=True, **options
    )
    model.config.pad_token_id = pad_token(tokenizer)
    return model, head_modules(model, missing)


def head_modules(model: nn.Module, missing: Sequence[str] = ()) -> list[str]:
    """Names of the modules outside the encoder and of those whose weights were ``missing`` from the checkpoint."""
    encoder = getattr(model, "base_model_prefix", "")
    heads = {
        name for name, child in model.named_children() if name != encoder and next(child.parameters(), None) is not None
    }
    for key in missing:
        owner = key.rpartition(".")[0]
        if owner and not any(owner == head or owner.startswith(f"{head}.") for head in heads):
            heads.add(owner)
    return sorted(heads)


def _load(kind: Any, name: str, dtype: str, **options: Any) -> tuple[Any, list[str]]:
    _check_folder(name)
    kept = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model, info = kind.from_pretrained(name, dtype=kept, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"expected a model for {kind.__name__} at {name!r}, got: {first_line(error)}") from error
    return model, sorted(info["missing_keys"])


def _check_folder(name: str) -> None:
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"expected a model's folder with a config.json at {name}, found none; was the model saved there?"
        )
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2):
        raise ValueError(
            f"expected a model's folder, found nothing at {name}; check the path or give a hub name (owner/model)"
        )
