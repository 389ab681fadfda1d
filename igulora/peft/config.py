"""IGULoraConfig: the options of igulora as a configuration of PEFT, under its names and under those of PEFT's AdaLoRA."""

from __future__ import annotations

import dataclasses
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft.config import PeftConfig

from ..config import IGUConfig
from .registration import peft_type

# AdaLoRA's name in PEFT -> ours.
ADALORA_NAMES = {
    "init_r": "r",
    "target_r": "target_rank",
    "tinit": "t_init",
    "tfinal": "t_final",
    "deltaT": "delta_t",
    "total_step": "total_steps",
    "orth_reg_weight": "orthogonality",
    "lora_dropout": "dropout",
}
_DEFAULT_RANK = IGUConfig.r


@dataclass
class IGULoraConfig(PeftConfig, IGUConfig):
    """Options of igulora for ``get_peft_model``: all of :class:`igulora.IGUConfig`, and PEFT's own of the same meaning as in PEFT.

    ``AdaLoraConfig(...)`` becomes this by changing the name: AdaLoRA's arguments (``init_r``, ``target_r``, ``tinit``, ``tfinal``,
    ``deltaT``, ``total_step``, ``orth_reg_weight``, ``lora_dropout``) are other names of ours, readable afterwards too. Options that are
    not given take igulora's defaults; ``method="adalora"`` scores as AdaLoRA does.

    Args:
        target_modules: name endings, a regular expression or "all-linear"; None for what PEFT's AdaLoRA adapts in that architecture.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern, trainable_token_indices: as in PEFT.
        rank_pattern: regular expression over the ends of names -> stored triplets.
        init_lora_weights: False draws lambda from N(0, 1), and P where it would start at zero, so that a fresh adapter changes outputs.
        seed: of the start; None draws it from PyTorch's generator, as PEFT does.
        bias, fan_in_fan_out: AdaLoRA's; ``bias`` can only be "none", and layers say themselves how their weight lies.

    Raises:
        ValueError, TypeError: an option is unknown, out of range, given twice with two values, or AdaLoRA's and without meaning here.
    """

    r: int | None = None  # type: ignore[assignment]
    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: list[str] | None = None  # type: ignore[assignment]
    rank_pattern: dict[str, int] = field(default_factory=dict)
    seed: int | None = None  # type: ignore[assignment]
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_lora_weights: bool = True
    bias: str = "none"
    fan_in_fan_out: bool = False
    init_r: InitVar[int | None] = None
    target_r: InitVar[int | None] = None
    tinit: InitVar[int | None] = None
    tfinal: InitVar[int | None] = None
    deltaT: InitVar[int | None] = None
    total_step: InitVar[int | None] = None
    orth_reg_weight: InitVar[float | None] = None
    lora_dropout: InitVar[float | None] = None
    use_dora: InitVar[bool] = False
    use_rslora: InitVar[bool] = False
    loftq_config: InitVar[dict[str, Any] | None] = None
    alpha_pattern: InitVar[dict[str, Any] | None] = None

    def __post_init__(
        self,
        init_r: int | None,
        target_r: int | None,
        tinit: int | None,
        tfinal: int | None,
        deltaT: int | None,
        total_step: int | None,
        orth_reg_weight: float | None,
        lora_dropout: float | None,
        use_dora: bool,
        use_rslora: bool,
        loftq_config: dict[str, Any] | None,
        alpha_pattern: dict[str, Any] | None,
    ) -> None:
        PeftConfig.__post_init__(self)
        self.peft_type = peft_type()
        given = (init_r, target_r, tinit, tfinal, deltaT, total_step, orth_reg_weight, lora_dropout)
        for (theirs, ours), value in zip(ADALORA_NAMES.items(), given, strict=True):
            self._take(theirs, ours, value)
        refused: dict[str, Any] = {
            "use_dora": use_dora,
            "use_rslora": use_rslora,
            "loftq_config": loftq_config,
            "alpha_pattern": alpha_pattern,
            "bias": self.bias != "none" and self.bias,
        }
        for name, value in refused.items():
            if value:
                raise ValueError(
                    f"expected no {name} with igulora, got {name}={value!r}; leave it out: {_REASONS[name]}"
                )
        self.refuse_parameters()
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"expected init_lora_weights to be True or False, got {self.init_lora_weights!r}; choose the start by init= and init_lambda"
            )
        self.r = _DEFAULT_RANK if self.r is None else self.r
        self.rank_pattern = self.rank_pattern or {}
        if self.r == 0 and not self.rank_pattern:
            raise ValueError(
                "expected r >= 1, or a rank_pattern that gives some layers a rank, got r=0: no layer would be adapted"
            )
        seed, self.seed = self.seed, 0 if self.seed is None else self.seed
        IGUConfig.__post_init__(self)
        self.seed = seed
        self._check_targets()
        if {self.blocks, *self.block_pattern.values()} != {1}:
            raise ValueError(
                "expected blocks=1: PEFT's method adapts whole matrices, got blocks; use igulora.adapt(model, igulora.IGUConfig(...)), and "
                "export the result for PEFT by igulora.export_peft"
            )
        if self.bidirectional:
            raise ValueError(
                f"expected a method that prunes or keeps ranks, got method={self.method!r}: PEFT's method has no rows in reserve to move "
                "triplets to; use igulora.adapt(model, igulora.IGUConfig(...)), and export the result for PEFT by igulora.export_peft"
            )

    def refuse_parameters(self) -> None:
        """Raise where ``target_parameters``, an option of :func:`igulora.adapt`, is given."""
        if self.target_parameters:
            raise ValueError(
                f"expected target_modules only, got target_parameters={self.target_parameters!r}: PEFT's method adapts modules, and "
                "experts that a model keeps in one parameter are none; adapt those by igulora.adapt(model, "
                "igulora.IGUConfig(target_parameters=...)), and export the result for PEFT by igulora.export_peft"
            )

    def _take(self, theirs: str, ours: str, value: Any) -> None:
        """AdaLoRA's name for an option of ours."""
        mine = getattr(self, ours)
        if value is None:
            return
        unset = mine is None or (ours == "dropout" and mine == 0.0)
        if not unset and mine != value:
            raise ValueError(
                f"expected one value for {ours} (AdaLoRA's {theirs}), got {ours}={mine!r} and {theirs}={value!r}; give one of them "
                "(dataclasses.replace carries both names over: give it both)"
            )
        setattr(self, ours, value)

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "expected target_modules as a list of names with layers_to_transform, got a regular expression; say the layers in it"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("expected layers_to_transform with layers_pattern, got None; say which layers")

    def plain(self) -> IGUConfig:
        """The same options without PEFT's: what a controller reads and a folder of :func:`igulora.save_adapter` holds."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(IGUConfig)}
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if values[name] is None:
                values[name] = []
            elif not isinstance(values[name], str):
                values[name] = sorted(values[name])
        if isinstance(
            values["exclude_modules"], str
        ):  # a regular expression: what it excluded is known by the adapted layers
            values["exclude_modules"] = []
        values["seed"] = values["seed"] or 0
        return IGUConfig(**values)


_REASONS = {
    "use_dora": "no magnitudes are trained beside the triplets",
    "use_rslora": "the update is scaled by lora_alpha / r",
    "loftq_config": "the base weights stay what they are",
    "alpha_pattern": "all layers share one scale, so that their triplets can be compared",
    "bias": "biases are not trained",
}


def _other_name(ours: str) -> property:
    def get(self: IGULoraConfig) -> Any:
        return getattr(self, ours)

    def put(self: IGULoraConfig, value: Any) -> None:
        setattr(self, ours, value)

    return property(get, put, doc=f"AdaLoRA's name of ``{ours}``.")


# Arguments of __init__ by now; as attributes they read and write the option they are another name of.
for _theirs, _ours in ADALORA_NAMES.items():
    setattr(IGULoraConfig, _theirs, _other_name(_ours))
