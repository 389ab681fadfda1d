"""Adapted embeddings: ids instead of features, tables shared with the head, factors, padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding

import igulora
from igulora import FusedSVDEmbedding, FusedSVDLinear


def layer(r: int = 3, **options) -> FusedSVDEmbedding:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    built = FusedSVDEmbedding(nn.Embedding(9, 6, **options), r, init="orthonormal", generator=g)
    nn.init.normal_(built.lora_E, generator=g)
    return built


def tiny_lm(tied: bool) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def options(**changes) -> igulora.IGUConfig:
    return igulora.IGUConfig(
        **{"r": 4, "target_rank": 2, "total_steps": 30, "t_init": 6, "t_final": 4, "window": 2, **changes}
    )


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    built = layer()
    ids = torch.randint(0, 9, shape).to(dtype)
    y = built(ids)
    assert y.shape == (*shape, 6)
    torch.testing.assert_close(y, embedding(ids, built.weight + built.delta_weight().t()))
    y.sum().backward()


def test_the_padding_row_stays_what_it_is() -> None:
    built = layer(padding_idx=4)
    optimizer = torch.optim.AdamW(built.parameters(), lr=0.1)
    for step in range(3):
        built(torch.arange(9)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            built.reset_parameters("orthonormal", init_lambda=0.5)
    assert torch.equal(built(torch.tensor([4])), built.base_layer(torch.tensor([4])))
    assert torch.count_nonzero(built(torch.arange(9)) - built.base_layer(torch.arange(9))) == 8 * 6
    built.merge()
    assert torch.equal(built.weight[4], torch.zeros(6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_tables(dtype: torch.dtype) -> None:
    built, ids = layer(dtype=dtype), torch.randint(0, 9, (4, 5))
    y = built(ids)
    assert y.dtype == dtype
    assert built.lora_P.dtype == torch.float32
    exact = embedding(ids, built.weight.float() + built.delta_weight().t())
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert built(ids).dtype == dtype  # a lookup is not cast


def test_rows_that_the_layer_scales_have_their_update_scaled() -> None:
    bart = pytest.importorskip("transformers.models.bart.modeling_bart")
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    for base in (
        bart.BartScaledWordEmbedding(9, 6, padding_idx=1, embed_scale=2.5),
        gemma.Gemma3TextScaledWordEmbedding(9, 6, padding_idx=1, embed_scale=2.5),
    ):
        built = FusedSVDEmbedding(base, 3, init="orthonormal")
        nn.init.normal_(built.lora_E)
        ids = torch.randint(0, 9, (3, 4))
        y = built(ids)
        torch.testing.assert_close(y, 2.5 * embedding(ids, base.weight + built.delta_weight().t()))
        y.square().sum().backward()
        grads = [p.grad for p in (built.lora_P, built.lora_E, built.lora_Q)]
        P, E, Q = factors = [p.detach().requires_grad_() for p in (built.lora_P, built.lora_E, built.lora_Q)]
        (2.5 * embedding(ids, base.weight + (P.t() * E * built.scale @ Q).t(), padding_idx=1)).square().sum().backward()
        for got, wanted in zip(grads, factors, strict=True):
            torch.testing.assert_close(got, wanted.grad)
        built.merge()
        torch.testing.assert_close(built(ids), y)


class Positions(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + 2)


def test_tables_with_another_meaning_are_refused_by_name() -> None:
    for base, why in (
        (nn.Embedding(9, 6, max_norm=1.0), "max_norm rewrites the table"),
        (nn.Embedding(9, 6, sparse=True), "sparse=True"),
        (nn.Embedding(9, 6, scale_grad_by_freq=True), "scale_grad_by_freq=True"),
        (Positions(9, 6), "Positions computes more than a lookup"),
    ):
        with pytest.raises(ValueError, match=f"got nn.Embedding of which .*{why}"):
            FusedSVDEmbedding(base)
        with pytest.raises(ValueError, match=rf"got '0' \(nn.Embedding\): .*{why}"):
            igulora.adapt(nn.Sequential(base), options(target_modules=["0"]))
    with pytest.raises(TypeError, match="expected an nn.Embedding, got Linear"):
        FusedSVDEmbedding(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected an nn.Linear .* got Embedding"):
        FusedSVDLinear(nn.Embedding(2, 2))


def test_all_linear_leaves_embeddings_alone() -> None:
    model = igulora.adapt(tiny_lm(tied=False), options())
    assert type(model.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize("tied", [False, True])
def test_peft_529_embeddings_train(tied: bool, tmp_path) -> None:
    """A table shared with the head: the lookups learn, the head stays, and merging, which would change both, is refused."""
    model = tiny_lm(tied)
    head = model.lm_head.weight.detach().clone()
    igulora.adapt(model, options(target_modules=["embed_tokens"]))
    bank = igulora.find_bank(model)
    ctl, opt = igulora.Controller(model), torch.optim.AdamW(igulora.param_groups(model, lr=2e-2))
    ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    batch, losses = {"input_ids": ids, "labels": ids}, []
    for _ in range(30):
        losses.append(float(ctl.backward(lambda b: model(**b).loss, batch)))
        opt.step()
        ctl.step()
        opt.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    assert bank.ranks() == {"model.embed_tokens": 2}
    assert torch.equal(model.lm_head.weight, head)
    model.eval()
    with torch.no_grad():
        y = model(ids).logits
        igulora.save_adapter(model, tmp_path)
        torch.testing.assert_close(igulora.load_adapter(tiny_lm(tied), tmp_path).eval()(ids).logits, y)
        if tied:
            with pytest.raises(
                ValueError, match="got 'model.embed_tokens', whose weight is that of another module too"
            ):
                igulora.merge(model)
            assert not any(layer.merged for layer in bank.layers)
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        torch.testing.assert_close(igulora.merge(model)(ids).logits, y, rtol=1e-4, atol=1e-5)


def test_ids_that_all_sequences_share_cannot_sample_the_path() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = igulora.adapt(transformers.GPT2LMHeadModel(config), options(target_modules=["wpe"], window=1, ig_every=1))
    ctl = igulora.Controller(model)
    ids = torch.randint(0, 50, (4, 8))
    with pytest.raises(ValueError, match="ids that all sequences share .* leave that embedding out"):
        ctl.backward(lambda b: model(**b).loss, {"input_ids": ids, "labels": ids})


def test_one_seed_one_start_and_no_dropout() -> None:
    one, two = layer(), layer()
    assert torch.equal(one.lora_Q, two.lora_Q)
    built = FusedSVDEmbedding(nn.Embedding(9, 6), 3, dropout=0.5, init="orthonormal", init_lambda=1.0)
    assert torch.equal(built(torch.arange(9)), built(torch.arange(9)))
    assert "in_features=9, out_features=6, r=3" in repr(built)
