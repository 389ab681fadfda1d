"""One process: wrappers that are looked through or refused by name, and what processes draw of a joint sample."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import igulora
from igulora.quadrature import Quadrature


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def adapted(net: Callable[..., nn.Module], config: Callable[..., igulora.IGUConfig]) -> nn.Module:
    return igulora.adapt(
        net(), config(modules_to_save=["head"], target_modules=["first", "up", "down"], init="gaussian")
    )


@pytest.mark.usefixtures("process_group")
def test_a_wrapped_model_does_what_the_model_does(adapted: nn.Module, tmp_path: Path) -> None:
    wrapped = {
        "ddp": DistributedDataParallel(adapted),
        "compiled": torch.compile(adapted, backend="eager"),
        "both": torch.compile(DistributedDataParallel(adapted), backend="eager"),
    }
    igulora.save_adapter(adapted, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    with torch.no_grad():
        igulora.find_bank(adapted).lambdas.fill_(1.0)
    igulora.export_peft(adapted, tmp_path / "peft", base_model="net")
    exported = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    with torch.no_grad():
        igulora.find_bank(adapted).lambdas.zero_()
    for name, model in wrapped.items():
        assert igulora.find_bank(model) is igulora.find_bank(adapted)
        assert igulora.Controller(model).model is adapted
        ratios = [[g["lr"] for g in igulora.param_groups(m, lr=1e-3)] for m in (model, adapted)]
        assert ratios[0] == ratios[1] == [1e-3, 1e-3, 1e-3]  # a Gaussian start has one rate for all
        igulora.save_adapter(model, tmp_path / name)
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert saved.keys() == plain.keys()
        assert all(torch.equal(saved[key], plain[key]) for key in plain)
        with torch.no_grad():
            igulora.find_bank(adapted).lambdas.fill_(1.0)
        igulora.export_peft(model, tmp_path / f"{name}-peft", base_model="net")
        again = load_file(tmp_path / f"{name}-peft" / "adapter_model.safetensors")
        assert again.keys() == exported.keys()
        with torch.no_grad():
            igulora.find_bank(adapted).lambdas.zero_()
    assert igulora.remove(wrapped["ddp"]) is adapted
    assert not any("lora" in name for name, _ in adapted.named_parameters())


def test_a_plain_module_is_no_adapted_model(net: Callable[..., nn.Module]) -> None:
    holder = nn.Module()
    holder.module = net()
    with pytest.raises(ValueError, match="adapted by igulora.adapt, got a plain Module"):
        igulora.find_bank(holder)


def fake_engine(model: nn.Module) -> nn.Module:
    """What deepspeed.initialize returns holds the model as ``module``, whatever the ZeRO stage."""
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = model
    return engine


def test_deepspeed_is_refused_by_name(adapted: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="DeepSpeed, got a DeepSpeedEngine; .* use DistributedDataParallel"):
        igulora.Controller(fake_engine(adapted))
    state = pytest.importorskip("accelerate.state")
    with monkeypatch.context() as patched:
        patched.setitem(state.AcceleratorState._shared_state, "distributed_type", state.DistributedType.DEEPSPEED)
        with pytest.raises(ValueError, match="an Accelerator without DeepSpeed"):
            igulora.Controller(adapted)
    param = igulora.find_bank(adapted).layers[1].lora_Q
    for mark in ("ds_id", "_hp_mapping"):  # stage 3; stages 1 and 2
        setattr(param, mark, 3)
        with pytest.raises(ValueError, match=r"body.up.lora_Q partitioned by DeepSpeed ZeRO"):
            igulora.Controller(adapted)
        delattr(param, mark)
    igulora.Controller(adapted)


def test_data_parallel_in_one_process_is_refused(adapted: nn.Module) -> None:
    """nn.DataParallel; transformers' Trainer puts it around a model where one process sees several GPUs."""
    with pytest.raises(ValueError, match="one process per device, got a model in nn.DataParallel"):
        igulora.Controller(nn.DataParallel(adapted))


def test_sharding_needs_processes_and_an_adapter(adapted: nn.Module, net: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match="an initialised process group, got none; .*torchrun"):
        igulora.distributed.shard(adapted)
    with pytest.raises(ValueError, match="adapted by igulora.adapt"):
        igulora.distributed.shard(net())
    with pytest.raises(ValueError, match="a model of igulora.distributed.shard"), igulora.distributed.no_sync(adapted):
        pass


@pytest.mark.usefixtures("process_group")
def test_one_process_may_be_written_as_many(adapted: nn.Module, batches: Any, tmp_path: Path) -> None:
    """FSDP2 with one process: sharding, training, merging, and the plain model back."""
    model = igulora.distributed.shard(adapted)
    ctl = igulora.Controller(model)
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))
    for batch in batches(8):
        ctl.backward(lambda b: (model(b[0]) - b[1]).square().mean(), batch)
        optimizer.step()
        ctl.step()
        optimizer.zero_grad()
    x = torch.randn(3, 8)
    with torch.no_grad():
        before = model(x)
        plain = igulora.remove(igulora.merge(model))
        torch.testing.assert_close(plain(x), before)
    assert "igulora_averaging" not in vars(plain)


ESTIMATORS = ("gauss", "stratified", "trapezoid", "on-path-stratified")


def draws(
    config: igulora.IGUConfig, rows: list[int], rank: int = 0, processes: int = 1
) -> list[list[tuple[float, float]]]:
    """(alpha, factor) of each row of each micro-batch of this process."""
    quadrature = Quadrature(config, SimpleNamespace(count=processes, rank=rank))  # type: ignore[arg-type]
    drawn = []
    for i, size in enumerate(rows):
        if config.estimator == "on-path-stratified":
            drawn.append([(alpha, 1.0) for alpha in quadrature.on_path(size)])
        else:
            assert quadrature.rows_of(size) == list(range(size))
            sample = quadrature.sample(size)
            drawn.append(list(zip(sample.alphas[0], sample.factors[0], strict=True)))
        if (i + 1) % config.window == 0:
            quadrature.next_window()
    return drawn


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_processes_share_the_nodes_of_the_joint_batch(estimator: str, processes: int, config: Any) -> None:
    options = config(estimator=estimator, ig_fraction=1.0, window=3, t_init=9)
    own = [draws(options, [2] * 9, rank, processes) for rank in range(processes)]
    joint = draws(options, [2 * processes] * 9)
    assert [list(itertools.chain(*parts)) for parts in zip(*own, strict=True)] == joint
    assert len({alpha for micro in joint for alpha, _ in micro}) > 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_uneven_batch_puts_processes_out_of_step_for_a_window_only(estimator: str, config: Any) -> None:
    options = config(estimator=estimator, ig_fraction=1.0, window=3, t_init=9)
    own = [draws(options, sizes, rank, 2) for rank, sizes in enumerate(([4] * 9, [4, 1, 4, *[4] * 6]))]
    joint = draws(options, [8] * 9)
    assert [list(itertools.chain(*parts)) for parts in zip(*own, strict=True)][3:] == joint[3:]


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_each_process_samples_as_many_of_its_own_rows(fraction: float, config: Any) -> None:
    counts = torch.zeros(2, 8)
    for seed in range(200):
        for rank in range(2):
            quadrature = Quadrature(config(ig_fraction=fraction, seed=seed), SimpleNamespace(count=2, rank=rank))  # type: ignore[arg-type]
            rows = quadrature.rows_of(8)
            assert rows == sorted(set(rows))
            assert len(rows) == 8 * fraction
            counts[rank, rows] += 1
    expected = 200 * fraction
    assert ((counts - expected).abs() < 5 * (expected * (1 - fraction)) ** 0.5).all(), counts


def test_windows_draw_afresh(config: Any) -> None:
    """Seeds of windows do not repeat those of other runs."""
    first = [draws(config(estimator="stratified", ig_fraction=1.0, seed=s), [4] * 40) for s in range(3)]
    assert len({str(micro) for run in first for micro in run}) == 120


@pytest.mark.usefixtures("process_group")
def test_a_replicated_model_of_one_process_may_be_copied_and_pickled(adapted: nn.Module, batches: Any) -> None:
    model = igulora.distributed.replicate(adapted)
    ctl = igulora.Controller(model)
    twin, again = copy.deepcopy((model, ctl))
    for net, controller in ((twin, again), pickle.loads(pickle.dumps((model, ctl)))):
        assert igulora.distributed.find_averaging(net) is not igulora.distributed.find_averaging(model)
        with igulora.distributed.no_sync(net):
            controller.backward(lambda b, net=net: (net(b[0]) - b[1]).square().mean(), batches(1)[0])
        controller.step()
        assert (controller.global_step, ctl.global_step) == (1, 0)


def test_wrappers_are_refused_whichever_module_of_peft_is_given() -> None:
    peft = pytest.importorskip("peft")
    from igulora.peft import IGULoraConfig

    config = IGULoraConfig(r=4, target_rank=2, total_steps=40, t_init=12, t_final=8, window=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    igulora.Controller(model)
    igulora.find_bank(model).layers[0].lora_Q.ds_id = 3
    for part in (model, model.base_model, model.base_model.model):
        with pytest.raises(ValueError, match=r"0.lora_Q partitioned by DeepSpeed ZeRO"):
            igulora.Controller(part)
