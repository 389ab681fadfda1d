"""Adapted convolutions: every padding, memory format and kind of input; a ViT whose patches are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, dropout

import igulora
from igulora import FusedSVDConv2d

F64 = torch.float64


def layer(r: int = 3, dtype: torch.dtype = F64, drop: float = 0.0, **options: Any) -> FusedSVDConv2d:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    built = FusedSVDConv2d(
        nn.Conv2d(3, 5, **{"kernel_size": 3, **options}, dtype=dtype), r, init="orthonormal", generator=g, dropout=drop
    )
    nn.init.normal_(built.lora_E, generator=g)
    return built


def whole(built: FusedSVDConv2d, x: torch.Tensor) -> torch.Tensor:
    """The base's own forward, with the update in its weight."""
    with torch.no_grad():
        W = built.base.dense().to(built.lora_P.dtype) + built.delta_weight()
    return built.base_layer._conv_forward(x.to(W.dtype), W.view(built.weight.shape), built.bias.to(W.dtype))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["valid", "same", 1, (0, 2)])
@pytest.mark.parametrize("kernel", [3, (2, 4)])
def test_every_padding(mode: str, padding: Any, kernel: Any) -> None:
    dilation = 2 if kernel == 3 else 1
    built = layer(kernel_size=kernel, padding=padding, padding_mode=mode, dilation=dilation)
    x = torch.randn(2, 3, 8, 9, dtype=F64, requires_grad=True)
    y = built(x)
    wanted = whole(built, x)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, wanted)))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_output_keeps_its_memory_format(form: torch.memory_format, stride: int) -> None:
    built = layer(stride=stride, padding=1).to(memory_format=form)
    x = torch.randn(2, 3, 8, 9, dtype=F64).to(memory_format=form).requires_grad_()
    base, y = built.base_layer(x), built(x)
    assert y.stride() == base.stride()
    torch.testing.assert_close(y, whole(built, x))
    y.square().sum().backward()
    assert x.grad.stride() == x.stride()
    built.merge()
    torch.testing.assert_close(built(x), y)
    assert built.weight.is_contiguous(memory_format=form)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_a_picture_without_its_batch() -> None:
    built, x = layer(padding="same", kernel_size=(2, 3)), torch.randn(3, 6, 7, dtype=F64)
    torch.testing.assert_close(built(x), built(x.unsqueeze(0)).squeeze(0))


def test_dropout_drops_entries_on_their_way_to_Q_and_follows_pytorchs_seed() -> None:
    built, x = layer(drop=0.4, padding=1), torch.randn(2, 3, 6, 7, dtype=F64)
    torch.manual_seed(5)
    y = built(x)
    torch.manual_seed(5)
    dropped = dropout(x, 0.4)
    delta = built.delta_weight().detach().view(built.weight.shape)
    torch.testing.assert_close(y, built.base_layer(x) + conv2d(dropped, delta, padding=1))
    built.eval()
    torch.testing.assert_close(built(x), whole(built, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_layers_and_autocast(dtype: torch.dtype) -> None:
    built, x = layer(dtype=dtype), torch.randn(2, 3, 6, 7)
    y = built(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), whole(built, x), rtol=0.05, atol=0.05)
    wide = layer(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wide(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), whole(wide, x), rtol=0.05, atol=0.05)
    assert all(torch.count_nonzero(p.grad) for p in (wide.lora_P, wide.lora_E, wide.lora_Q))


def test_layers_with_another_meaning_are_refused_by_name() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    config = igulora.IGUConfig(r=2, target_rank=1, total_steps=99, target_modules=["0"])
    for base, why in (
        (nn.Conv2d(4, 4, 3, groups=2), "its 2 groups make W a block-diagonal matrix"),
        (Standardised(4, 4, 3), "Standardised computes more than a convolution"),
    ):
        with pytest.raises(ValueError, match=rf"got '0' \(nn.Conv2d\): {why}"):
            igulora.adapt(nn.Sequential(base), config)
    with pytest.raises(TypeError, match="expected an nn.Conv2d, got Conv1d"):
        FusedSVDConv2d(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match=r"embeddings and convolutions only, got '0' \(Conv1d\)"):
        igulora.adapt(nn.Sequential(nn.Conv1d(2, 2, 1)), config)


def test_a_vision_transformer_trains_its_patches_with_the_rest(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
        num_labels=3,
    )

    def load() -> nn.Module:
        torch.manual_seed(0)
        return transformers.ViTForImageClassification(config)

    model = load()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "classifier" not in n]
    igulora.adapt(
        model,
        igulora.IGUConfig(
            r=4,
            target_rank=2,
            total_steps=30,
            t_init=6,
            t_final=4,
            window=2,
            ig_every=1,
            target_modules=["projection", *{n.split(".")[-1] for n in names}],
        ),
    )
    bank = igulora.find_bank(model)
    assert isinstance(bank.layers[0], FusedSVDConv2d)
    ctl, opt = igulora.Controller(model), torch.optim.AdamW(igulora.param_groups(model, lr=2e-2))
    g = torch.Generator().manual_seed(0)
    batch = {"pixel_values": torch.randn(6, 3, 12, 12, generator=g), "labels": torch.arange(6) % 3}
    losses = []
    for _ in range(30):
        losses.append(float(ctl.backward(lambda b: model(**b).loss, batch)))
        opt.step()
        ctl.step()
        opt.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert sum(bank.ranks().values()) == 2 * len(bank.layers)
    igulora.save_adapter(model, tmp_path)
    model.eval()
    with torch.no_grad():
        y = model(batch["pixel_values"]).logits
        other = igulora.load_adapter(load(), tmp_path).eval()
        torch.testing.assert_close(other(batch["pixel_values"]).logits, y)
        torch.testing.assert_close(igulora.merge(model)(batch["pixel_values"]).logits, y, rtol=1e-4, atol=1e-5)
