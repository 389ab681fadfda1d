"""Training PEFT models: the controller, AdaLoRA's own call, what a stock loop is told, modules to save, checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import igulora

peft = pytest.importorskip("peft")
from igulora.peft import IGULoraConfig  # noqa: E402

ADALORA = {
    "method": "adalora", "init_r": 4, "target_r": 2, "tinit": 4, "tfinal": 4, "deltaT": 2, "total_step": 16, "window": None,
    **dict.fromkeys(("r", "target_rank", "t_init", "t_final", "delta_t", "total_steps", "ig_every")),
}  # fmt: skip


def adalora_loop(
    model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, steps: int, micro: int = 1
) -> list[Any]:
    """The loop of PEFT's AdaLoRA, word for word."""
    infos = []
    for step in range(steps):
        for _ in range(micro):
            (model(**batch).loss / micro).backward()
        optimizer.step()
        infos.append(model.base_model.update_and_allocate(step))
        optimizer.zero_grad()
    return infos


def stock_loop(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer) -> None:
    """What a Trainer that knows of no ranks does."""
    for _ in range(20):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize(("init", "normalize"), [("zero", "matrix"), ("orthonormal", "none")])
def test_the_controller_trains_a_peft_model_as_an_adapted_one(
    llama: Any, options: Any, batch: Any, train: Any, init: str, normalize: str
) -> None:
    ours = igulora.adapt(llama(), igulora.IGUConfig(
        r=4, target_rank=2, total_steps=20, t_init=7, t_final=5, delta_t=2, window=2, ig_every=1, seed=2, init=init,
        normalize=normalize))  # fmt: skip
    theirs = peft.get_peft_model(llama(), options(seed=2, init=init, normalize=normalize))
    mine, _ = train(ours, batch)
    their, _ = train(theirs, batch)
    assert mine.history == their.history
    assert torch.equal(mine.bank.weight, their.bank.weight)


@pytest.mark.parametrize("micro", [1, 2])
def test_adalora_s_loop_runs_by_changing_one_line(llama: Any, options: Any, batch: Any, micro: int) -> None:
    """peft#432: the regulariser is applied and the allocator called; the run is the one a controller makes."""
    model = peft.get_peft_model(llama(), options(**ADALORA, seed=2))
    twin = copy.deepcopy(model)
    infos = adalora_loop(model, batch, sgd(model), 16, micro)
    opt, ctl = sgd(twin), igulora.Controller(twin, accumulation_steps=micro)
    for _ in range(16):
        for _ in range(micro):
            ctl.backward(lambda b: twin(**b).loss, batch)
        opt.step()
        ctl.step()
        opt.zero_grad()
    assert [i.allocated for i in infos].count(True) >= 4
    assert infos[-1].phase == "final"
    assert sum(igulora.find_bank(model).ranks().values()) == 28
    torch.testing.assert_close(igulora.find_bank(model).weight, ctl.bank.weight, rtol=1e-4, atol=1e-6)


def test_peft_432_the_regulariser_reaches_the_gradient_of_a_stock_optimizer(
    llama: Any, options: Any, batch: Any
) -> None:
    model = peft.get_peft_model(llama(), options(**ADALORA, init="gaussian", orthogonality=0.5))
    bank, opt = igulora.find_bank(model), sgd(model)
    model(**batch).loss.backward()
    plain = bank.grad.clone()
    P = bank.layers[0].lora_P.detach().clone()
    gram = P @ P.t() - torch.eye(4)
    opt.step()
    index = bank.names.index(bank.names[0])
    added = bank.layers[index].lora_P.grad - plain[_where(bank, "lora_P")].view_as(P)
    expected = 0.5 / (2 * len(bank.layers)) * 2 * gram @ P / gram.norm()
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-7)


def _where(bank: Any, name: str) -> slice:
    s = next(s for s in bank.layout.slices if s.slot == 0 and s.name == name)
    return slice(s.offset, s.offset + s.rows * s.length)


def test_update_and_allocate_says_what_it_cannot_do(llama: Any, options: Any, batch: Any) -> None:
    model = peft.get_peft_model(llama(), options())
    model(**batch).loss.backward()
    with pytest.raises(ValueError, match=r"estimator='gauss'.*ctl = igulora\.Controller"):
        model.base_model.update_and_allocate(0)
    model = peft.get_peft_model(llama(), options(**ADALORA))
    with pytest.raises(ValueError, match="before update_and_allocate, got none"):
        model.base_model.update_and_allocate(0)
    opt = sgd(model)
    adalora_loop(model, batch, opt, 1)
    model(**batch).loss.backward()
    opt.step()
    with pytest.raises(ValueError, match="got step 5 after step 0"):
        model.base_model.update_and_allocate(5)
    model = peft.get_peft_model(llama(), options(**ADALORA))
    igulora.Controller(model)
    with pytest.raises(ValueError, match="one way of stepping"):
        model.base_model.update_and_allocate(0)


def test_peft_2337_a_schedule_that_prunes_before_scores_exist_is_refused_not_a_k_out_of_range(
    llama: Any, options: Any, batch: Any
) -> None:
    model = peft.get_peft_model(llama(), options(**{**ADALORA, "tinit": 0, "deltaT": 1}))
    with pytest.raises(ValueError, match="at least 3 score updates"):
        adalora_loop(model, batch, sgd(model), 1)
    model = peft.get_peft_model(llama(), options(**{**ADALORA, "target_r": 4}))  # nothing to prune: k = 0 in PEFT
    adalora_loop(model, batch, sgd(model), 16)
    assert sum(igulora.find_bank(model).ranks().values()) == 56


@pytest.mark.parametrize("method", ["igu", "adalora"])
def test_peft_1327_peft_1801_a_stock_loop_that_never_steps_the_ranks_is_stopped(
    llama: Any, options: Any, batch: Any, method: str
) -> None:
    """sentence-transformers#3842 too: adaptive rank that silently acts as LoRA."""
    model = peft.get_peft_model(llama(), options(method=method))
    opt = sgd(model)
    with pytest.raises(ValueError, match=r"expected an igulora\.Controller"):
        stock_loop(model, batch, opt)


def test_a_stock_loop_is_stopped_after_a_frozen_adapter_was_made_trainable(
    llama: Any, options: Any, batch: Any, tmp_path: Any
) -> None:
    peft.get_peft_model(llama(), options()).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path)
    model.set_adapter("default")
    model.train()
    with pytest.raises(ValueError, match=r"expected an igulora\.Controller"):
        stock_loop(model, batch, sgd(model))


def test_an_adapter_loaded_as_trainable_goes_on(
    llama: Any, options: Any, batch: Any, train: Any, tmp_path: Any
) -> None:
    peft.get_peft_model(llama(), options(init_lora_weights=False)).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    ctl, _ = train(model, batch)
    assert sum(ctl.live_ranks().values()) == 28
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    assert igulora.find_bank(model) is ctl.bank


def test_path_rows_do_not_train_a_module_to_save(llama: Any, options: Any, batch: Any) -> None:
    batch = {"input_ids": batch["input_ids"], "labels": torch.tensor([0, 1, 2, 0])}
    grads = {}
    for path_pass in ("mixed", "separate"):
        model = peft.get_peft_model(
            llama(kind="LlamaForSequenceClassification", num_labels=3), options(task_type="SEQ_CLS", seed=1, path_pass=path_pass)
        )  # fmt: skip
        bank = igulora.find_bank(model)
        bank.lambdas.fill_(0.5)
        igulora.Controller(model).backward(lambda b, m=model: m(**b).loss, batch)
        wrapper = model.base_model.model.score
        grads[path_pass] = wrapper.modules_to_save["default"].weight.grad
        assert wrapper.original_module.weight.grad is None
        assert bank.path.any()
    torch.testing.assert_close(grads["mixed"], grads["separate"], rtol=1e-4, atol=1e-6)


def test_switching_adapters_while_training_moves_each_by_its_own(llama: Any, options: Any, batch: Any) -> None:
    model = peft.get_peft_model(llama(), options(method="lora"))
    model.add_adapter("b", options(method="lora", r=3, target_rank=3))
    alone = {"default": copy.deepcopy(model), "b": copy.deepcopy(model)}
    opts = {}
    for m in (model, *alone.values()):
        opts[id(m)] = torch.optim.SGD([p for n, p in m.named_parameters() if "igu_" in n], lr=0.1)

    def step(m: nn.Module, name: str) -> None:
        m.set_adapter(name)
        opts[id(m)].zero_grad()
        m(**batch).loss.backward()
        opts[id(m)].step()

    for _ in range(3):
        for name in ("default", "b"):
            step(model, name)
            step(alone[name], name)
    for name, m in alone.items():
        for adapter in (model, m):
            adapter.set_adapter(name)
        torch.testing.assert_close(igulora.find_bank(model).weight, igulora.find_bank(m).weight, rtol=1e-4, atol=1e-6)


def test_peft_541_peft_581_everything_of_an_adapter_follows_the_model(llama: Any, options: Any) -> None:
    model = peft.get_peft_model(llama(), options()).to("meta")
    where = {t.device.type for t in (*model.parameters(), *model.buffers())}
    assert where == {"meta"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(llama: Any, options: Any, batch: Any, reentrant: bool) -> None:
    model = peft.get_peft_model(llama(), options(seed=1, init_lora_weights=False)).train()
    igulora.Controller(model).backward(lambda b: model(**b).loss, batch)
    bank = igulora.find_bank(model)
    plain, path = bank.grad.clone(), bank.path.clone()
    model.zero_grad()
    model = copy.deepcopy(model)
    if reentrant:
        model.enable_input_require_grads()
    new = hasattr(model.get_base_model(), "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    enable(**{f"{'activation' if new else 'gradient'}_checkpointing_kwargs": {"use_reentrant": reentrant}})
    igulora.Controller(model).backward(lambda b: model(**b).loss, batch)
    bank = igulora.find_bank(model)
    torch.testing.assert_close(bank.grad, plain, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(bank.path, path, rtol=1e-3, atol=1e-7)


def test_prepare_model_for_kbit_training_leaves_adapters_trainable(llama: Any, options: Any, batch: Any) -> None:
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(llama().to(torch.bfloat16)), options())
    ctl = igulora.Controller(model)
    ctl.backward(lambda b: model(**b).loss, batch)
    assert ctl.bank.has_grads


def test_a_config_for_any_module_without_transformers() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), IGULoraConfig(method="lora", r=2, target_modules=["0"])
    )  # fmt: skip
    model(torch.randn(3, 6)).sum().backward()
    assert igulora.find_bank(model).names == ["0"]
