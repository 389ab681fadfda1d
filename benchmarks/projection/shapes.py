"""Models by their shapes alone: frozen configurations, any hub model's or any file's; built on the meta device in any depth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from igulora.errors import first_line, nearest
from igulora.training.extras import require

CONFIGS = Path(__file__).resolve().parent / "configs"
# Written by those who save a configuration; no argument of it.
_FOREIGN = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Shape:
    """A model that has no weights.

    Attributes:
        name: as it was asked for. title: for tables.
        config: as in a hub model's ``config.json``.
        parameters: as published, or None.
    """

    name: str
    title: str
    config: dict[str, Any]
    parameters: int | None = None

    @property
    def layers(self) -> int:
        """Repeated blocks."""
        return int(self.config["num_hidden_layers"])

    @property
    def classifies(self) -> bool:
        """Whether it classifies sequences; else it predicts the next token."""
        return any(a.endswith("ForSequenceClassification") for a in self.config.get("architectures") or ())

    def build(
        self, layers: int | None = None, device: str = "meta", dtype: torch.dtype = torch.bfloat16, **changes: Any
    ) -> nn.Module:
        """The model, frozen and in training mode.

        Args:
            layers: repeated blocks, if not all.
            changes: of the configuration.
        """
        transformers = require("transformers", "bench", "a projection")
        values = {k: v for k, v in self.config.items() if k not in _FOREIGN} | changes
        layers = self.layers if layers is None else layers
        values["num_hidden_layers"] = layers
        if values.get("layer_types"):
            values["layer_types"] = values["layer_types"][:layers]
        config = transformers.AutoConfig.for_model(self.config["model_type"], **values)
        kind = "AutoModelForSequenceClassification" if self.classifies else "AutoModelForCausalLM"
        with torch.device(device):
            model = getattr(transformers, kind).from_config(config, dtype=dtype)
        return model.requires_grad_(False).train()

    def batch(self, rows: int, length: int, device: str = "meta") -> dict[str, Tensor]:
        """Sequences of tokens, labels with them; zeros where there are values at all."""
        tokens = torch.zeros((rows, length), dtype=torch.int64, device=device)
        return {"input_ids": tokens, "labels": tokens[:, 0] if self.classifies else tokens}


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The repeated blocks.

    Raises:
        ValueError: there is no list of as many modules as the configuration has layers.
    """
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"expected {type(model).__name__} to keep its {count} layers in one nn.ModuleList, found none of that length; project a decoder "
        "or an encoder of equal layers"
    )


def linears_of(model: nn.Module) -> tuple[str, ...]:
    """Names within a block of its linear layers, which is what methods adapt: heads are left as they are."""
    return tuple(name for name, m in blocks_of(model)[0].named_modules() if isinstance(m, nn.Linear))


def frozen() -> dict[str, Shape]:
    """The configurations that come with igulora, by name."""
    found = {}
    for file in sorted(CONFIGS.glob("*.json")):
        entry = json.loads(file.read_text(encoding="utf-8"))
        found[file.stem] = Shape(file.stem, entry["title"], entry["config"], entry["parameters"])
    return found


def _by_hub_name() -> dict[str, str]:
    return {json.loads(f.read_text(encoding="utf-8"))["hub"].lower(): f.stem for f in CONFIGS.glob("*.json")}


def find_shape(name: str) -> Shape:
    """A frozen configuration by its name or its hub name, a ``config.json`` or a folder with one, or a hub model's.

    Raises:
        ValueError: nothing has this name (names the nearest), or what was found is no configuration.
    """
    own, path = frozen(), Path(name)
    key = _by_hub_name().get(name.lower(), name.lower())
    if key in own:
        return own[key]
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        return _from_file(name, path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    raise ValueError(
        f"expected a model: {', '.join(own)}, a config.json or a folder with one, or a hub model as owner/name; got {name!r}."
        f"{nearest(name.lower(), own)}"
    )


def _from_file(name: str, path: Path) -> Shape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"expected a model's config.json, got {path}, which does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a model's config.json, got {path}, which is not JSON: {error}") from None
    return _checked(name, config)


def _from_hub(name: str) -> Shape:
    transformers = require("transformers", "bench", "a hub model's configuration")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = first_line(error).rstrip(".")
        raise ValueError(
            f"expected a hub model whose configuration can be read, got {name!r}: {first}."
            f"{nearest(name.lower(), [*frozen(), *_by_hub_name()])} A config.json of your own will do, too"
        ) from None
    return _checked(name, config.to_dict())


def _checked(name: str, config: Any) -> Shape:
    missing = [k for k in ("model_type", "num_hidden_layers") if not isinstance(config, dict) or k not in config]
    if missing:
        raise ValueError(
            f"expected a configuration with model_type and num_hidden_layers, got one without {' and '.join(missing)} from {name}"
        )
    return Shape(name, name, config)
