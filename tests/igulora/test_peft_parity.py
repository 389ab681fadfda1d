"""The AdaLoRA setting against PEFT: the same states, scores and masks from the same gradients, and the same training run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import igulora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

T, T_INIT, T_FINAL, DELTA, R, TARGET = 50, 8, 12, 4, 6, 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAIRS = (("lora_P", "lora_B"), ("lora_E", "lora_E"), ("lora_Q", "lora_A"))


def base_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config)


def both(lambda_init: float) -> tuple[nn.Module, nn.Module]:
    """Our model and PEFT's, with equal adapters."""
    base = base_model()
    config = igulora.IGUConfig(
        method="adalora", r=R, target_rank=TARGET, total_steps=T, t_init=T_INIT, t_final=T_FINAL, delta_t=DELTA,
        init="gaussian", target_modules=TARGETS, orthogonality=0.5,
    )  # fmt: skip
    ours = igulora.adapt(copy.deepcopy(base), config)
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.AdaLoraConfig(
            init_r=R, target_r=TARGET, tinit=T_INIT, tfinal=T_FINAL, deltaT=DELTA, total_step=T, beta1=0.85, beta2=0.85,
            orth_reg_weight=0.5, lora_alpha=R, target_modules=TARGETS, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, layer in ours_and_theirs(ours, theirs):
            layer[0].lora_E.copy_(lambda_init * torch.randn(R, generator=generator))
            layer[0].scale = R / (R + 1e-5)  # PEFT divides by ranknum + 1e-5
            for mine, their in PAIRS:
                peft_param(layer[1], their).copy_(as_peft(mine, getattr(layer[0], mine)))
            assert name
    return ours, theirs


def ours_and_theirs(ours: nn.Module, theirs: nn.Module) -> list[tuple[str, tuple[Any, Any]]]:
    modules = dict(theirs.named_modules())
    bank = igulora.find_bank(ours)
    return [(n, (layer, modules[f"base_model.model.{n}"])) for n, layer in zip(bank.names, bank.layers, strict=True)]


def peft_param(layer: Any, name: str) -> torch.Tensor:
    return getattr(layer, name)["default"]


def as_peft(name: str, value: torch.Tensor) -> torch.Tensor:
    """Our (r, out), (r,), (r, in) in PEFT's shapes (out, r), (r, 1), (r, in)."""
    return value.t() if name == "lora_P" else value.unsqueeze(1) if name == "lora_E" else value


def adapters_close(ours: nn.Module, theirs: nn.Module, rtol: float, atol: float) -> None:
    for name, (mine, their) in ours_and_theirs(ours, theirs):
        live = mine.mask if mine.mask.min() == 0 else None
        for part, peft_name in PAIRS:
            value = as_peft(part, getattr(mine, part).detach())
            if part == "lora_E" and live is not None:
                value = value * live.unsqueeze(1)  # PEFT writes 0 where we mask
            torch.testing.assert_close(
                value,
                peft_param(their, peft_name).detach(),
                rtol=rtol,
                atol=atol,
                msg=lambda m, n=name, p=part: f"{n}.{p}: {m}",
            )


def test_rank_allocator_from_the_same_gradients() -> None:
    """Sensitivity, uncertainty, masks and lambdas equal PEFT's RankAllocator step by step over a whole schedule."""
    ours, theirs = both(lambda_init=0.3)
    ctl = igulora.Controller(ours)
    bank = igulora.find_bank(ours)
    allocator = theirs.base_model.rankallocator
    generator = torch.Generator().manual_seed(7)
    pairs = ours_and_theirs(ours, theirs)
    compared_masks = 0
    for step in range(1, T + 1):
        bank.bind_grads()
        for _, (mine, their) in pairs:
            for part, peft_name in PAIRS:
                grad = torch.randn(getattr(mine, part).shape, generator=generator)
                getattr(mine, part).grad.copy_(grad)
                peft_param(their, peft_name).grad = as_peft(part, grad).clone()
        drift = {name: torch.randn(R, generator=generator) * 0.01 for name, _ in pairs}
        with torch.no_grad():  # an optimizer step: pruned lambdas grow back
            for name, (mine, their) in pairs:
                if step <= T - T_FINAL:
                    mine.lora_E.add_(drift[name])
                    peft_param(their, "lora_E").add_(drift[name].unsqueeze(1))
        info = ctl.step()
        theirs.base_model.update_and_allocate(step)
        if step < T - T_FINAL:
            means, deviations = bank.matrix_views(ctl.importance.mean), bank.matrix_views(ctl.importance.deviation)
            for name, _ in pairs:
                for part, peft_name in PAIRS:
                    key = f"base_model.model.{name}.{peft_name}.default"
                    full = next(k for k in allocator.exp_avg_ipt if k.endswith(key.removeprefix("base_model.model.")))
                    torch.testing.assert_close(
                        as_peft(part, means[name, part]), allocator.exp_avg_ipt[full], rtol=1e-5, atol=1e-7
                    )
                    torch.testing.assert_close(
                        as_peft(part, deviations[name, part]), allocator.exp_avg_unc[full], rtol=1e-5, atol=1e-7
                    )
        budget, due = allocator.budget_schedule(step)
        if step < T - T_FINAL:
            assert info.allocated == due
            assert info.budget == budget
        if info.allocated:
            pattern = theirs.peft_config["default"].rank_pattern
            live = bank.live.tolist()
            for i, (name, _) in enumerate(pairs):
                theirs_live = next(v for k, v in pattern.items() if f"{name}." in k)
                assert [bool(v) for v in live[bank.starts[i] : bank.starts[i + 1]]] == theirs_live
            assert sum(live) == info.budget
            compared_masks += 1
        adapters_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert compared_masks == 8
    assert info.phase == "final"


def test_training_run_follows_peft_loss_by_loss() -> None:
    """fp32, 50 steps, warm-up, pruning and final phase: losses within 1e-4 relative, adapters close."""
    ours, theirs = both(lambda_init=0.0)
    ctl = igulora.Controller(ours)
    mine = torch.optim.AdamW(igulora.param_groups(ours, lr=1e-2, lambda_lr_ratio=1.0), lr=1e-2, weight_decay=0.0)
    their = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(11)
    for step in range(1, T + 1):
        ids = torch.randint(0, 40, (4, 10), generator=generator)
        batch = {"input_ids": ids, "labels": ids}
        loss = ctl.backward(lambda b: ours(**b).loss, batch)
        mine.step()
        ctl.step()
        mine.zero_grad()
        out = theirs(**batch)
        out.loss.backward()  # holds the penalty too
        their.step()
        theirs.base_model.update_and_allocate(step)
        their.zero_grad()
        theirs_loss = float(out.loss.detach()) - 0.5 * float(ctl.penalty)
        assert float(loss) == pytest.approx(theirs_loss, rel=1e-4), f"step {step}"
    adapters_close(ours, theirs, rtol=2e-2, atol=2e-3)
    assert sum(ctl.live_ranks().values()) == TARGET * len(ctl.bank.layers)
