"""One process of a distributed test: ``python worker.py FOLDER RANK PROCESSES`` runs the scenarios that FOLDER/scenarios.json lists.

What a scenario returns lies in FOLDER/<scenario>.<rank>.safetensors; the tests import this file, too, for the same run in one process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import igulora
from igulora.checkpoint import load_checkpoint, save_checkpoint

STEPS, ROWS, WIDTH = 20, 8, 6
SCHEDULE: dict[str, Any] = {
    "r": 4, "target_rank": 2, "total_steps": STEPS, "t_init": 7, "t_final": 5, "delta_t": 2, "window": 2, "ig_every": 1,
    "ig_fraction": 1.0, "init": "orthonormal", "init_lambda": 0.3,
}  # fmt: skip


class Block(nn.Module):
    """A residual block with projections that share their input, as a transformer's do."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.q_proj(x)) * torch.sigmoid(self.k_proj(x)) + self.v_proj(x))


class Model(nn.Module):
    """Two blocks between linear layers, in float64: what should be equal is equal to 1e-9. ``recompute`` checkpoints the blocks."""

    def __init__(self, recompute: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        self.recompute = recompute
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, use_reentrant=self.recompute == "reentrant")
            else:
                x = block(x)
        return self.head(x)


def rows(step: int, count: int = ROWS) -> tuple[Tensor, Tensor]:
    """The joint batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = torch.randn(count, WIDTH, generator=generator), torch.randn(count, 3, generator=generator)
    return x.double(), y.double()


def own(batch: Any, rank: int, processes: int, counts: list[int] | None = None) -> Any:
    """The rows of one process: equal parts, or ``counts`` by rank."""
    size = len(batch[0])
    counts = counts or [size // processes] * processes
    first = sum(counts[:rank])
    return tuple(t[first : first + counts[rank]] for t in batch)


class Reductions:
    """Counts all-reduces asked for from Python, which DistributedDataParallel's own are not, and how many numbers each took."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __enter__(self) -> Reductions:
        self._real = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel())
            return self._real(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._real


def outcome(ctl: igulora.Controller, losses: list[float], **more: Tensor) -> dict[str, Tensor]:
    """What two runs are compared by."""
    return {
        "weight": ctl.bank.weight,
        "live": ctl.bank.live,
        "mask": ctl.bank.mask,
        "mean": ctl.importance.mean,
        "deviation": ctl.importance.deviation,
        "losses": torch.tensor(losses, dtype=torch.float64),
        **more,
    }


def ddp(
    rank: int,
    processes: int,
    *,
    config: dict[str, Any] | None = None,
    wrap: dict[str, Any] | None = None,
    recompute: str | None = None,
    uneven: list[int] | None = None,
    joint_mean: bool = True,
    accumulation: int = 1,
    no_sync: bool = False,
    inner: bool = False,
    fully_sharded: bool = False,
) -> dict[str, Tensor]:
    """A run of ``STEPS`` steps, by DistributedDataParallel or FSDP2; of one process on the joint batch where ``processes`` is 1.

    Args:
        uneven: rows by rank of every fifth joint batch, the last of an epoch, weighed by ``joint_mean``.
        inner: the controller is given the model itself, not its wrapper.
    """
    model = igulora.adapt(Model(recompute), igulora.IGUConfig(**{**SCHEDULE, **(config or {})}))
    replica: Any = model
    if processes > 1 and fully_sharded:
        igulora.distributed.shard(model)
    elif processes > 1:
        replica = DistributedDataParallel(model, **(wrap or {}))
    ctl = igulora.Controller(
        model if inner else replica, accumulation_steps=accumulation, joint_mean=joint_mean and uneven is not None
    )
    optimizer = torch.optim.AdamW(igulora.param_groups(replica, lr=3e-2, lambda_lr_ratio=1.0))
    ctl.optimizer = optimizer
    losses: list[float] = []

    def loss_fn(batch: Any) -> Tensor:
        return (replica(batch[0]) - batch[1]).square().mean()

    with Reductions() as reductions:
        for step in range(STEPS):
            loss = 0.0
            for micro in range(accumulation):
                joint = rows(step * accumulation + micro)
                counts = uneven if uneven is not None and step % 5 == 4 else None
                if counts is not None:
                    joint = tuple(t[: sum(counts)] for t in joint)
                batch = own(joint, rank, processes, counts) if processes > 1 else joint
                if processes > 1 and no_sync and micro < accumulation - 1:
                    manager = igulora.distributed.no_sync(model) if fully_sharded else replica.no_sync()
                    with manager:
                        value = ctl.backward(loss_fn, batch)
                else:
                    value = ctl.backward(loss_fn, batch)
                weight = 1.0 if counts is None or processes == 1 else counts[rank] * processes / sum(counts)
                loss += float(value) * weight / accumulation
            losses.append(loss)
            optimizer.step()
            ctl.step()
            optimizer.zero_grad()
    return outcome(ctl, losses, reduced=torch.tensor(reductions.sizes or [0]))


def resumed(
    rank: int,
    processes: int,
    *,
    folder: str,
    load: bool = False,
    save_at: int | None = None,
    config: dict[str, Any] | None = None,
    stop: int = STEPS,
    every: int = 0,
    die_at_rename: int = 0,
    pause: float = 0.0,
) -> dict[str, Tensor]:
    """A DistributedDataParallel run that saves checkpoints, or goes on from the newest complete one in ``folder``.

    Args:
        save_at: after this step, once. every: or after every so many.
        die_at_rename: the first process kills itself in its n-th rename of a file, so while it saves.
    """
    model = igulora.adapt(Model(), igulora.IGUConfig(**{**SCHEDULE, **(config or {})}))
    torch.manual_seed(rank)  # dropout differs between the processes
    replica = DistributedDataParallel(model) if processes > 1 else model
    ctl = igulora.Controller(replica)
    optimizer = torch.optim.AdamW(igulora.param_groups(replica, lr=3e-2, lambda_lr_ratio=1.0))
    losses, first, root = [], 0, Path(folder)
    if load:
        complete = [path for path in root.glob("step-*") if (path / "checkpoint.json").is_file()]
        newest = max(complete, key=lambda path: int(path.name.partition("-")[2]))
        first = load_checkpoint(newest, replica, optimizer, ctl)["step"]
    if die_at_rename and rank == 0:
        _die_at(die_at_rename)
    for step in range(first, stop):
        batch = own(rows(step), rank, processes)
        losses.append(float(ctl.backward(lambda b: (replica(b[0]) - b[1]).square().mean(), batch)))
        optimizer.step()
        ctl.step()
        optimizer.zero_grad()
        done = step + 1
        if done == save_at or (every and done % every == 0):
            save_checkpoint(root / f"step-{done}", replica, optimizer, ctl, {"step": done})
        time.sleep(pause)
    return outcome(ctl, losses, first=torch.tensor(first))


def _die_at(rename: int) -> None:
    real, calls = os.replace, 0

    def replace(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == rename:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args, **kwargs)

    os.replace = replace


def fsdp_whole(rank: int, processes: int, *, folder: str) -> dict[str, Tensor]:
    """A trained head beside the adapters; then merging, saving and unmerging with the base sharded."""
    model = igulora.adapt(Model(), igulora.IGUConfig(**{**SCHEDULE, "modules_to_save": ["head"]}))
    if processes > 1:
        igulora.distributed.shard(model)
        assert type(model.first.base_layer.weight).__name__ == "DTensor"
        assert type(model.first.lora_P.data) is Tensor
    ctl = igulora.Controller(model)
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=3e-2, lambda_lr_ratio=1.0))
    losses = []
    for step in range(STEPS):
        batch = own(rows(step), rank, processes)
        losses.append(float(ctl.backward(lambda b: (model(b[0]) - b[1]).square().mean(), batch)))
        optimizer.step()
        ctl.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        x = rows(0)[0]
        trained = model(x)
        igulora.save_adapter(model, folder)  # every process calls it, one writes
        igulora.merge(model)
        merged = model(x)
        igulora.unmerge(model)
        unmerged = model(x)
        with igulora.adapters_disabled(model):
            plain = model(x)
    return outcome(
        ctl, losses, head=model.head.module.weight, trained=trained, merged=merged, unmerged=unmerged, plain=plain
    )


def refusals(rank: int, processes: int) -> dict[str, Tensor]:
    """What cannot work says so, in every process, before anything waits for another."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def adapted() -> nn.Module:
        return igulora.adapt(Model(), igulora.IGUConfig(**SCHEDULE))

    model = adapted()
    fully_shard(model)
    with raises("replicated in every process, got first.lora_P sharded"):
        igulora.Controller(model)
    model = adapted()
    fully_shard(model, ignored_params=igulora.distributed.replicated_parameters(model))
    with raises("igulora.distributed.replicate"):
        igulora.Controller(model)
    with raises("not sharded, got one with FSDP2"):
        igulora.distributed.shard(model)
    igulora.Controller(igulora.distributed.replicate(model))
    with raises("FSDP1"):
        igulora.Controller(FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=torch.device("cpu")))
    model = adapted()
    inside = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with raises("flattened by a wrapper"):
        igulora.Controller(model)
    del inside
    replica = DistributedDataParallel(adapted())
    ctl = igulora.Controller(replica)
    with replica.join(), raises("join"):
        ctl.backward(lambda b: (replica(b[0]) - b[1]).square().mean(), own(rows(0), rank, processes))
    model = igulora.distributed.shard(adapted())
    ctl = igulora.Controller(model)
    with igulora.distributed.no_sync(model):
        ctl.backward(lambda b: (model(b[0]) - b[1]).square().mean(), own(rows(0), rank, processes))
    with raises("the processes' weights have parted"):
        ctl.step()
    with raises("no_sync() of its own"), igulora.distributed.no_sync(replica):
        pass
    return {"done": torch.ones(1)}


@contextmanager
def raises(text: str) -> Iterator[None]:
    """As pytest.raises: a ValueError whose message holds one of the texts between bars."""
    try:
        yield
    except ValueError as error:
        if not any(part in str(error) for part in text.split("|")):
            raise
    else:
        raise AssertionError(f"expected a ValueError with {text!r}, got none")


def accelerated(
    rank: int, processes: int, *, accumulation: int = 1, rows_in_all: int = ROWS * STEPS
) -> dict[str, Tensor]:
    """accelerate prepares model, optimizer and loader; one process gets the joint batches."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.utils.data import DataLoader, TensorDataset

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    assert accelerator.num_processes == processes
    joint = [rows(step) for step in range(STEPS * accumulation)]
    data = TensorDataset(*(torch.cat(parts)[: rows_in_all * accumulation] for parts in zip(*joint, strict=True)))
    model = igulora.adapt(Model(), igulora.IGUConfig(**SCHEDULE))
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=3e-2, lambda_lr_ratio=1.0))
    loader = DataLoader(data, batch_size=ROWS // processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ctl = igulora.Controller(model, accumulation_steps=accumulation)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            losses.append(float(ctl.backward(lambda b: (model(b[0]) - b[1]).square().mean(), batch)))
            optimizer.step()
            if accelerator.sync_gradients:
                ctl.step()
            optimizer.zero_grad()
    return outcome(ctl, losses, steps=torch.tensor(ctl.global_step))


def language(
    rank: int, processes: int, *, fully_sharded: bool = False, recompute: bool = False, joint_mean: bool = True
) -> dict[str, Tensor]:
    """A tiny Llama whose rows have unequal numbers of tokens to predict, weighed by ``joint_mean``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads)).double()
    igulora.adapt(model, igulora.IGUConfig(**{**SCHEDULE, "estimator": "trapezoid", "nodes": 5}))
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    replica: Any = model
    if processes > 1 and fully_sharded:
        igulora.distributed.shard(model)
    elif processes > 1:
        replica = DistributedDataParallel(model)
    ctl = igulora.Controller(replica, joint_mean=joint_mean)
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-2, lambda_lr_ratio=1.0))
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(32, (4, 9), generator=generator)
        asked = torch.arange(9) >= torch.tensor([7, 4, 1, 0]).unsqueeze(1)
        labels = ids.where(asked, -100)
        mine = own((ids, labels), rank, processes)
        terms = (mine[1][:, 1:] != -100).sum() / (labels[:, 1:] != -100).sum()
        loss = ctl.backward(lambda b: replica(**b).loss, {"input_ids": mine[0], "labels": mine[1]})
        losses.append(float(loss * terms) * processes)
        optimizer.step()
        ctl.step()
        optimizer.zero_grad()
    return outcome(ctl, losses)


def aligned(rank: int, processes: int) -> dict[str, Tensor]:
    """The first process measures and all have its answer, or its error; what the others' batches hold does not matter."""

    def measured(broken: int | None) -> dict[str, int]:
        model, batches = Model(), [own(rows(step), rank, processes) for step in range(3)]
        if rank == broken:
            batches[1] = tuple(t * torch.nan for t in batches[1])
        return igulora.align(model, batches, lambda b: (model(b[0]) - b[1]).square().mean(), r=1).layers

    found = measured(1)
    with raises("got NaN or infinity for 'first'"):
        measured(0)
    return {name: torch.tensor([layer.dimensionality, layer.sensitivity]) for name, layer in found.items()}


SCENARIOS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "ddp": ddp, "resumed": resumed, "fsdp_whole": fsdp_whole, "refusals": refusals, "language": language, "accelerated": accelerated,
    "aligned": aligned,
}  # fmt: skip


def main(folder: Path, rank: int, processes: int) -> None:
    """Run the scenarios in one process group; a failure ends this process at once, so that nobody waits for it."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
        for name, (kind, options) in json.loads((folder / "scenarios.json").read_text()).items():
            sys.stderr.write(f"{name}\n")
            tensors = SCENARIOS[kind](rank, processes, **options)
            ready = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
            save_file(ready, folder / f"{name}.{rank}.safetensors")
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
