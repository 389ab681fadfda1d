"""Stand-ins for libraries that need a GPU: modules with their published interfaces, computing the same in plain PyTorch on any device.

The plug-ins are exercised with them; what the real kernels compute is checked where they run (``igulora.benchmarks.checks``).
"""

from __future__ import annotations

import importlib.machinery
from collections import Counter
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def module(name: str, **contents: Any) -> ModuleType:
    """A module that ``import`` accepts."""
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(contents)
    return made


def liger(calls: Counter[str]) -> dict[str, ModuleType]:
    """``liger_kernel.transformers.apply_liger_kernel_to_llama``: patches transformers' module for all and the given model for itself."""

    def apply_liger_kernel_to_llama(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model: nn.Module | None = None,
    ) -> None:
        from transformers.models.llama import modeling_llama

        assert rope
        assert rms_norm
        assert swiglu
        assert fused_linear_cross_entropy
        assert not cross_entropy
        assert model is not None
        plain_rope, plain_forward = modeling_llama.apply_rotary_pos_emb, model.forward

        def liger_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
            calls["rope"] += 1
            return plain_rope(*args, **kwargs)

        class LigerRMSNorm(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                calls["norm"] += 1
                return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

        class LigerSwiGLUMLP(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                calls["mlp"] += 1
                return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

        def lce_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls["loss"] += 1
            return plain_forward(*args, **kwargs)

        modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb
        modeling_llama.LlamaRMSNorm = LigerRMSNorm
        modeling_llama.LlamaMLP = LigerSwiGLUMLP
        model.forward = MethodType(lce_forward, model)
        body = model.model
        norms = [body.norm, *(n for b in body.layers for n in (b.input_layernorm, b.post_attention_layernorm))]
        for norm in norms:
            norm.forward = MethodType(LigerRMSNorm.forward, norm)
        for block in body.layers:
            block.mlp.forward = MethodType(LigerSwiGLUMLP.forward, block.mlp)

    inner = module("liger_kernel.transformers", apply_liger_kernel_to_llama=apply_liger_kernel_to_llama)
    return {"liger_kernel": module("liger_kernel", transformers=inner), inner.__name__: inner}


def lorafusion(calls: Counter[str]) -> dict[str, ModuleType]:
    """``lorafusion.ops.lora_v1.fused_linear_lora``; it takes three-dimensional inputs, and factors of the input's dtype."""

    def fused_linear_lora(
        x: Tensor,
        linear_w: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        alpha: float,
        seed: int | None = None,
        dropout_p: float = 0.0,
        linear_bias: Tensor | None = None,
    ) -> Tensor:
        assert x.ndim == 3
        assert x.dtype == lora_a.dtype == lora_b.dtype
        assert dropout_p == 0.0
        calls["linear"] += 1
        return F.linear(x, linear_w, linear_bias) + (x @ lora_a.T) @ lora_b.T * alpha

    inner = module("lorafusion.ops.lora_v1", fused_linear_lora=fused_linear_lora)
    ops = module("lorafusion.ops", lora_v1=inner)
    return {"lorafusion": module("lorafusion", ops=ops), ops.__name__: ops, inner.__name__: inner}


def _lora(layer: nn.Module, x: Tensor) -> Tensor:
    """What Unsloth reads off a PEFT layer, and its product."""
    adapter = layer.active_adapters[0]
    A, B, scale = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    return F.linear(x, layer.base_layer.weight) + (x @ A.T.to(x.dtype)) @ B.T.to(x.dtype) * scale


def unsloth(calls: Counter[str]) -> dict[str, ModuleType]:
    """``unsloth.kernels.fast_lora``: functions that stand for methods of transformers' attention and MLP."""

    def apply_lora_qkv(self: nn.Module, X: Tensor, inplace: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        calls["qkv"] += 1
        return _lora(self.q_proj, X), _lora(self.k_proj, X), _lora(self.v_proj, X)

    def apply_lora_o(self: nn.Module, X: Tensor) -> Tensor:
        calls["o"] += 1
        return _lora(self.o_proj, X)

    def apply_lora_mlp_swiglu(self: nn.Module, X: Tensor, inplace: bool = True) -> Tensor:
        calls["mlp"] += 1
        return _lora(self.down_proj, F.silu(_lora(self.gate_proj, X)) * _lora(self.up_proj, X))

    functions = SimpleNamespace(
        apply_lora_qkv=apply_lora_qkv, apply_lora_o=apply_lora_o, apply_lora_mlp_swiglu=apply_lora_mlp_swiglu
    )
    inner = module("unsloth.kernels.fast_lora", **vars(functions))
    kernels = module("unsloth.kernels", fast_lora=inner)
    return {"unsloth": module("unsloth", kernels=kernels), kernels.__name__: kernels, inner.__name__: inner}


LIBRARIES = {"peft-liger": liger, "lorafusion": lorafusion, "unsloth": unsloth}
