"""One small model for every kind of base layer, and the same computation written with dense weights for autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, embedding, linear

import igulora
from igulora.adapt import _replace
from igulora.layers import AdaptedLayer, FusedSVDConv2d, FusedSVDEmbedding

IN, OUT = 64, 48  # blocks of 32 and 64 numbers; 48 rows, which bitsandbytes cannot pack for AVX512


class Stack(nn.Module):
    """An adapted linear layer below the one in question, so that gradients have to come through it, and a plain head above."""

    def __init__(self, base: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(8, IN, dtype=dtype)
        self.base = base
        self.head = nn.Linear(OUT, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(torch.tanh(self.first(x)))))


class Lookup(nn.Module):
    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base
        self.head = nn.Linear(base.embedding_dim, 3, dtype=base.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(ids)))


class Pictures(nn.Module):
    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, base.in_channels, 1, dtype=base.weight.dtype)
        self.base = base
        self.head = nn.Linear(base.out_channels, 3, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(torch.tanh(self.first(x)))).mean((2, 3)))


class Case(NamedTuple):
    """A kind of base layer.

    Attributes:
        build: the model, the same at every call. inputs: for a seed and a number of rows. targets: names of what is adapted.
        tolerance: of gradients against autograd, relative to their norm. pickles, merges: whether the base can.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Tensor]
    targets: list[str]
    tolerance: float = 1e-10
    pickles: bool = True
    merges: bool = True
    quantised: bool = False


def dense_layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(IN, OUT, dtype=dtype)


def _conv1d() -> nn.Module:
    layer = pytest.importorskip("transformers").pytorch_utils.Conv1D(OUT, IN).double()
    layer.load_state_dict({"weight": dense_layer(torch.float64).weight.t(), "bias": torch.linspace(-1, 1, OUT)})
    return layer


def bnb4(quant_type: str = "nf4", double: bool = False, source: nn.Linear | None = None) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    source = dense_layer() if source is None else source
    layer = bnb.nn.Linear4bit(
        source.in_features, source.out_features, quant_type=quant_type, compress_statistics=double
    )
    layer.load_state_dict(source.state_dict())
    return layer.to("cpu")


def bnb8(threshold: float = 0.0) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(dense_layer().state_dict())
    return layer.to("cpu")


def torchao(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup, PerTensor

    configs = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int8-whole": lambda: quantization.Int8WeightOnlyConfig(granularity=PerTensor()),
        "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    }
    layer = dense_layer(dtype)
    quantization.quantize_(layer, configs[kind]())
    return layer


def gguf(kind: str, permuted: bool = False) -> nn.Module:
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType
    from transformers.integrations.gguf.utils import GgufLinear

    source, number = dense_layer(), GGMLQuantizationType[kind]
    layer = GgufLinear(IN, OUT, int(number), bias=True)
    layer.weight.data = torch.from_numpy(quants.quantize(source.weight.detach().numpy(), number).copy())
    layer.bias.data = source.bias.detach().clone()
    if permuted:
        layer.input_permutation = torch.randperm(IN, generator=torch.Generator().manual_seed(1))
    return layer


def _vectors(dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    return lambda seed, rows: torch.randn(
        (rows, 5, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def _ids(seed: int, rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, 5), generator=torch.Generator().manual_seed(seed))


def _pictures(seed: int, rows: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn((rows, 2, 7, 6), generator=g, dtype=torch.float64)


def _stack(layer: Callable[[], nn.Module], dtype: torch.dtype, **options: Any) -> Case:
    def build() -> nn.Module:
        base = layer()
        torch.manual_seed(5)
        return Stack(base, dtype)

    return Case(build, _vectors(dtype), ["first", "base"], **options)


def _other(model: type[nn.Module], layer: Callable[[], nn.Module], inputs: Any, targets: list[str]) -> Case:
    def build() -> nn.Module:
        torch.manual_seed(5)
        return model(layer())

    return Case(build, inputs, targets)


_PACKED: dict[str, Any] = {"tolerance": 2e-5, "quantised": True}
_F64 = torch.float64
CASES = {
    "conv1d": _stack(_conv1d, _F64),
    "nf4": _stack(bnb4, torch.float32, **_PACKED),
    "fp4-double": _stack(lambda: bnb4("fp4", double=True), torch.float32, **_PACKED),
    "llm.int8": _stack(bnb8, torch.float32, **_PACKED),
    "torchao-int8": _stack(lambda: torchao("int8"), torch.float32, pickles=False, **_PACKED),
    "torchao-int4": _stack(lambda: torchao("int4"), torch.float32, pickles=False, **_PACKED),
    "gguf-q8_0": _stack(lambda: gguf("Q8_0"), torch.float32, merges=False, **_PACKED),
    "gguf-q4_0": _stack(lambda: gguf("Q4_0", permuted=True), torch.float32, merges=False, **_PACKED),
    "embedding": _other(Lookup, lambda: nn.Embedding(11, 6, padding_idx=2, dtype=_F64), _ids, ["base"]),
    "conv2d": _other(Pictures, lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), 1, dtype=_F64), _pictures, ["first", "base"]),
    "conv2d-same": _other(
        Pictures,
        lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2), padding_mode="reflect", dtype=_F64),
        _pictures,
        ["first", "base"],
    ),
}


def shaken(model: nn.Module, seed: int = 1, size: float = 1.0) -> nn.Module:
    """Lambdas away from 0, as after some training."""
    bank = igulora.find_bank(model)
    with torch.no_grad():
        bank.lambdas.copy_(torch.randn(bank.triplets, generator=torch.Generator().manual_seed(seed)) * size)
    return model


def adapted(case: Case, **options: Any) -> nn.Module:
    config = {
        "r": 4,
        "target_rank": 2,
        "total_steps": 100,
        "window": 4,
        "init": "orthonormal",
        "target_modules": case.targets,
        **options,
    }
    return shaken(igulora.adapt(case.build(), igulora.IGUConfig(**config)))


class Dense(nn.Module):
    """What an adapted layer computes, with one dense weight, for autograd."""

    def __init__(self, layer: AdaptedLayer) -> None:
        super().__init__()
        self.W = layer.base.dense().detach().clone()
        self.bias = None if layer.bias is None else layer.bias.detach().clone()
        self.lora_P, self.lora_E, self.lora_Q = (
            nn.Parameter(t.detach().clone()) for t in (layer.lora_P, layer.lora_E, layer.lora_Q)
        )
        self.scale, self.layer = layer.scale, [layer]

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.layer
        W = self.W + (self.lora_P.t() * (self.scale * self.lora_E)) @ self.lora_Q
        if isinstance(layer, FusedSVDEmbedding):
            return embedding(x, W.t(), padding_idx=layer.padding_idx) * layer.factor
        if isinstance(layer, FusedSVDConv2d):
            base = layer.base_layer
            plain = nn.Conv2d(
                base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding, base.dilation,
                padding_mode=base.padding_mode,
            )  # fmt: skip
            return plain._conv_forward(x, W.view(base.weight.shape), self.bias)
        return linear(x, W, self.bias)


def densified(model: nn.Module) -> nn.Module:
    """A copy of an adapted model in which every adapted layer is a dense one that autograd knows all of."""
    twin = copy.deepcopy(model)
    _replace(twin, {id(layer): Dense(layer) for layer in igulora.find_bank(twin).layers})
    return twin


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Relative to the norm."""
    wanted = wanted.detach()
    assert wanted.norm() > 0
    error = float((got.detach() - wanted).norm() / wanted.norm())
    assert error <= tolerance, error


__all__ = [
    "CASES",
    "Case",
    "adapted",
    "assert_near",
    "bnb4",
    "bnb8",
    "conv2d",
    "densified",
    "gguf",
    "shaken",
    "torchao",
]
