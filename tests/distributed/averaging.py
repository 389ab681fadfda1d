"""One of two processes: ``python averaging.py FOLDER`` trains models whose gradients igulora averages, in ways that differ."""

from __future__ import annotations

import copy
import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import igulora
from igulora import distributed
from igulora.checkpoint import load_checkpoint, save_checkpoint

OPTIONS: dict[str, Any] = {
    "r": 4, "target_rank": 2, "total_steps": 24, "t_init": 8, "t_final": 6, "window": 2, "init_lambda": 0.1,
    "target_modules": ["first", "second", "idle"],
}  # fmt: skip


@dataclass
class Output:
    """An output that PyTorch's pytrees do not know."""

    loss: Tensor


class Model(nn.Module):
    """Returns its loss, in an object or bare. Each process has a layer that the other one leaves idle; all have one in common."""

    def __init__(self, *, wrapped: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.idle = (nn.Linear(8, 8) for _ in range(3))
        self.wrapped, self.reentrant = wrapped, reentrant

    def forward(self, x: Tensor) -> Any:
        loss = self.body(x)
        return Output(loss) if self.wrapped else loss

    def body(self, x: Tensor) -> Tensor:
        if self.reentrant:
            x = x.requires_grad_()
            x = checkpoint(self.first, x, use_reentrant=True)
        else:
            x = self.first(x)
        own = self.second if dist.get_rank() else self.idle
        return own(torch.tanh(x)).square().mean()


def counted(run: Callable[[], Any]) -> int:
    """How often ``run`` averages gradients."""
    calls, average = [], distributed.average_gradients

    def counting(*args: Any) -> None:
        calls.append(args)
        average(*args)

    distributed.average_gradients = counting
    try:
        run()
    finally:
        distributed.average_gradients = average
    return len(calls)


def train(model: nn.Module, loss: Callable[[Tensor], Tensor], passes: int, steps: int = 24) -> Tensor:
    """The adapters' weights after ``steps``, each with ``passes`` averagings per micro-batch."""
    ctl = igulora.Controller(model)
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=3e-2))
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        x = torch.randn(4, 8, generator=generator)
        assert counted(lambda x=x: ctl.backward(loss, x)) == passes
        optimizer.step()
        ctl.step()
        optimizer.zero_grad()
    return ctl.bank.weight


def adapted(**options: Any) -> Any:
    """A new model, its gradients averaged."""
    return distributed.replicate(igulora.adapt(Model(**options), igulora.IGUConfig(**OPTIONS)))


def outputs() -> dict[str, Tensor]:
    """However the loss comes out of the model, one averaging per backward pass and equal weights."""
    found = {}
    for path_pass in ("mixed", "separate"):
        OPTIONS["path_pass"] = path_pass
        model = adapted()
        found[f"bare {path_pass}"] = train(model, model, 1)
        model = adapted(wrapped=True)
        found[f"object {path_pass}"] = train(model, lambda x, model=model: model(x).loss, 1)
        model = adapted()
        found[f"part {path_pass}"] = train(model, lambda x, model=model: model.first(x).square().mean(), 1)
    model = adapted(reentrant=True)
    found["reentrant checkpoints"] = train(model, model, 1)
    return found


def failures() -> dict[str, Tensor]:
    """A backward pass that fails holds none of the next ones up; a step without an average is refused."""
    model = adapted()
    x = torch.ones(4, 8)

    def fail(_grad: Tensor) -> None:
        raise RuntimeError("as out of memory")

    hidden = model.first(x)
    hidden.register_hook(fail)
    with pytest.raises(RuntimeError, match="as out of memory"):
        (hidden.square().mean() + model.second(x).square().mean()).backward()
    model.zero_grad()
    weight = train(model, lambda x: model.first(x).square().mean(), 1, steps=4)

    ctl = igulora.Controller(model)
    distributed.find_averaging(model).stop()  # as if no hook were met
    ctl.backward(model, x)
    with pytest.raises(ValueError, match="gradients that were not averaged"):
        ctl.step()
    return {"after a failure": weight}


def groups() -> dict[str, Tensor]:
    """The Controller's processes are those that gradients are averaged over; one process alone may copy its model."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    model = igulora.adapt(Model(), igulora.IGUConfig(**OPTIONS))
    distributed.replicate(model, alone)
    ctl = igulora.Controller(model)
    assert ctl.processes.count == 1
    with pytest.raises(ValueError, match="expected the process group that gradients are averaged over"):
        igulora.Controller(model, process_group=dist.group.WORLD)
    igulora.Controller(model, process_group=alone)
    twin, again = copy.deepcopy((model, ctl))
    assert again.processes.group is alone
    x = torch.full((4, 8), 1.0 + dist.get_rank())
    again.backward(twin, x)
    again.step()
    assert not any(p.grad.any() for p in ctl.bank.layers[0].parameters() if p.grad is not None)

    both = adapted()
    assert igulora.Controller(both, process_group=dist.group.WORLD).processes.count == 2
    with pytest.raises(TypeError, match="expected a model of one process to copy"):
        copy.deepcopy(both)
    return {}


def checkpoints(folder: Path) -> dict[str, Tensor]:
    """Saved inside a step of which the processes have counted different numbers of passes."""
    config = igulora.IGUConfig(**{**OPTIONS, "path_pass": "separate"})

    def start() -> tuple[nn.Module, igulora.Controller, torch.optim.Optimizer]:
        model = distributed.replicate(igulora.adapt(Model(), config))
        return model, igulora.Controller(model, accumulation_steps=2), torch.optim.SGD(model.parameters(), lr=0.1)

    model, ctl, optimizer = start()
    x = torch.full((4, 8), 1.0 + dist.get_rank())
    with distributed.no_sync(model):
        ctl.backward(model, x)
    ctl.bank.context.unstepped = dist.get_rank()  # what a process counts whose first layer was not called
    save_checkpoint(folder / "checkpoint", model, optimizer, ctl)
    assert ctl.bank.grad.any()
    other, ctl, optimizer = start()
    load_checkpoint(folder / "checkpoint", other, optimizer, ctl)
    assert ctl.bank.context.unstepped == 1
    ctl.bank.bind_grads()
    grad = ctl.bank.grad.clone()
    assert torch.equal(grad, igulora.find_bank(model).grad)
    optimizer.step()
    ctl.step()  # its gradients were averaged before
    return {"saved gradient": grad, "saved": ctl.bank.weight}


def peft() -> dict[str, Tensor]:
    """Whichever of PEFT's three modules is asked, the answer is the same."""
    from peft import get_peft_model

    from igulora.peft import IGULoraConfig

    found = {}
    for given in range(3):
        model = get_peft_model(Model(), IGULoraConfig(**OPTIONS))
        parts = [model, model.base_model, model.base_model.model]
        distributed.replicate(parts[given])
        for part in parts:
            assert distributed.find_averaging(part) is distributed.find_averaging(model) is not None
            assert igulora.Controller(part).processes.count == 2
        found[f"peft {given}"] = train(parts[-given], model, 1)
        with distributed.no_sync(parts[-given]):
            assert counted(lambda model=model: model(torch.ones(2, 8)).backward()) == 0
        base = model.unload()
        assert "igulora_averaging" not in vars(base)
        assert not base._forward_hooks
    return found


def main(folder: Path) -> None:
    """Run all; what both processes should hold alike lies in FOLDER/<rank>.safetensors."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    tensors = {**outputs(), **failures(), **groups(), **checkpoints(folder), **peft()}
    save_file({k: v.detach().clone() for k, v in tensors.items()}, folder / f"{dist.get_rank()}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
