"""Convolutions, embeddings and quantised layers under PEFT's method: one adapter's triplets, several adapters, merging, files."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import igulora

peft = pytest.importorskip("peft")
from igulora.peft import IGULoraConfig, IGULoraConv2d, IGULoraEmbedding, IGULoraLinear  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning"),
]
IN, OUT = 64, 48


class Words(nn.Module):
    """Ids (batch, length) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=2)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)).mean(1))


class Pictures(nn.Module):
    """(batch, 2, 7, 6) -> (batch, 3), by a strided, a dilated and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, (3, 2), (2, 1), 1)
        self.second = nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2), padding_mode="reflect")
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean((2, 3)))


def words() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (6, 5))
    ids[:, 0] = 2
    return Words(), ids


def pictures() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Pictures(), torch.randn(6, 2, 7, 6)


class Stack(nn.Module):
    """An adapted linear layer below the quantised one, so that gradients have to come through it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.first, self.base, self.head = nn.Linear(8, IN), base, nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(torch.tanh(self.first(x)))))


def bnb(kind: str) -> nn.Module:
    modules = pytest.importorskip("bitsandbytes").nn
    plain = nn.Linear(IN, OUT)
    if kind == "8-bit":
        layer = modules.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    else:
        layer = modules.Linear4bit(IN, OUT, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def torchao(kind: str) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(IN, OUT)
    configs = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "int8 activations": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    }
    quantization.quantize_(layer, configs[kind]())
    return layer


QUANTISED: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes-4-bit": lambda: bnb("4-bit"),
    "bitsandbytes-8-bit": lambda: bnb("8-bit"),
    "torchao-int8": lambda: torchao("int8"),
    "torchao-int4": lambda: torchao("int4"),
    "torchao-int8-activations": lambda: torchao("int8 activations"),
}
Made = tuple[Callable[[], tuple[nn.Module, Tensor]], list[str]]
KINDS: dict[str, Made] = {"embedding": (words, ["table", "head"]), "convolution": (pictures, ["first", "second"])}


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Made:
    return KINDS[request.param]


@pytest.fixture(params=QUANTISED)
def stack(request: pytest.FixtureRequest) -> Callable[[], tuple[nn.Module, Tensor]]:
    def make() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = Stack(QUANTISED[request.param]())
        return model, torch.randn(6, 5, 8)

    make()  # skips where the package is not installed
    return make


def config(targets: list[str], **changes: Any) -> IGULoraConfig:
    values: dict[str, Any] = {
        "r": 4, "target_rank": 2, "total_steps": 20, "t_init": 7, "t_final": 5, "delta_t": 2, "window": 2, "ig_every": 1, "seed": 3,
        "init": "orthonormal", "target_modules": targets,
    }  # fmt: skip
    return IGULoraConfig(**{**values, **changes})


def shaken(model: nn.Module, name: str = "default", size: float = 1.0) -> nn.Module:
    """An adapter with effect."""
    bank = model.base_model.banks[name]
    with torch.no_grad():
        bank.lambdas.copy_(torch.linspace(-size, size, bank.triplets))
    return model


def two(made: Made) -> tuple[nn.Module, Tensor]:
    """Adapters "default" (active) and "b" of another rank and other layers."""
    make, targets = made
    model, x = make()
    model = peft.get_peft_model(model, config(targets))
    model.add_adapter("b", config(targets[:1], r=3, seed=4))
    return shaken(shaken(model), "b"), x


def loss_of(model: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    return lambda batch: (model(batch[0]) - batch[1].unsqueeze(-1)).square().mean()


def batch_of(x: Tensor) -> tuple[Tensor, Tensor]:
    target = torch.linspace(-1, 1, len(x))
    return x, target if x.ndim < 3 or x.ndim == 4 else target[:, None].expand(x.shape[:2])


def run(model: nn.Module, x: Tensor, steps: int = 20) -> igulora.Controller:
    opt = torch.optim.AdamW(igulora.param_groups(model, lr=3e-3))
    ctl = igulora.Controller(model)
    for _ in range(steps):
        ctl.backward(loss_of(model), batch_of(x))
        opt.step()
        ctl.step()
        opt.zero_grad()
    return ctl


def inner(model: nn.Module) -> nn.Module:
    return model.base_model.model


def numbers(t: Tensor) -> Tensor:
    return t.dequantize() if type(t).__module__.startswith("torchao") else t.detach()


def test_the_method_trains_what_adapt_trains(made: Made) -> None:
    make, targets = made
    (plain, x), (base, _) = make(), make()
    ours = igulora.adapt(plain, igulora.IGUConfig(
        r=4, target_rank=2, total_steps=20, t_init=7, t_final=5, delta_t=2, window=2, ig_every=1, seed=3, init="orthonormal",
        target_modules=targets,
    ))  # fmt: skip
    theirs = peft.get_peft_model(base, config(targets))
    assert torch.equal(theirs(x), make()[0](x))
    mine, their = run(ours, x), run(theirs, x)
    assert mine.history == their.history
    assert torch.equal(mine.bank.weight, their.bank.weight)
    assert torch.equal(ours(x), theirs(x))


def test_layers_are_of_their_kind() -> None:
    (model, _), (images, _) = two(KINDS["embedding"]), two(KINDS["convolution"])
    assert type(inner(model).table) is IGULoraEmbedding
    assert type(inner(model).head) is IGULoraLinear
    assert type(inner(images).first) is IGULoraConv2d
    assert [s.module_type for s in images.get_layer_status()] == ["igulora.IGULoraConv2d"] * 2


@pytest.mark.parametrize("estimator", ["gauss", "trapezoid"])
def test_a_mixed_batch_equals_separate_passes(made: Made, estimator: str) -> None:
    make, targets = made
    found = {}
    for how in ("mixed", "separate"):
        model, x = make()
        model = shaken(peft.get_peft_model(model, config(targets, path_pass=how, estimator=estimator, ig_fraction=0.5)))
        ctl = igulora.Controller(model)
        ctl.backward(loss_of(model), batch_of(x))
        found[how] = ctl.bank.grad.clone(), ctl.bank.path.clone()
        assert ctl.bank.path.any()
    for mixed, separate in zip(found["mixed"], found["separate"], strict=True):
        torch.testing.assert_close(mixed, separate, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_keeps_the_outputs_and_unmerging_the_weights(made: Made, safe: bool) -> None:
    model, x = two(made)
    model.base_model.set_adapter(["default", "b"])
    y, first = model(x), getattr(inner(model), made[1][0])
    weight = first.base_layer.weight.clone()
    delta = first.get_delta_weight("default") + first.get_delta_weight("b")
    assert delta.shape == weight.shape
    model.merge_adapter(safe_merge=safe)
    assert first.merged_adapters == ["default", "b"]
    torch.testing.assert_close(first.base_layer.weight, weight + delta)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert set(igulora.merge_errors(model).values()) == {0.0}
    model.unmerge_adapter()
    torch.testing.assert_close(first.base_layer.weight, weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    model.merge_adapter(["b"])  # one after the other, then both out
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), made[0]()[0](x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected a merged model"):
        igulora.merge_errors(model)


def test_adapters_are_switched_disabled_deleted_and_merged_away(made: Made) -> None:
    model, x = two(made)
    base, default = made[0]()[0](x), model(x)
    model.set_adapter("b")
    second = model(x)
    assert not torch.allclose(second, default)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.delete_adapter("default")
    torch.testing.assert_close(model(x), second)
    plain = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(plain(x), second, rtol=1e-4, atol=1e-5)
    assert {type(m).__module__.split(".")[0] for m in plain.modules() if not list(m.children())} == {"torch"}
    assert torch.equal(model.unload()(x), base)


def test_rows_of_a_batch_go_through_adapters_of_their_own(made: Made) -> None:
    model, x = two(made)
    model.eval()
    single = {"__base__": made[0]()[0](x)}
    for name in ("default", "b"):
        model.set_adapter(name)
        single[name] = model(x)
    names = ["b", "__base__", "default", "b", "default", "__base__"]
    rows = model(x, adapter_names=names)
    for i, name in enumerate(names):
        torch.testing.assert_close(rows[i], single[name][i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", [False, True])
def test_saved_loaded_and_exported(made: Made, low: bool, tmp_path: Path) -> None:
    make, targets = made
    model, x = make()
    model = peft.get_peft_model(model, config(targets))
    ctl = run(model, x)
    igulora.compact(model, None, ctl)
    y = model(x)
    model.save_pretrained(tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(make()[0], tmp_path / "peft", low_cpu_mem_usage=low)
    torch.testing.assert_close(loaded(x), y)
    assert igulora.find_bank(loaded).ranks() == ctl.live_ranks()
    loaded.load_adapter(tmp_path / "peft", "again", low_cpu_mem_usage=low)
    loaded.set_adapter("again")
    torch.testing.assert_close(loaded(x), y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        igulora.export_peft(model, tmp_path / "lora")
    # PEFT's LoRA has no dilation: the layer that has one is right after merging.
    dilated = ["second"] if "second" in targets else []
    assert [str(w.message).partition("exported of ")[2].split()[0] for w in caught] == dilated
    igulora.save_adapter(model, tmp_path / "own")
    torch.testing.assert_close(igulora.load_adapter(make()[0], tmp_path / "own")(x), y)
    igulora.export_peft(tmp_path / "own", tmp_path / "from own")
    for folder in ("lora", "from own"):
        plain = peft.PeftModel.from_pretrained(make()[0], tmp_path / folder).merge_and_unload()
        torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_stay_whole(made: Made) -> None:
    model, x = two(made)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        run(twin, x, steps=1)
        assert not torch.equal(twin(x), y)
        assert torch.equal(model(x), y)


def test_the_table_of_a_causal_model(
    llama: Any, options: Any, batch: Any, train: Any, say: Any, tmp_path: Path
) -> None:
    targets = {"target_modules": ["embed_tokens", "q_proj"]}
    model = peft.get_peft_model(llama(), options(**targets))
    train(model, batch)
    y = say(model, batch)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(say(loaded, batch), y, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(say(model.merge_and_unload(), batch), y, rtol=1e-4, atol=1e-5)


def test_a_tied_table_is_adapted_but_not_merged(llama: Any, options: Any, batch: Any, say: Any) -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = peft.get_peft_model(
            llama(tie_word_embeddings=True), options(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
        )
    y = say(model, batch)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"weights of one layer each, got 'model.embed_tokens'"):
            merge()
        assert torch.equal(say(model, batch), y)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.merge_adapter()
    torch.testing.assert_close(say(model, batch), y, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_adapted_is_named_with_the_reason() -> None:
    refused = {
        "its 2 groups make W": nn.Conv2d(4, 4, 3, groups=2),
        "its max_norm rewrites": nn.Embedding(4, 4, max_norm=1.0),
        r"its gradient is of another form \(sparse=True\)": nn.Embedding(4, 4, sparse=True),
    }
    for reason, layer in refused.items():
        with pytest.raises(ValueError, match=rf"layers that can be adapted, got 'layer' \(nn.*{reason}"):
            peft.get_peft_model(nn.ModuleDict({"layer": layer}), config(["layer"]))
    with pytest.raises(ValueError, match=r"embeddings and convolutions only, got 'layer' \(Conv1d\)"):
        peft.get_peft_model(nn.ModuleDict({"layer": nn.Conv1d(4, 4, 3)}), config(["layer"]))


def test_gradients_come_through_a_quantised_layer_and_train(stack: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, x = stack()
    before = {n: numbers(p).clone() for n, p in model.named_parameters()}
    model = peft.get_peft_model(model, config(["first", "base"]))
    start = float(loss_of(model)(batch_of(x)).detach())
    assert torch.equal(model(x), stack()[0](x))
    ctl = run(model, x)
    assert sum(ctl.live_ranks().values()) == 4
    assert float(loss_of(model)(batch_of(x)).detach()) < start
    after = {n.replace("base_layer.", ""): numbers(p) for n, p in inner(model).named_parameters() if "igu_" not in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_gradients_come_through_a_quantised_layer_whose_adapter_is_not_active(
    stack: Callable[[], tuple[nn.Module, Tensor]],
) -> None:
    model, x = stack()
    model = peft.get_peft_model(model, config(["first"], method="lora", init="lora"))
    model.add_adapter("b", config(["base"], method="lora", init="lora"))
    model(x).square().sum().backward()
    # The base of the stack without an adapter of its own computes with its dense weight.
    base = inner(model).base
    hidden = torch.tanh(inner(model).first(x)).detach().requires_grad_()
    dy = torch.autograd.grad(base(hidden).square().sum(), hidden)[0]
    wanted = (2 * base(hidden).detach()) @ base.base.dense().float()
    torch.testing.assert_close(dy, wanted, rtol=1e-3, atol=1e-3)
    assert inner(model).first.igu_adapters["default"].lora_P.grad.any()


def test_peft_959_merging_into_quantised_layers_tells_the_loss_and_unmerging_restores_every_byte(
    stack: Callable[[], tuple[nn.Module, Tensor]],
) -> None:
    model, x = stack()
    model = peft.get_peft_model(model, config(["first", "base"]))
    model.add_adapter("b", config(["base"], r=3, seed=4))
    shaken(shaken(model), "b").eval()
    layer = inner(model).base
    model.base_model.set_adapter(["default", "b"])
    y, plain = model(x).detach(), stack()[0].eval()(x).detach()
    before, dense = numbers(layer.base_layer.weight).clone(), layer.base.dense().float().clone()
    kind = type(layer.base_layer.weight)
    updates = {name: layer.get_delta_weight(name).detach() for name in ("default", "b")}

    def check(names: list[str]) -> float:
        total = sum(updates[name] for name in names)
        missed = float((layer.base.dense().float() - dense - total).norm() / total.norm())
        assert igulora.merge_errors(model)["base"] == pytest.approx(missed, rel=1e-3)
        assert layer.merged_adapters == names
        assert type(layer.base_layer.weight) is kind
        return missed

    with pytest.warns(igulora.MergeWarning, match=r"quantised 1 weights anew, .*\(base, "):
        model.merge_adapter(safe_merge=True)
    at_once = check(["default", "b"])
    assert at_once < 0.5
    assert igulora.merge_errors(model)["first"] == 0.0
    merged, stored = model(x).detach(), numbers(layer.base_layer.weight).clone()
    assert (merged - plain).norm() > 2 * (merged - y).norm()  # the update survived
    model.unmerge_adapter()
    assert torch.equal(numbers(layer.base_layer.weight), before)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)

    with pytest.warns(igulora.MergeWarning):
        model.merge_adapter(["default"])
    with pytest.warns(igulora.MergeWarning):
        model.merge_adapter(["b"])
    # From the original numbers again: what quantising lost does not add up.
    assert check(["default", "b"]) == pytest.approx(at_once, rel=1e-3)
    layer.igu_adapters["c"] = copy.deepcopy(layer.igu_adapters["b"])
    layer.igu_adapters["c"].lora_E.data.fill_(float("nan"))
    now = numbers(layer.base_layer.weight).clone()
    with pytest.raises(ValueError, match="adapter c seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["c"])
    assert torch.equal(numbers(layer.base_layer.weight), now)
    model.unmerge_adapter()
    assert torch.equal(numbers(layer.base_layer.weight), before)
    del layer.igu_adapters["c"]
    with pytest.warns(igulora.MergeWarning):
        done = model.merge_and_unload()
    assert torch.equal(numbers(done.base.weight), stored)
    assert type(done.base) is type(stack()[0].base)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_a_model_that_transformers_quantised_while_loading(
    kind: str, llama: Any, batch: Any, options: Any, train: Any, say: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    import transformers

    llama().save_pretrained(tmp_path / "base")
    quantised = transformers.BitsAndBytesConfig(**{f"load_in_{kind.replace('-', '')}": True})

    def load() -> nn.Module:
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised)

    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(load()), options())
    ctl, opt = train(model, batch)
    igulora.compact(model, opt, ctl)
    assert sum(ctl.live_ranks().values()) == 28
    changed = sum(rank > 0 for rank in ctl.live_ranks().values())
    y = say(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(peft.prepare_model_for_kbit_training(load()), tmp_path / "adapter")
    torch.testing.assert_close(say(loaded, batch), y)
    with pytest.warns(igulora.MergeWarning, match=f"quantised {changed} weights anew"):
        model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(say(model, batch), y)


def test_training_goes_on_after_an_evaluation(stack: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    """bitsandbytes packs 4-bit weights for the CPU's own product when it is first evaluated."""
    gradients = []
    for evaluated in (False, True):
        model, x = stack()
        model = shaken(peft.get_peft_model(model, config(["first", "base"], method="lora")))
        if evaluated:
            with torch.no_grad():
                model.eval()(x)
            model.train()
        loss_of(model)(batch_of(x)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert any(grad.any() for name, grad in gradients[1].items() if "first" in name)
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=0.05, atol=0.05 * float(grad.abs().max()))
