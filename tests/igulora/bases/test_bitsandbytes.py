"""bitsandbytes: what its layers do beyond a product, and models that transformers loads with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import igulora
from igulora import FusedSVDLinear

from .cases import assert_near, bnb4, bnb8, dense_layer

bnb = pytest.importorskip("bitsandbytes")


def wide() -> nn.Linear:
    """Of a shape that bitsandbytes packs anew for CPUs with AVX512-BF16."""
    torch.manual_seed(0)
    return nn.Linear(64, 96)


def wrapped(base: nn.Module, r: int = 4) -> FusedSVDLinear:
    layer = FusedSVDLinear(base, r=r, init="orthonormal", generator=torch.Generator().manual_seed(0))
    nn.init.normal_(layer.lora_E, generator=torch.Generator().manual_seed(1))
    return layer


@pytest.mark.parametrize("double", [False, True])
def test_evaluating_between_steps_changes_neither_the_weight_nor_the_gradient(double: bool) -> None:
    layer = wrapped(bnb4(double=double, source=wide()))
    stored = layer.weight.data.clone()
    x = torch.randn(3, 5, 64, requires_grad=True)
    y = layer(x)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
    assert torch.equal(layer.weight.data, stored)
    layer.train()
    again = layer(x)
    assert torch.equal(again, y)
    again.sum().backward()
    dense = layer.base.dense() + layer.delta_weight().detach()
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ dense, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes packs weights anew on CPUs with AVX512-BF16"
)
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_that_was_evaluated_before_it_was_adapted_trains(double: bool) -> None:
    plain = bnb4(double=double, source=wide()).eval()
    fresh = bnb4(double=double, source=wide())
    dense = bnb.functional.dequantize_4bit(fresh.weight.data, fresh.weight.quant_state)
    with torch.no_grad():
        plain(torch.randn(2, 64))
    assert plain.weight.quant_state.packing_format_for_cpu
    layer = wrapped(plain).train()
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.count_nonzero(x.grad)
    # bitsandbytes rounded the scales to bfloat16 when it packed them; what is there now is that.
    assert_near(layer.base.dense(), dense, 4e-3)


def test_the_layer_is_left_as_it_was() -> None:
    base = bnb4(source=wide())
    flag = base.support_avx512bf16_for_cpu
    wrapped(base).eval()(torch.randn(2, 64))
    assert base.support_avx512bf16_for_cpu is flag


@pytest.mark.filterwarnings("ignore::igulora.MergeWarning")
@pytest.mark.parametrize("make", [lambda: bnb4(double=True), bnb8], ids=["nf4-double", "int8"])
@pytest.mark.parametrize("ran", [False, True])
def test_peft_959_a_merged_layer_is_a_quantised_layer_and_unmerging_restores_every_byte(make, ran: bool) -> None:
    layer, x = wrapped(make()), torch.randn(3, 64)
    if ran:  # the first forward moves the scales of 8-bit weights
        layer(x)
    kind, dtype, shape = type(layer.weight), layer.weight.dtype, layer.weight.shape
    before = {k: v.clone() for k, v in layer.base_layer.state_dict().items() if isinstance(v, torch.Tensor)}
    update = layer.delta_weight().detach()
    sum_of_both = layer.base.dense().float() + update
    error = layer.merge()
    assert error == layer.merge_error > 0
    assert (type(layer.weight), layer.weight.dtype, layer.weight.shape) == (kind, dtype, shape)
    assert float((layer.base.dense().float() - sum_of_both).norm() / update.norm()) == pytest.approx(error)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.base.dense().float(), layer.bias), rtol=1e-5, atol=1e-5
    )
    layer.unmerge()
    layer(x)
    after = layer.base_layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert layer.merge_error == 0.0


def test_the_error_is_that_of_quantising_the_sum() -> None:
    """An update that lands on what the blocks can hold costs nothing; twice the weight is such a sum."""
    layer = wrapped(bnb4(), r=48)
    dense = layer.base.dense().float()
    with torch.no_grad():
        layer.lora_P.copy_(torch.eye(48))
        layer.lora_E.fill_(1.0)
        layer.lora_Q.copy_(dense)
    assert layer.merge() < 1e-6


def test_eight_bit_with_outliers_in_evaluation() -> None:
    """There activations are quantised too; the update is not."""
    layer = wrapped(bnb8(threshold=6.0)).eval()
    x = torch.randn(4, 64)
    x[:, 3] *= 20
    y = layer(x)
    torch.testing.assert_close(y - layer.base_layer(x), x @ layer.delta_weight().t(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs(compute: torch.dtype) -> None:
    base = bnb.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=compute)
    base.load_state_dict(dense_layer().state_dict())
    layer = wrapped(base.to("cpu"))
    assert layer.lora_P.dtype == torch.float32
    x = torch.randn(7, 64, dtype=compute, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    W = layer.base.dense().float() + layer.delta_weight().detach()
    assert y.dtype == x.grad.dtype == compute
    assert_near(y.float(), nn.functional.linear(x.detach().float(), W, layer.bias.float()), 0.01)
    assert_near(x.grad.float(), torch.ones(7, 48) @ W, 0.01)


@pytest.mark.parametrize("make", [bnb4, bnb8])
def test_autocast(make) -> None:
    layer = wrapped(make())
    x = torch.randn(7, 64, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert_near(y.float(), exact, 0.01)
    assert all(torch.count_nonzero(t.grad) for t in (x, layer.lora_P, layer.lora_E, layer.lora_Q))


def test_layers_that_are_not_quantised_are_refused_by_name() -> None:
    config = igulora.IGUConfig(r=2, target_rank=1, total_steps=99)
    model = nn.Sequential(bnb.nn.Linear8bitLt(8, 8))
    with pytest.raises(
        ValueError, match=r"got '0' \(bitsandbytes 8-bit\): it keeps 16-bit weights .* has_fp16_weights=False"
    ):
        igulora.adapt(model, config)
    for layer in (bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False), bnb.nn.Linear4bit(64, 8)):
        with pytest.raises(ValueError, match=r"got '0' .* not quantised yet, .* call model.to\(device\) first"):
            igulora.adapt(nn.Sequential(layer), config)
        with pytest.raises(ValueError, match="expected a layer that can be adapted"):
            FusedSVDLinear(layer)
    table = bnb.nn.Embedding8bit(8, 8).to("cpu")
    with pytest.raises(ValueError, match="its table is quantised"):
        igulora.FusedSVDEmbedding(table)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_loads(bits: int, tiny_llama, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    if bits == 4:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    else:
        options = {"load_in_8bit": True}
    quantization = transformers.BitsAndBytesConfig(**options)

    def load() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tiny_llama, quantization_config=quantization, device_map="cpu", dtype=torch.float32
        )

    model = igulora.adapt(load(), igulora.IGUConfig(r=4, target_rank=2, total_steps=30, t_init=6, t_final=4, window=2))
    bank = igulora.find_bank(model)
    assert len(bank.layers) == 14
    assert all(layer.base.kind == f"bitsandbytes {bits}-bit" for layer in bank.layers)
    ctl, opt = igulora.Controller(model), torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        losses.append(float(ctl.backward(lambda b: model(**b).loss, {"input_ids": ids, "labels": ids})))
        opt.step()
        ctl.step()
        opt.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    igulora.save_adapter(model, tmp_path / "adapter")
    other = igulora.load_adapter(load(), tmp_path / "adapter")
    model.eval(), other.eval()
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits)
    igulora.export_peft(model, tmp_path / "peft")
    served = pytest.importorskip("peft").PeftModel.from_pretrained(load(), tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, model(ids).logits, rtol=2e-2, atol=2e-2)


def test_a_small_update_is_lost_in_nf4_and_the_warning_says_so() -> None:
    """What docs/bases.md tells: steps between 4-bit numbers swallow an update of one percent."""
    torch.manual_seed(0)
    source = nn.Linear(256, 256)
    nn.init.normal_(source.weight, std=0.02)
    model = nn.Sequential(bnb4(source=source))
    igulora.adapt(model, igulora.IGUConfig(r=16, target_rank=8, total_steps=99, init="orthonormal"))
    layer = model[0]
    nn.init.normal_(layer.lora_E)
    with torch.no_grad():
        layer.lora_E.mul_(0.01 * layer.base.dense().norm() / layer.delta_weight().norm())
    with pytest.warns(
        igulora.MergeWarning, match=r"errors of up to 1\d\d% of the update \(0, bitsandbytes 4-bit; the update is 1.00%"
    ):
        igulora.merge(model)
    assert 0.9 < igulora.merge_errors(model)["0"] < 1.3


def test_igulora_trainer_takes_a_quantised_model(tiny_llama, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
        dtype=torch.float32,
    )
    config = igulora.IGUConfig(r=4, target_rank=2, total_steps=12, t_init=4, t_final=4, window=1, ig_every=1)
    igulora.adapt(model, config)
    ids = torch.randint(0, 64, (16, 9), generator=torch.Generator().manual_seed(0))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=12,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = igulora.IGUTrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert sum(igulora.find_bank(model).ranks().values()) == 2 * 14
