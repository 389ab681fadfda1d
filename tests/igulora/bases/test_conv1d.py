"""transformers' Conv1D, the linear layer of GPT-2, whose weight lies transposed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import igulora

transformers = pytest.importorskip("transformers")


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("path_pass", ["mixed", "separate"])
def test_all_linear_names_the_layers_of_gpt2(path_pass: str, tmp_path) -> None:
    model = tiny_gpt2()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    batch, losses = {"input_ids": ids, "labels": ids}, []
    options = {"r": 4, "target_rank": 2, "total_steps": 30, "t_init": 6, "t_final": 4, "window": 2, "ig_every": 1}
    igulora.adapt(model, igulora.IGUConfig(**options, path_pass=path_pass))
    bank = igulora.find_bank(model)
    assert len(bank.names) == 8
    assert {n.rsplit(".", 1)[-1] for n in bank.names} == {"c_attn", "c_proj", "c_fc"}
    assert all(layer.base.kind == "Conv1D" for layer in bank.layers)
    ctl, opt = igulora.Controller(model), torch.optim.AdamW(igulora.param_groups(model, lr=2e-2))
    for _ in range(30):
        losses.append(float(ctl.backward(lambda b: model(**b).loss, batch)))
        opt.step()
        ctl.step()
        opt.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert sum(bank.ranks().values()) == 2 * 8
    model.eval()
    with torch.no_grad():
        y = model(ids).logits
        igulora.save_adapter(model, tmp_path)
        torch.testing.assert_close(igulora.load_adapter(tiny_gpt2(), tmp_path).eval()(ids).logits, y)
        torch.testing.assert_close(igulora.merge(model)(ids).logits, y, rtol=1e-4, atol=1e-5)
    igulora.remove(igulora.unmerge(model))
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, base[name], rtol=1e-5, atol=1e-6)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
