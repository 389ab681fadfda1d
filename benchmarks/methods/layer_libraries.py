"""Libraries that make plain LoRA faster, each in whole training steps: their kernels in PEFT's LoRA, the way they do it themselves.

None of them adapts ranks; they show how far a LoRA step can be brought down. All need CUDA, and their single layers are
compared in ``gpu_layers.py``.

- Liger has no LoRA operator: norms, rotary embedding, SwiGLU and the loss are its own, the adapters PEFT's.
- LoRAFusion's own patch replaces the forward of PEFT's LoRA layers by ``fused_linear_lora``, and so does this; adapters
  have the model's dtype, as they must there.
- Unsloth: its LoRA functions for q/k/v, o and the MLP. Its model class would bring its attention, norms, rotary
  embedding and loss as well; they are not here, so this is not a step of Unsloth's own trainer. Importing Unsloth
  changes transformers and PEFT for the whole process: give it a run of its own, and compare it with that run's floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cases import Case
from .method import Batch, missing
from .peft_methods import ADAPTER, PeftLora


def _needs(package: str, install: str) -> str | None:
    if not torch.cuda.is_available():
        return f"{package} needs a CUDA device, and there is none here"
    return missing(package, install)


def _check_llama(model: nn.Module, library: str) -> None:
    kind = model.config.model_type
    if kind != "llama":
        raise ValueError(
            f"expected a Llama for {library}'s plug-in, got a model of type {kind!r}; leave the method out"
        )


class PeftLiger(PeftLora):
    """PEFT's LoRA in a Llama patched by Liger-Kernel, all of its patches on.

    Liger writes some of them into transformers' module of the model, where every Llama of the process would run them. They are taken out
    again and put back for this method's own forwards only.
    """

    name = "peft-liger"
    title = "PEFT LoRA, model patched by Liger-Kernel"
    check_dtype = torch.bfloat16

    @classmethod
    def available(cls) -> str | None:
        return _needs("liger_kernel", "pip install liger-kernel") or super().available()

    def __init__(self, model: nn.Module, case: Case) -> None:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        from transformers.models.llama import modeling_llama

        _check_llama(model, "Liger")
        self._module = modeling_llama
        before = dict(vars(modeling_llama))
        try:
            apply_liger_kernel_to_llama(model=model)
            after = dict(vars(modeling_llama))
        finally:
            vars(modeling_llama).update(before)
        self.patches = {name: value for name, value in after.items() if before.get(name) is not value}
        super().__init__(model, case)

    @contextmanager
    def _patched(self) -> Iterator[None]:
        before = {name: getattr(self._module, name) for name in self.patches}
        vars(self._module).update(self.patches)
        try:
            yield
        finally:
            vars(self._module).update(before)

    def bare(self, batch: Batch) -> Tensor:
        with self._patched():
            return super().bare(batch)

    def logits(self, batch: Batch) -> Tensor:
        with self._patched():
            return super().logits(batch)


class LoraFusion(PeftLora):
    """PEFT's LoRA layers with LoRAFusion's fused forward and backward."""

    name = "lorafusion"
    title = "LoRAFusion in PEFT's LoRA layers"
    check_dtype = torch.bfloat16
    autocast = False

    @classmethod
    def available(cls) -> str | None:
        return _needs("lorafusion", "pip install git+https://github.com/CentML/lorafusion") or super().available()

    def __init__(self, model: nn.Module, case: Case) -> None:
        from lorafusion.ops.lora_v1 import fused_linear_lora

        super().__init__(model, case)
        for _, layer in self.layers():
            layer.forward = partial(_fused_forward, layer, fused_linear_lora)


def _fused_forward(layer: nn.Module, fused: Any, x: Tensor) -> Tensor:
    base = layer.base_layer
    A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return fused(x=x, linear_w=base.weight, lora_a=A, lora_b=B, alpha=layer.scaling[ADAPTER], linear_bias=base.bias)


class PeftUnsloth(PeftLora):
    """PEFT's LoRA computed by Unsloth's functions, q/k/v and gate/up/down grouped."""

    name = "unsloth"
    title = "Unsloth's LoRA functions in PEFT's LoRA"
    check_dtype = torch.bfloat16

    @classmethod
    def available(cls) -> str | None:
        return _needs("unsloth", "pip install unsloth, in an environment of its own") or super().available()

    def __init__(self, model: nn.Module, case: Case) -> None:
        from unsloth.kernels.fast_lora import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv

        _check_llama(model, "Unsloth")
        activation = model.config.hidden_act
        if activation != "silu":
            raise ValueError(
                f"expected the activation 'silu' for Unsloth's MLP, got {activation!r}; leave the method out"
            )
        super().__init__(model, case)
        for name, layer in self.layers():
            if layer.base_layer.bias is not None:
                raise ValueError(
                    f"expected linear layers without bias, got one in {name}: Unsloth's functions would drop it; leave the method out"
                )
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            mlp.forward = partial(apply_lora_mlp_swiglu, mlp)
            attention.o_proj.forward = partial(apply_lora_o, attention)
            _group_qkv(attention, apply_lora_qkv)


def _group_qkv(attention: nn.Module, apply: Any) -> None:
    """Compute q, k and v when q is asked for. transformers' attention asks for k and v right after, of the same input."""
    waiting: dict[str, tuple[Tensor, Tensor]] = {}

    def query(x: Tensor) -> Tensor:
        q, k, v = apply(attention, x)
        waiting.update(k=(x, k), v=(x, v))
        return q

    def take(x: Tensor, part: str) -> Tensor:
        asked, result = waiting.pop(part)
        assert asked is x, "q, k and v of one attention have one input"
        return result

    attention.q_proj.forward = query
    attention.k_proj.forward = partial(take, part="k")
    attention.v_proj.forward = partial(take, part="v")
