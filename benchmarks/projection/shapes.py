"""Models by their shapes alone: frozen configurations, any hub model's or any file's; built on the meta device in any depth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from igulora.errors import first_line, nearest
from igulora.training.extras import require

CONFIGS = Path(__file__).resolve().parent / "configs"
# Written by those who save a configuration; no argument of it.
_FOREIGN = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
WORKING = (
    "dense models work: Llama, Mistral, Qwen, Gemma, Phi-3, GPT-J, GPT-NeoX, OPT, BLOOM, BERT, RoBERTa and their like"
)


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

    def key(self, common: str) -> str:
        """What the configuration calls an entry: GPT-J has n_layer where others have num_hidden_layers."""
        return common if common in self.config else _own_names(self.config["model_type"]).get(common, common)

    @property
    def layers(self) -> int:
        """Repeated blocks."""
        return int(self.config[self.key("num_hidden_layers")])

    @property
    def longest(self) -> int | None:
        """Positions that it can tell apart, where the configuration says so."""
        most = self.config.get(self.key("max_position_embeddings"))
        # RoBERTa counts its positions from behind the padding token.
        return most - 2 if most and self.config["model_type"] in ("roberta", "xlm-roberta", "camembert") else most

    @cached_property
    def even(self) -> bool:
        """Whether all blocks are of one kind, so that two of them say what the others cost."""
        return equal_blocks(self.build())

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

        Raises:
            ValueError: transformers can make no such model of the configuration.
        """
        transformers = require("transformers", "bench", "a projection")
        values = {k: v for k, v in self.config.items() if k not in _FOREIGN} | changes
        layers = self.layers if layers is None else layers
        values[self.key("num_hidden_layers")] = layers
        if values.get("layer_types"):
            values["layer_types"] = values["layer_types"][:layers]
        kind = "AutoModelForSequenceClassification" if self.classifies else "AutoModelForCausalLM"
        try:
            config = transformers.AutoConfig.for_model(self.config["model_type"], **values)
            with torch.device(device):
                model = getattr(transformers, kind).from_config(config, dtype=dtype)
        except ValueError as error:
            raise ValueError(
                f"expected a configuration of which transformers' {kind} can make a model, got {self.title}: {first_line(error)}"
            ) from error
        return model.requires_grad_(False).train()

    def batch(self, rows: int, length: int, device: str = "meta") -> dict[str, Tensor]:
        """Sequences of tokens, labels with them; zeros where there are values at all."""
        tokens = torch.zeros((rows, length), dtype=torch.int64, device=device)
        return {"input_ids": tokens, "labels": tokens[:, 0] if self.classifies else tokens}


def _own_names(kind: str) -> dict[str, str]:
    """A kind of model's own names of entries, by those that most have."""
    known = require("transformers", "bench", "a projection").CONFIG_MAPPING
    if kind not in known:
        raise ValueError(f"expected a model_type that transformers knows, got {kind!r}.{nearest(kind, known)}")
    return known[kind].attribute_map


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
        f"expected {type(model).__name__} to keep its {count} layers in one nn.ModuleList, found none of that length; {WORKING}"
    )


def linears_of(model: nn.Module) -> tuple[str, ...]:
    """Names within a block of its linear layers, which is what methods adapt: heads are left as they are.

    Raises:
        ValueError: a block has matrices that no linear layer holds: GPT-2's Conv1D, which not every method adapts, or a mixture's experts,
            whose products the counters do not know.
    """
    names: dict[str, None] = {}
    for block in blocks_of(model):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                names[name] = None
            elif any(p.ndim > 1 for p in module.parameters(recurse=False)):
                raise ValueError(
                    f"expected blocks of {type(model).__name__} that keep all matrices in nn.Linear layers, which methods adapt; got "
                    f"{name or 'the block'} ({type(module).__name__}); {WORKING}"
                )
    return tuple(names)


def equal_blocks(model: nn.Module) -> bool:
    """Whether the repeated blocks have the same modules, shapes and settings; a block may know its own number."""
    traits = [_traits(block) for block in blocks_of(model)]
    kinds = set(getattr(model.config, "layer_types", None) or ())
    return (
        len(kinds) < 2
        and all(t.keys() == traits[0].keys() for t in traits)
        and all(_same_or_counted([t[key] for t in traits]) for key in traits[0])
    )


def _traits(block: nn.Module) -> dict[tuple[str, str], Any]:
    """What tells a block from others: of each module in it the class, the plain attributes and the parameters' shapes."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in block.named_modules():
        plain = {k: v for k, v in vars(module).items() if v is None or isinstance(v, (bool, int, float, str))}
        shapes = {k: p.shape for k, p in module.named_parameters(recurse=False)}
        found |= {(name, key): value for key, value in {"": type(module), **plain, **shapes}.items()}
    return found


def _same_or_counted(values: list[Any]) -> bool:
    return all(v == values[0] for v in values) or values == list(range(len(values)))


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
    shape = Shape(name, name, config if isinstance(config, dict) else {})
    needed = shape.key("num_hidden_layers") if "model_type" in shape.config else "model_type"
    if needed not in shape.config:
        raise ValueError(
            f"expected a configuration with its model_type and its number of layers, got one without {needed} from {name}; {WORKING}"
        )
    return shape
