"""``update_and_allocate`` where a loop does not step every time, where adapters come and go, and what a step looks for in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import igulora

peft = pytest.importorskip("peft")
from igulora.peft import IGULoraConfig  # noqa: E402
from igulora.peft import banks as banks_module  # noqa: E402

STEPS = 16


def adapted(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    return peft.get_peft_model(model, config(**changes))


def config(**changes: Any) -> IGULoraConfig:
    values: dict[str, Any] = {
        "method": "adalora", "r": 4, "target_rank": 2, "total_steps": STEPS, "t_init": 5, "t_final": 4, "delta_t": 2, "seed": 1,
        "target_modules": ["0", "2"], "orthogonality": 0.1, "init": "gaussian",
    }  # fmt: skip
    return IGULoraConfig(**{**values, **changes})


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def loss_of(model: nn.Module, step: int, bad: tuple[int, ...] = ()) -> Callable[[Tensor], Tensor]:
    factor = float("inf") if step in bad else 1.0
    return lambda x: (model(x) - 1.0).square().mean() * factor


def data(step: int) -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(step))


def loop(model: Any, opt: torch.optim.Optimizer, steps: range, bad: tuple[int, ...] = (), micro: int = 1) -> list[Any]:
    """AdaLoRA's loop with a loss scaler, which leaves out the steps whose gradients overflow."""
    scaler, infos = torch.amp.GradScaler("cpu", init_scale=8.0), []
    for step in steps:
        for _ in range(micro):
            scaler.scale(loss_of(model, step, bad)(data(step)) / micro).backward()
        scaler.step(opt)
        scaler.update()
        infos.append(model.base_model.update_and_allocate(step))
        opt.zero_grad()
    return infos


@pytest.mark.parametrize(("bad", "micro"), [((1,), 1), ((1, 2), 2), ((3,), 1), ((4, 9, 16), 2)])
def test_steps_that_a_loss_scaler_leaves_out_count_as_a_controller_counts_them(
    bad: tuple[int, ...], micro: int
) -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    infos = loop(model, optimizer(model), range(1, STEPS + 1), bad, micro)
    opt, ctl = optimizer(twin), igulora.Controller(twin, accumulation_steps=micro)
    scaler, expected = torch.amp.GradScaler("cpu", init_scale=8.0), []
    for step in range(1, STEPS + 1):
        scaler.scale(torch.zeros(()))  # makes the scale
        for _ in range(micro):
            ctl.backward(loss_of(twin, step, bad), data(step), scale=scaler.get_scale() / micro)
        scaler.step(opt)
        scaler.update()
        expected.append(ctl.step())
        opt.zero_grad()
    bank, stepped = igulora.find_bank(model), model.base_model.stepper._controllers["default"]
    assert infos == expected
    assert bool(torch.isfinite(bank.weight).all())
    assert bool(torch.isfinite(stepped.importance.mean).all())
    assert stepped.history == ctl.history
    assert sum(bank.ranks().values()) == 4
    torch.testing.assert_close(bank.weight, ctl.bank.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stepped.importance.mean, ctl.importance.mean, rtol=1e-3, atol=1e-9)


def test_gradients_that_nothing_stepped_with_are_an_error_at_first_and_the_loop_can_go_on() -> None:
    model = adapted()
    opt = optimizer(model)
    loss_of(model, 1)(data(1)).backward()
    with pytest.raises(ValueError, match="expected an optimizer step with the adapter's gradients before"):
        model.base_model.update_and_allocate(1)
    opt.step()
    assert model.base_model.update_and_allocate(1).step == 1


@pytest.mark.parametrize("stop", [3, 7, 8])
def test_a_run_that_was_reloaded_waits_for_scores(stop: int, tmp_path: Any) -> None:
    """PEFT's folders hold no scores. The schedule goes on where it was; the allocation after the third update is the next."""
    model = adapted()
    loop(model, optimizer(model), range(1, stop + 1))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    infos = loop(again, optimizer(again), range(stop + 1, STEPS + 1))
    assert [info.step for info in infos] == list(range(stop + 1, STEPS + 1))
    due = [step for step in (6, 8, 10, 12) if step > stop + 2]
    assert [info.step for info in infos if info.allocated] == due
    assert sum(igulora.find_bank(again).ranks().values()) == 4


def test_a_run_that_was_reloaded_just_before_its_last_allocation_keeps_its_ranks(tmp_path: Any) -> None:
    model = adapted()
    loop(model, optimizer(model), range(1, 11))
    model.save_pretrained(tmp_path)
    base = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    before = igulora.find_bank(again).ranks()
    opt = optimizer(again)
    with pytest.warns(
        UserWarning, match="ranks stay what they were before step 12: .* needs 3 score updates, and there were 1"
    ):
        loop(again, opt, range(11, 13))
    infos = loop(again, opt, range(13, STEPS + 1))
    bank = igulora.find_bank(again)
    assert infos[-1].phase == "final"
    assert bank.ranks() == before
    assert torch.equal(bank.mask, bank.live)


def test_an_adapter_that_gets_the_name_of_a_deleted_one_is_stepped_from_its_own_start() -> None:
    model = adapted()
    loop(model, optimizer(model), range(1, 6))
    old = model.base_model.stepper._controllers["default"]
    model.add_adapter("b", config())
    model.set_adapter("b")
    model.delete_adapter("default")
    model.add_adapter("default", config())
    model.set_adapter("default")
    infos = loop(model, optimizer(model), range(1, STEPS + 1))
    bank, stepped = igulora.find_bank(model), model.base_model.stepper._controllers["default"]
    assert [info.step for info in infos] == list(range(1, STEPS + 1))
    assert stepped is not old
    assert stepped.bank is bank
    assert sum(bank.ranks().values()) == 4


def test_a_controller_of_adapters_that_were_replaced_under_their_name_is_dropped() -> None:
    """transformers deletes adapters by PEFT's function, past the tuner."""
    from peft.functional import delete_adapter

    model = adapted()
    loop(model, optimizer(model), range(1, 4))
    old = model.base_model.stepper._controllers["default"]
    before = old.bank.grad.clone()
    delete_adapter(model.base_model.model, "default", prefix="igu_", layer_cls=banks_module.IGULoraLayer)
    model.base_model.inject_adapter(model.base_model.model, "default")
    model.set_adapter("default")
    infos = loop(model, optimizer(model), range(1, STEPS + 1))
    assert [info.step for info in infos] == list(range(1, STEPS + 1))
    assert model.base_model.stepper._controllers["default"] is not old
    assert torch.equal(old.bank.grad, before)
    assert sum(igulora.find_bank(model).ranks().values()) == 4


def test_a_step_does_not_look_through_the_model_for_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    model.add_adapter("b", config(target_modules=["0"], r=3, target_rank=1))
    opt = torch.optim.SGD([p for n, p in model.named_parameters() if "igu_" in n], lr=0.1)
    loop(model, opt, range(1, 3))
    walks: list[nn.Module] = []
    walk = banks_module.peft_layers
    monkeypatch.setattr(banks_module, "peft_layers", lambda m: walks.append(m) or walk(m))
    loop(model, opt, range(3, 6))
    assert igulora.find_bank(model) is model.base_model.banks["default"]
    model.set_adapter("b")
    loop(model, opt, range(1, 4))
    assert not walks
    twin = copy.deepcopy(model)
    assert igulora.find_bank(twin).layers == [twin.base_model.model[0].igu_adapters["b"]]
    model.set_adapter("default")
    model.delete_adapter("b")
    model.add_adapter("c", config(target_modules=["2"]))
    model.set_adapter("c")
    assert igulora.find_bank(model).layers == [model.base_model.model[2].igu_adapters["c"]]
    assert walks


def test_parameters_that_begin_to_be_trained_get_their_gradient_in_the_flat_one() -> None:
    model = adapted(method="lora", init="lora")
    bank = igulora.find_bank(model)
    frozen = bank.layers[0].lora_E
    assert not frozen.requires_grad
    frozen.requires_grad_()
    assert igulora.find_bank(model) is bank
    loss_of(model, 1)(data(1)).backward()
    assert frozen.grad.untyped_storage().data_ptr() == bank.grad.untyped_storage().data_ptr()


def test_a_controller_s_state_can_be_saved_after_peft_loaded_an_adapter() -> None:
    model = adapted()
    ctl = igulora.Controller(model)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model))
    assert ctl.state_dict()["tensors"]["live"].tolist() == [1.0] * 8
