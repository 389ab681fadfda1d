"""Stepping a model as PEFT's AdaLoRA is stepped: ``update_and_allocate`` after the optimizer, the penalty before it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..bank import Bank
from ..config import IGUConfig
from ..controller import Controller, StepInfo, add_orthogonality
from ..optimizer_watch import overflowed


class Stepper:
    """A controller per adapter, made when AdaLoRA's loop first needs it.

    AdaLoRA adds its penalty to the loss; ours is a gradient in closed form, which must be there when the optimizer steps and carry no loss
    scaler's factor any more. So it is added in a hook that PyTorch's optimizers call before each step. Where the training loop has a
    ``Controller`` of its own, nothing is done here.
    """

    def __init__(self, tuner: Any) -> None:
        self._tuner = weakref.ref(tuner)
        self._controllers: dict[str, Controller] = {}
        self._last: dict[str, int] = {}
        # Since update_and_allocate: training passes when the optimizer last stepped, and how many its step had. Without the second it has
        # not stepped.
        self._passes: dict[str, int] = {}
        self._micro_batches: dict[str, int] = {}
        self._hook: Any = None

    def forget(self, name: str) -> None:
        """An adapter is gone: one that gets its name begins anew."""
        for known in (self._controllers, self._last, self._passes, self._micro_batches):
            known.pop(name, None)

    def _controller(self, name: str, bank: Bank) -> Controller | None:
        """The adapter's controller, if it has one; not that of another adapter which had the name before."""
        controller = self._controllers.get(name)
        if controller is None or controller.bank is bank:
            return controller
        self.forget(name)
        return None

    def watch(self) -> None:
        """Have optimizers call before they step; until the model is gone."""
        if self._hook is not None:
            return
        me = weakref.ref(self)

        def before_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            stepper = me()
            if stepper is not None:
                stepper.before_step(optimizer)

        self._hook = register_optimizer_step_pre_hook(before_step)
        weakref.finalize(self, self._hook.remove)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the orthogonality gradient of each adapter that this optimizer trains and that no other controller steps."""
        tuner = self._tuner()
        if tuner is None:
            return
        held: set[int] | None = None
        for name, bank in getattr(tuner.model, "igulora_banks", {}).items():
            config = tuner.peft_config.get(name)  # None while one is being deleted
            if config is None or not _by_gradient(config):
                continue
            controller = self._controller(name, bank)
            if controller is None and bank.context.controlled:
                continue
            if held is None:
                held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if not any(id(layer.lora_P) in held for layer in bank.layers):
                continue
            bank.refresh()
            if not bank.has_grads:
                continue
            self._micro_batches[name] = bank.context.unstepped - self._passes.get(name, 0)
            self._passes[name] = bank.context.unstepped
            if not config.orthogonality:
                continue
            scale = getattr(
                optimizer, "grad_scale", None
            )  # a fused optimizer takes the loss scaler's factor out itself
            factor = 1.0 if scale is None else scale
            if controller is None:
                add_orthogonality(bank, config, factor)
            else:
                controller.regularise(factor)

    def step(self, global_step: int) -> StepInfo:
        """See :meth:`IGULoraModel.update_and_allocate`."""
        tuner = self._tuner()
        assert tuner is not None
        name = tuner.banks.active_name(tuner.model)
        config = tuner.peft_config[name]
        if not _by_gradient(config):
            raise ValueError(
                f"expected an estimator that needs the training gradient only, got estimator={config.estimator!r}, whose samples need "
                'passes of their own. Use IGULoraConfig(method="adalora"), or step with a controller: ctl = igulora.Controller(model); '
                "loss = ctl.backward(lambda b: model(**b).loss, batch); optimizer.step(); ctl.step()"
            )
        bank = tuner.banks.named(tuner.model, name)
        controller = self._controller(name, bank)
        if controller is None and bank.context.controlled:
            raise ValueError(
                "expected one way of stepping, got update_and_allocate beside an igulora.Controller; call ctl.step() only"
            )
        stepped = name in self._micro_batches
        if controller is None:
            if not stepped and not overflowed(tuner.model):
                raise ValueError(
                    "expected an optimizer step with the adapter's gradients before update_and_allocate, got none; call it after "
                    "optimizer.step() and before optimizer.zero_grad(), with an optimizer of PyTorch that holds the adapter's parameters"
                )
            passes = self._micro_batches[name] if stepped else bank.context.unstepped - self._passes.get(name, 0)
            micro_batches = max(passes, 1)
            start = max(global_step - 1, 0)
            self._controllers[name] = controller = Controller(tuner, accumulation_steps=micro_batches, start_step=start)
            bank.context.unstepped = micro_batches
            controller.regularised_elsewhere()
        elif global_step != self._last[name] + 1:
            raise ValueError(
                f"expected update_and_allocate once after every optimizer step, got step {global_step} after step {self._last[name]}"
            )
        elif not stepped:
            controller.regularised_elsewhere()  # a loss scaler left the step out: nothing to regularise
        info = controller.step()
        self._last[name], self._passes[name] = global_step, 0
        self._micro_batches.pop(name, None)
        return info


def _by_gradient(config: IGUConfig) -> bool:
    return config.adaptive and config.estimator == "instantaneous"
