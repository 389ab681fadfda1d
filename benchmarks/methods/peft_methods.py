"""PEFT's methods, measured as its users get them, with its defaults: on a bf16 base that means adapters in fp32 and activations cast
to fp32 for them (``autocast_adapter_dtype=True``), for AdaLoRA a regulariser of weight 0.5 and an allocation at every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cases import Case
from .method import Adapted, Batch, Method, missing

INSTALL = "in igulora's folder: pip install '.[bench]'"
ADAPTER = "default"  # the name PEFT gives to the adapter it makes
_PREFIX = "base_model.model."


def _task_type(model: nn.Module) -> str | None:
    """PEFT's wrapper for language models; any other model gets the plain one, which trains no head."""
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT 0.21 reads a property that transformers 5.23 renames; nobody needs to hear of it at every step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        yield


class PeftMethod(Method):
    """What PEFT's methods share.

    Attributes:
        options: of PEFT's configuration, beside rank and targets. autocast: whether PEFT keeps 16-bit adapters in fp32 (its default).
    """

    options: ClassVar[dict[str, Any]] = {}
    autocast = True

    @classmethod
    def available(cls) -> str | None:
        return missing("peft", INSTALL)

    def _wrap(self, model: nn.Module, config: Any) -> nn.Module:
        import peft

        return peft.get_peft_model(model, config, autocast_adapter_dtype=self.autocast)

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """PEFT's layers by their names in the base model."""
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                yield name.removeprefix(_PREFIX), module


class PeftLora(PeftMethod):
    """PEFT's LoRA on the case's linear layers."""

    name = "peft-lora"
    title = "PEFT LoRA"

    def __init__(self, model: nn.Module, case: Case) -> None:
        import peft

        config = peft.LoraConfig(
            r=case.rank,
            lora_alpha=case.rank,
            target_modules=case.target_modules,
            task_type=_task_type(model),
            **self.options,
        )
        super().__init__(self._wrap(model, config), case)
        self._optimize([p for p in self.model.parameters() if p.requires_grad])

    def adapted(self) -> Iterator[Adapted]:
        for name, layer in self.layers():
            trained = {"A": layer.lora_A[ADAPTER].weight, "B": layer.lora_B[ADAPTER].weight}
            yield Adapted(name, trained, partial(_lora_weight, scale=layer.scaling[ADAPTER]))


class PeftLoraNarrow(PeftLora):
    """PEFT's LoRA without its conversion of 16-bit adapters to fp32: faster, and not what users get unless they ask for it."""

    name = "peft-lora-16bit"
    title = "PEFT LoRA, `autocast_adapter_dtype=False`"
    autocast = False


class PeftDora(PeftLora):
    """PEFT's DoRA on all linear layers: LoRA whose weight is scaled row by row to a trained length."""

    name = "peft-dora"
    title = "PEFT DoRA"
    start_bound = 16  # W's rows are divided by their lengths and multiplied by them again, each layer rounds
    options: ClassVar[dict[str, Any]] = {"use_dora": True}

    def adapted(self) -> Iterator[Adapted]:
        lengths = {name: layer.lora_magnitude_vector[ADAPTER].weight for name, layer in self.layers()}
        for layer in super().adapted():
            trained = layer.trained | {"length": lengths[layer.name]}
            yield Adapted(layer.name, trained, partial(_dora_weight, unscaled=layer.weight))


class PeftAdaLora(PeftMethod):
    """PEFT's AdaLoRA on all linear layers, stepped as its documentation says."""

    name = "peft-adalora"
    title = "PEFT AdaLoRA"
    adaptive = True

    def __init__(self, model: nn.Module, case: Case) -> None:
        import peft

        config = peft.AdaLoraConfig(
            init_r=case.rank,
            target_r=case.target_rank,
            lora_alpha=case.rank,
            total_step=case.total_steps,
            target_modules=case.target_modules,
            task_type=_task_type(model),
        )
        super().__init__(self._wrap(model, config), case)
        self._optimize([p for p in self.model.parameters() if p.requires_grad])
        self.global_step = 0

    def bare(self, batch: Batch) -> Tensor:
        loss = self.model.base_model.model(**batch).loss
        loss.backward()
        return loss.detach()

    def backward(self, batch: Batch) -> Tensor:
        return super().bare(batch)  # through PEFT's wrapper, which adds the regulariser

    def book(self) -> None:
        self.global_step += 1
        self.model.base_model.update_and_allocate(self.global_step)

    def adapted(self) -> Iterator[Adapted]:
        for name, layer in self.layers():
            trained = {part: getattr(layer, f"lora_{part}")[ADAPTER] for part in "AEB"}
            rank = layer.ranknum[ADAPTER]
            # PEFT 0.21 trains it too, where the model is in 16 bits and what it adds is cast to float32.
            if rank.requires_grad:
                trained["ranknum"] = rank
            yield Adapted(name, trained, partial(_svd_weight, scaling=layer.scaling[ADAPTER], rank=rank.detach()))

    def score_state(self) -> Iterable[Tensor]:
        allocator = self.model.base_model.rankallocator
        for states in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
            yield from states.values()

    def live(self) -> int | None:
        pattern = self.model.peft_config[ADAPTER].rank_pattern
        return sum(sum(kept) for kept in pattern.values()) if pattern else None


def _lora_weight(W0: Tensor, values: dict[str, Tensor], scale: float) -> Tensor:
    return W0 + scale * values["B"] @ values["A"]


def _svd_weight(W0: Tensor, values: dict[str, Tensor], scaling: float, rank: Tensor) -> Tensor:
    scale = scaling / (values.get("ranknum", rank.to(W0.dtype)) + 1e-5)
    return W0 + scale * (values["B"] * values["E"].view(-1)) @ values["A"]


def _dora_weight(W0: Tensor, values: dict[str, Tensor], unscaled: Any) -> Tensor:
    """DoRA, its section 4.3: the norm that rows are divided by counts as a constant in the gradient."""
    V = unscaled(W0, values)
    return (values["length"] / torch.linalg.vector_norm(V, dim=1).detach()).view(-1, 1) * V
