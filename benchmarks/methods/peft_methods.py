"""PEFT's methods, measured as its users get them, with its defaults: on a bf16 base that means adapters in fp32 and activations cast
to fp32 for them (``autocast_adapter_dtype=True``), for AdaLoRA a regulariser of weight 0.5 and an allocation at every step.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor, nn

from ..cases import Case
from .method import Batch, Method


class _Peft(Method):
    @classmethod
    def available(cls) -> str | None:
        if importlib.util.find_spec("peft") is None:
            return "the package peft is not installed; pip install 'igulora[bench]'"
        return None


class PeftLora(_Peft):
    """PEFT's LoRA on all linear layers."""

    name = "peft-lora"
    title = "PEFT LoRA"

    def __init__(self, model: nn.Module, case: Case) -> None:
        import peft

        config = peft.LoraConfig(
            r=case.rank, lora_alpha=case.rank, target_modules=case.target_modules, task_type="CAUSAL_LM"
        )
        super().__init__(peft.get_peft_model(model, config), case)
        self._optimize([p for p in self.model.parameters() if p.requires_grad])


class PeftAdaLora(_Peft):
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
            task_type="CAUSAL_LM",
        )
        super().__init__(peft.get_peft_model(model, config), case)
        self._optimize([p for p in self.model.parameters() if p.requires_grad])
        self.global_step = 0

    def bare(self, batch: Batch) -> Tensor:
        loss = self.model.base_model.model(**batch).loss
        loss.backward()
        return loss.detach()

    def backward(self, batch: Batch) -> Tensor:
        loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def book(self) -> None:
        self.global_step += 1
        self.model.base_model.update_and_allocate(self.global_step)

    def live(self) -> int | None:
        pattern = self.model.peft_config["default"].rank_pattern
        return sum(sum(kept) for kept in pattern.values()) if pattern else None
