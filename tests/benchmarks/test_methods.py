"""The suite's plug-ins: what is available where, gradients against float64, and the layer libraries' with stand-ins for their kernels."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from igulora.benchmarks.cases import CASES, MODELS
from igulora.benchmarks.checks import Arithmetic, check_gradients, check_path, check_start
from igulora.benchmarks.methods import METHODS, Adapted, Floor, Igulora, LoraFusion, Method, PeftDora, PeftLora
from igulora.benchmarks.models import load_model, make_batch, small_batch

pytest.importorskip("peft")

CASE = CASES["tiny-4x16"]
CUDA_ONLY = ("peft-liger", "lorafusion", "unsloth")


def _fakes() -> ModuleType:
    path = Path(__file__).with_name("fake_libraries.py")
    spec = importlib.util.spec_from_file_location("fake_libraries", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Counter[str]]:
    """``fake(method)`` puts the stand-in for its library in place; what it returns counts calls."""

    def install(name: str) -> Counter[str]:
        calls: Counter[str] = Counter()
        for path, made in _fakes().LIBRARIES[name](calls).items():
            monkeypatch.setitem(sys.modules, path, made)
        return calls

    return install


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """The tiny model in float32."""
    return load_model(dataclasses.replace(MODELS["tiny"], dtype="float32"))


def _build(name: str, base: nn.Module) -> Method:
    torch.manual_seed(0)
    return METHODS[name](copy.deepcopy(base), CASE)


@pytest.mark.parametrize("name", ["on-path", "default", "floor", "release"])
def test_a_kind_of_step_that_a_method_does_not_have_is_refused(base: nn.Module, name: str) -> None:
    method = _build(name, base)
    small = small_batch(base, CASE)
    method.prepare(small)
    method.seek(next(iter(method.kinds())), small)
    with pytest.raises(ValueError, match=r"expected kind to be one of .*; got 'plain\+mask'"):
        method.seek("plain+mask", small)


# -- gradients and starts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.0625)])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in CUDA_ONLY])
def test_gradients_are_those_of_plain_mathematics(name: str, dtype: torch.dtype, bound: float) -> None:
    assert METHODS[name].available() is None
    worst = check_gradients(name, dtype=dtype)
    assert worst is None if issubclass(METHODS[name], Floor) else 0 < worst < bound


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_gradients_through_a_stand_in_are_those_of_plain_mathematics(name: str, fake: Any) -> None:
    calls = fake(name)
    worst = check_gradients(name)
    assert worst is not None
    assert 0 < worst < 0.06
    assert calls.total() > 0


class _Halved(PeftLora):
    """A method whose backward loses half of the gradient of one factor."""

    name = "halved"

    def __init__(self, model: nn.Module, case: Any) -> None:
        super().__init__(model, case)
        next(self.layers())[1].lora_A["default"].weight.register_hook(lambda grad: grad / 2)


class _Unnamed(PeftDora):
    """A method that forgets to say what its row lengths do."""

    name = "unnamed"

    def adapted(self) -> Iterator[Adapted]:
        return PeftLora.adapted(self)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_Halved, r"expected the gradient of model\.layers\.0\.self_attn\.q_proj\.A by halved .* got 5\.0e-01"),
        (_Unnamed, r"expected unnamed\.adapted\(\) to name each of its 42 trained parameters once, got 28"),
    ],
)
def test_a_wrong_gradient_is_found(kind: type[Method], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, kind.name, kind)
    with pytest.raises(RuntimeError, match=message):
        check_gradients(kind.name)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.0625)])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in CUDA_ONLY])
def test_path_samples_are_those_of_plain_mathematics(name: str, dtype: torch.dtype, bound: float) -> None:
    worst = check_path(name, dtype=dtype)
    assert 0 < worst < bound if name in ("default", "lean", "igu-flex") else worst is None


@pytest.mark.parametrize("path_pass", ["mixed", "separate"])
@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "stratified", "ig_fraction": 1.0},
        {"estimator": "trapezoid", "include_f0": True},
        {"estimator": "gauss", "path": "factors"},
    ],
    ids=lambda options: options["estimator"],
)
def test_path_samples_of_other_estimators(
    options: dict[str, object], path_pass: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type("Other", (Igulora,), {"name": "other", "options": {"path_pass": path_pass, **options}})
    monkeypatch.setitem(METHODS, "other", kind)
    worst = check_path("other")
    assert worst is not None
    assert 0 < worst < 1e-5


class _Misweighed(Igulora):
    """A method whose path rows count a little too much."""

    name = "misweighed"

    def backward(self, batch: Any) -> torch.Tensor:
        loss = super().backward(batch)
        self.controller.bank.path.mul_(1.001)
        return loss


def test_a_wrong_path_sample_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "misweighed", _Misweighed)
    check_gradients("misweighed")
    with pytest.raises(
        RuntimeError, match=r"expected the path accumulator of .*q_proj\.P by misweighed within .* got 1\.0e-03"
    ):
        check_path("misweighed")


def test_a_check_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()

    class Counted(Igulora):
        name = "counted"

        def __init__(self, model: nn.Module, case: Any) -> None:
            made[case.name] += 1
            super().__init__(model, case)

    monkeypatch.setitem(METHODS, "counted", Counted)
    arithmetic = Arithmetic()
    for dtypes in ({torch.float32}, {torch.float32, torch.bfloat16}, {torch.bfloat16}):
        found = arithmetic.errors("counted", dtypes)
        assert set(found["gradient_error"]) == set(found["path_error"]) == {str(d).partition(".")[2] for d in dtypes}
    assert made.total() == 4


@pytest.mark.parametrize("name", [name for name in METHODS if name not in CUDA_ONLY])
def test_what_a_fresh_adapter_does_to_the_outputs(name: str, base: nn.Module) -> None:
    batch = small_batch(base, CASE)
    with torch.no_grad():
        reference = base(input_ids=batch["input_ids"]).logits
    method = _build(name, base)
    change = check_start(name, method, reference, batch)
    assert (change > 1e-6) == (name in ("release", "release-final"))
    if issubclass(METHODS[name], Floor):
        return
    with torch.no_grad():
        for parameter in method.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    if method.starts_as_base:
        with pytest.raises(RuntimeError, match=f"expected {name} to leave the outputs"):
            check_start(name, method, reference, batch)


def test_adapters_that_do_nothing_are_found(base: nn.Module) -> None:
    batch = small_batch(base, CASE)
    with torch.no_grad():
        reference = base(input_ids=batch["input_ids"]).logits
    method = _build("release", base)
    with torch.no_grad():
        for layer in method._layers:
            layer.lora_E.zero_()
    with pytest.raises(RuntimeError, match="expected the fresh adapters of release to change the outputs"):
        check_start("release", method, reference, batch)


# -- where they run -----------------------------------------------------------------------------------------------------


def test_a_method_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[bench]'" in str(METHODS["peft-dora"].available())
    assert METHODS["release"].available() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, package in zip(CUDA_ONLY, ("liger", "lorafusion", "unsloth"), strict=True):
        why = METHODS[name].available()
        assert why is not None
        assert "is not installed; pip install" in why
        assert package in why


def test_layer_libraries_need_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all("needs a CUDA device" in str(METHODS[name].available()) for name in CUDA_ONLY)


# -- the plug-ins of layer libraries ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("peft-liger", {"rope": 2, "norm": 5, "mlp": 2, "loss": 1}),
        ("lorafusion", {"linear": 14}),
        ("unsloth", {"qkv": 2, "o": 2, "mlp": 2}),
    ],
)
def test_a_step_runs_through_the_library(name: str, expected: dict[str, int], fake: Any, base: nn.Module) -> None:
    calls = fake(name)
    method = _build(name, base)
    batch = make_batch(base, 4, 16)
    calls.clear()
    method.step(batch)
    assert calls == expected
    plain = _build("peft-lora", base)
    calls.clear()
    plain.step(batch)
    assert not calls, "other methods of the process do without it"


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_losses_are_peft_lora_s(name: str, fake: Any, base: nn.Module) -> None:
    fake(name)
    method, plain = _build(name, base), _build("peft-lora", base)
    for seed in range(3):
        batch = make_batch(base, 4, 16, seed)
        torch.testing.assert_close(method.step(batch), plain.step(batch), rtol=1e-5, atol=1e-6)


def test_liger_s_patches_of_transformers_are_taken_back(fake: Any, base: nn.Module) -> None:
    from transformers.models.llama import modeling_llama

    fake("peft-liger")
    before = dict(vars(modeling_llama))
    method = _build("peft-liger", base)
    assert sorted(method.patches) == ["LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"]
    assert dict(vars(modeling_llama)) == before
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        method.bare({})
    method.logits(make_batch(base, 2, 8))
    assert dict(vars(modeling_llama)) == before


def test_lorafusion_s_factors_have_the_model_s_dtype(fake: Any) -> None:
    fake("lorafusion")
    method = _build("lorafusion", load_model(MODELS["tiny"]))
    assert {p.dtype for p in method.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert not isinstance(_build("peft-lora", load_model(MODELS["tiny"])), LoraFusion)


@pytest.mark.parametrize("name", ["peft-liger", "unsloth"])
def test_other_models_than_llamas_are_refused(name: str, fake: Any, base: nn.Module) -> None:
    fake(name)
    other = copy.deepcopy(base)
    other.config.model_type = "gpt2"
    with pytest.raises(ValueError, match=r"expected a Llama .* got a model of type 'gpt2'"):
        METHODS[name](other, CASE)


def test_unsloth_refuses_what_its_functions_would_drop(fake: Any, base: nn.Module) -> None:
    fake("unsloth")
    biased = copy.deepcopy(base)
    layer = biased.model.layers[0].mlp.up_proj
    layer.bias = nn.Parameter(torch.zeros(layer.out_features), requires_grad=False)
    with pytest.raises(ValueError, match=r"expected linear layers without bias, got one in .*up_proj"):
        METHODS["unsloth"](biased, CASE)
    activation = copy.deepcopy(base)
    activation.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match=r"expected the activation 'silu' .* got 'gelu'"):
        METHODS["unsloth"](activation, CASE)


def test_floor_has_nothing_adapted(base: nn.Module) -> None:
    assert list(Floor(copy.deepcopy(base), CASE).adapted()) == []
