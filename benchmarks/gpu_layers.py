"""Whole adapted layers on a GPU: ours in every form against PyTorch, torch.compile, PEFT, Unsloth and LoRAFusion, and the bare product.

A variant is a function of x with the parameters it trains; all compute the layer ``x W^T + (x Q^T * lambda) P`` of the same W, P, lambda
and Q, and none is timed before its output is that of the float32 computation. Forward, and forward with backward (the gradients of x and
of the variant's own parameters), are timed in turns with the bare frozen layer, so that ratios to it are paired.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernels import candidates, fused_modules
from gpu_machine import Clock, Deadline, Setting, shapes
from torch import Tensor, nn

from igulora import FusedSVDLinear
from igulora.benchmarks.ratios import quartiles
from igulora.kernels.backend import use_backend
from igulora.kernels.tuning import tune

LENGTH = 512  # tokens in a sequence


@dataclass(frozen=True)
class Factors:
    """What all variants of a case share: x (sequences, tokens, in), the frozen weight, and the adapter's float32 factors."""

    x: Tensor
    weight: Tensor
    P: Tensor
    E: Tensor
    Q: Tensor

    @classmethod
    def random(cls, setting: Setting, M: int, K: int, N: int, r: int) -> Factors:
        """Of a layer with K inputs and N outputs, its adapter about as large as its weight."""
        torch.manual_seed(0)
        make = {"device": setting.device}
        length = min(LENGTH, M)
        return cls(
            torch.randn(M // length, length, K, dtype=setting.dtype, **make),
            torch.randn(N, K, dtype=setting.dtype, **make) / K**0.5,
            torch.randn(r, N, **make) / r**0.5,
            torch.rand(r, **make) + 0.5,
            torch.randn(r, K, **make) / K**0.5,
        )

    def exact(self) -> Tensor:
        """The layer's output computed in float32."""
        x = self.x.float()
        return x @ self.weight.float().t() + ((x @ self.Q.t()) * self.E) @ self.P


@dataclass(frozen=True)
class Variant:
    """A layer to time.

    Attributes:
        run: its forward. trained: its parameters. around: what is in force while it runs.
        adapted: whether it has an adapter at all.
    """

    run: Callable[[Tensor], Tensor]
    trained: list[Tensor]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    adapted: bool = True


class Skipped(Exception):
    """A variant that this machine cannot run; the message says why."""


def _leaf(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return t.detach().to(dtype or t.dtype, copy=True).requires_grad_()


def base(f: Factors) -> Variant:
    """The frozen layer alone: its output and the gradient of x, which no adapter can do without."""
    return Variant(lambda x: F.linear(x, f.weight), [], adapted=False)


def _linear(f: Factors) -> nn.Linear:
    linear = nn.Linear(f.weight.shape[1], f.weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(f.weight, requires_grad=False)
    return linear


def ours(f: Factors, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Variant:
    """``FusedSVDLinear`` as it runs after ``igulora tune``, or with a form of the product forced around it."""
    layer = FusedSVDLinear(_linear(f), r=f.E.shape[0])
    with torch.no_grad():
        for name in ("P", "E", "Q"):
            getattr(layer, f"lora_{name}").copy_(getattr(f, name))
    return Variant(layer, [layer.lora_P, layer.lora_E, layer.lora_Q], around)


def eager_lora(f: Factors) -> Variant:
    """Plain LoRA written down in PyTorch, float32 factors cast at use."""
    A, B = _leaf(f.Q), _leaf((f.P * f.E[:, None]).t())
    return Variant(lambda x: F.linear(x, f.weight) + (x @ A.to(x.dtype).t()) @ B.to(x.dtype).t(), [A, B])


def eager_svd(f: Factors) -> Variant:
    """The form of AdaLoRA and IGU-LoRA written down in PyTorch, float32 factors cast at use."""
    P, E, Q, mask = _leaf(f.P), _leaf(f.E), _leaf(f.Q), torch.ones_like(f.E)

    def run(x: Tensor) -> Tensor:
        S = (x @ Q.to(x.dtype).t()) * (mask * E).to(x.dtype)
        return F.linear(x, f.weight) + S @ P.to(x.dtype)

    return Variant(run, [P, E, Q])


def compiled(f: Factors, eager: Callable[[Factors], Variant]) -> Variant:
    """An eager variant under torch.compile, for this very shape."""
    variant = eager(f)
    return Variant(torch.compile(variant.run, fullgraph=True, dynamic=False), variant.trained)


def _peft(f: Factors, config: Any) -> tuple[nn.Module, dict[str, nn.Module]]:
    import peft

    model = peft.get_peft_model(nn.Sequential(_linear(f)), config)
    layer = model.base_model.model[0].to(f.x.device)
    return layer, dict(layer.named_modules())


def _need(package: str) -> None:
    """Raise :class:`Skipped` unless a package can be imported."""
    try:
        __import__(package)
    except Exception as error:  # some packages raise other errors than ImportError where their own needs are not met
        raise Skipped(f"{package} cannot be imported: {type(error).__name__}: {error}") from error


def peft_lora(f: Factors) -> Variant:
    """PEFT's LoRA layer with its defaults: adapters and their inputs in float32."""
    _need("peft")
    import peft

    r = f.E.shape[0]
    layer, _ = _peft(f, peft.LoraConfig(r=r, lora_alpha=r, target_modules=["0"]))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(f.Q)
        B.copy_((f.P * f.E[:, None]).t())
    return Variant(layer, [A, B])


def peft_adalora(f: Factors) -> Variant:
    """PEFT's AdaLoRA layer with its defaults."""
    _need("peft")
    import peft

    r = f.E.shape[0]
    config = peft.AdaLoraConfig(init_r=r, target_r=r, lora_alpha=r, total_step=1000, target_modules=["0"])
    layer, _ = _peft(f, config)
    A, E, B = (getattr(layer, f"lora_{name}")["default"] for name in "AEB")
    factor = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)
    with torch.no_grad():
        A.copy_(f.Q)
        E.copy_((f.E / factor).view_as(E))
        B.copy_(f.P.t())
    return Variant(layer, [A, E, B])


def unsloth(f: Factors) -> Variant:
    """Unsloth's autograd function for one linear layer."""
    _need("unsloth")
    from unsloth.kernels.fast_lora import LoRA_W

    A, B = _leaf(f.Q), _leaf((f.P * f.E[:, None]).t())
    return Variant(lambda x: LoRA_W.apply(x, f.weight, None, A, B, 1.0), [A, B])


def lorafusion(f: Factors) -> Variant:
    """LoRAFusion's autograd function for one linear layer; its factors have the compute dtype."""
    _need("lorafusion")
    from lorafusion.ops.lora_v1 import fused_linear_lora

    A, B = _leaf(f.Q, f.x.dtype), _leaf((f.P * f.E[:, None]).t(), f.x.dtype)
    return Variant(lambda x: fused_linear_lora(x, f.weight, A, B, alpha=1.0), [A, B])


def forms(setting: Setting, f: Factors) -> dict[str, Callable[[Factors], Variant]]:
    """Ours with each form of the base product forced, by the first tiles that tuning would try."""
    use_product = fused_modules()["choice"].use_product
    M, (N, K), r = f.x.numel() // f.x.shape[-1], f.weight.shape, f.E.shape[0]
    first: dict[str, Any] = {}
    for product in candidates(setting, transposed=True, M=M, N=N, K=K, r=r):
        first.setdefault(product.form, product)
    return {f"ours, {form}": partial(ours, around=partial(use_product, product)) for form, product in first.items()}


def tuned(setting: Setting, layers: list[tuple[int, int]], rows: list[int], r: int) -> dict[str, Any]:
    """Measure the forms of layers of (out, in) features, so that ``ours`` runs the fastest from now on; what was measured and chosen."""
    return {str(m.problem): m.entry() for m in tune(layers, rows, r, setting.dtype, setting.device)}


def variants(setting: Setting, f: Factors, *, with_compile: bool) -> dict[str, Callable[[Factors], Variant]]:
    """Builders of all variants of a case by name."""
    found: dict[str, Callable[[Factors], Variant]] = {"base": base, "ours": ours, **forms(setting, f)}
    found["ours, reference"] = partial(ours, around=partial(use_backend, "reference"))
    found |= {"PyTorch LoRA": eager_lora, "PyTorch AdaLoRA form": eager_svd}
    if with_compile:
        found |= {
            "torch.compile LoRA": partial(compiled, eager=eager_lora),
            "torch.compile AdaLoRA form": partial(compiled, eager=eager_svd),
        }
    return found | {"PEFT LoRA": peft_lora, "PEFT AdaLoRA": peft_adalora, "Unsloth": unsloth, "LoRAFusion": lorafusion}


@dataclass
class Case:
    """The variants that run here, and why the others do not."""

    running: dict[str, Variant] = field(default_factory=dict)
    outcome: dict[str, dict[str, Any]] = field(default_factory=dict)

    def build(self, f: Factors, builders: dict[str, Callable[[Factors], Variant]]) -> None:
        """Make each variant and check its output."""
        exact = f.exact()
        bound = 4 * torch.finfo(f.x.dtype).eps * exact.abs().max().item()
        for name, make in builders.items():
            try:
                variant = make(f)
                with variant.around():
                    y = variant.run(f.x)
                error = (y.float() - exact).abs().max().item() if variant.adapted else 0.0
            except Skipped as reason:
                self.outcome[name] = {"skipped": str(reason)}
            except Exception:
                self.outcome[name] = {"error": traceback.format_exc()}
                if f.x.is_cuda:
                    torch.cuda.synchronize()  # a device that is lost raises here, which ends the part
            else:
                if error <= bound:
                    self.running[name] = variant
                    self.outcome[name] = {"largest_error": error / exact.abs().max().item()}
                else:
                    self.outcome[name] = {"error": f"wrong: off by {error:.3g} where {bound:.3g} is allowed"}


def _forward(v: Variant, x: Tensor) -> object:
    with v.around():
        return v.run(x)


def _both(v: Variant, x: Tensor, dy: Tensor) -> object:
    with v.around():
        return torch.autograd.grad(v.run(x), (x, *v.trained), dy)


def measure(
    setting: Setting, clock: Clock, M: int, K: int, N: int, r: int, deadline: Deadline, *, with_compile: bool
) -> dict[str, Any]:
    """All variants of one layer."""
    choices = tuned(setting, [(N, K)], [M], r)
    f = Factors.random(setting, M, K, N, r)
    case = Case()
    case.build(f, variants(setting, f, with_compile=with_compile))
    x = f.x.detach().requires_grad_()
    dy = torch.randn(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    seconds = 0.5 if setting.quick else 1.0
    for key, call in (("forward", partial(_forward, x=x)), ("both", partial(_both, x=x, dy=dy))):
        calls = {name: partial(call, v) for name, v in case.running.items()}
        times, failed = clock.interleaved(calls, seconds=max(min(seconds, deadline.left), 0.1))
        for name, series in times.items():
            entry = case.outcome[name]
            entry[key] = {"ms": quartiles(series)}
            if name != "base" and "base" in times:
                entry[key]["over_base"] = quartiles([a / b for a, b in zip(series, times["base"], strict=True)])
            if key == "both" and not setting.tiny:
                entry[key]["called_ms"] = clock.called(calls[name])
        for name, text in failed.items():
            case.outcome[name]["error"] = text
            case.running.pop(name)
    return {"shape": {"M": M, "in": K, "out": N, "r": r}, "variants": case.outcome, "choices": choices}


def items(setting: Setting) -> Iterator[tuple[str, Callable[[Deadline], dict[str, Any]]]]:
    """One item per layer, rank and number of rows; torch.compile takes long, so that it is for the first rank and not every shape."""
    clock = Clock(setting.device)
    features, rows, ranks = shapes(setting)
    for r in ranks:
        for K, N in features:
            for M in rows:
                few = r == ranks[0] and (features[0][1] == N or rows[0] == M)
                case = partial(measure, setting, clock, M, K, N, r, with_compile=few and not setting.tiny)
                yield f"{K}x{N} M{M} r{r}", lambda deadline, case=case: case(deadline=deadline)
