"""Linear layers that transformers leaves in GGUF blocks, as it builds them from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import igulora
from igulora import FusedSVDLinear

from .cases import assert_near, gguf

package = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
kernels = pytest.importorskip("transformers.integrations.gguf.kernels")

HIDDEN, INNER, HEADS, GROUPS, VOCAB, LINEARS = 64, 128, 4, 2, 96, 12


def file_of(path: Path) -> Path:
    """An LFM2 of a convolution and an attention block, in Q8_0 and Q4_0: one of the architectures that transformers leaves packed."""
    writer = package.GGUFWriter(path, "lfm2")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, GROUPS])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_shortconv_l_cache(3)
    writer.add_token_list([f"<{i}>" for i in range(VOCAB)])
    rng = numpy.random.default_rng(0)

    def add(name: str, *shape: int, kind: str | None = None) -> None:
        one = numpy.ones(shape, numpy.float32)
        values = rng.standard_normal(shape, numpy.float32) * 0.1 if len(shape) > 1 else one
        if kind is None:
            writer.add_tensor(f"{name}.weight", values)
        else:
            number = package.GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", package.quants.quantize(values, number), raw_dtype=number)

    add("token_embd", VOCAB, HIDDEN)
    add("output", VOCAB, HIDDEN)
    add("token_embd_norm", HIDDEN)
    for i in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{norm}", HIDDEN)
        for name, rows, columns in (
            ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ):
            add(f"blk.{i}.{name}", rows, columns, kind="Q4_0")
    add("blk.0.shortconv.in_proj", 3 * HIDDEN, HIDDEN, kind="Q8_0")
    add("blk.0.shortconv.out_proj", HIDDEN, HIDDEN, kind="Q8_0")
    add("blk.0.shortconv.conv", HIDDEN, 3)
    for name, heads in (("attn_q", HEADS), ("attn_k", GROUPS), ("attn_v", GROUPS), ("attn_output", HEADS)):
        add(f"blk.1.{name}", HIDDEN * heads // HEADS, HIDDEN, kind="Q8_0")
    for norm in ("attn_q_norm", "attn_k_norm"):
        add(f"blk.1.{norm}", HIDDEN // HEADS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Kernel:
    """In place of the published kernel, which transformers asks before it leaves weights packed: it supports all types."""

    def supports(self, _ggml_type: int) -> bool:
        return True


def load(path: Path, dequantize: bool) -> nn.Module:
    config = transformers.GgufConfig(dequantize=dequantize)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=config, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture
def packed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.get_gguf_kernel", lambda: Kernel())
    return file_of(tmp_path / "tiny.gguf")


def test_a_model_that_transformers_loads(packed_file: Path, tmp_path: Path) -> None:
    packed, dense = load(packed_file, False), load(packed_file, True)
    kinds = [type(m).__name__ for m in packed.modules()]
    assert kinds.count("GgufLinear") == LINEARS
    assert kinds.count("Linear") == 1  # the head
    options: dict[str, Any] = {"r": 4, "target_rank": 2, "total_steps": 30, "t_init": 6, "t_final": 4, "window": 2}
    gradients, losses = [], []
    ids = torch.randint(0, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    for model in (packed, dense):
        igulora.adapt(model, igulora.IGUConfig(**options))
        bank = igulora.find_bank(model)
        assert len(bank.layers) == LINEARS
        bank.lambdas.fill_(0.5)
        model(**batch).loss.backward()
        gradients.append(bank.grad.clone())
        bank.grad.zero_()
    assert_near(gradients[0], gradients[1], 1e-4)
    ctl, opt = igulora.Controller(packed), torch.optim.AdamW(igulora.param_groups(packed, lr=1e-2))
    for _ in range(12):
        losses.append(float(ctl.backward(lambda b: packed(**b).loss, batch)))
        opt.step()
        ctl.step()
        opt.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    igulora.save_adapter(packed, tmp_path / "adapter")
    plain = igulora.load_adapter(load(packed_file, True), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = packed.eval()(ids).logits
        torch.testing.assert_close(plain(ids).logits, logits, rtol=1e-4, atol=1e-4)
        # What a packed model cannot do, the unpacked one does.
        with pytest.raises(ValueError, match=r"layers.0.conv.in_proj' \(GGUF\)"):
            igulora.merge(packed)
        torch.testing.assert_close(igulora.merge(plain)(ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_every_number_of_rows_is_the_product_with_the_files_numbers(kind: str, rows: int) -> None:
    """transformers runs another product for up to eight rows, for which there is no kernel here."""
    base = gguf(kind, permuted=True)
    number = package.GGMLQuantizationType[kind]
    stored = torch.from_numpy(package.quants.dequantize(base.weight.numpy(), number))
    W = torch.empty_like(stored)
    W[:, base.input_permutation] = stored
    layer = FusedSVDLinear(base, r=3, init="orthonormal")
    nn.init.normal_(layer.lora_E)
    assert torch.equal(layer.base.dense(), W)
    x = torch.randn(rows, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    whole = W + layer.delta_weight().detach()
    torch.testing.assert_close(y, nn.functional.linear(x, whole, base.bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, torch.ones(rows, 48) @ whole, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_reads_the_blocks_is_used_and_its_gradient_supplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's product has no derivative: y is cut off from x, as that of a compiled extension is."""
    base, calls = gguf("Q8_0"), []

    def mul_mat_vec(weight: torch.Tensor, x: torch.Tensor, ggml_type: int, _out: int) -> torch.Tensor:
        calls.append(tuple(x.shape))
        dense = kernels.dequantize(weight, ggml_type).reshape(48, 64)
        return x.detach() @ dense.t()

    monkeypatch.setattr("transformers.integrations.gguf.utils.mul_mat_vec", mul_mat_vec)
    monkeypatch.setattr(kernels, "kernel_can_read", lambda _weight: True)
    monkeypatch.setattr("igulora.bases.gguf.GgufBase._blocks", lambda self, dtype: kernels.dequantize(
        self.module.weight, self.module.ggml_type, dtype).reshape(48, 64))  # fmt: skip
    layer, x = FusedSVDLinear(base, r=3, init="orthonormal"), torch.randn(2, 64, requires_grad=True)
    assert not base(x).requires_grad
    layer(x).sum().backward()
    assert calls == [(2, 64), (2, 64)]
    torch.testing.assert_close(x.grad, torch.ones(2, 48) @ layer.base.dense(), rtol=1e-5, atol=1e-5)
