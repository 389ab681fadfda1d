"""Bank: parameters stay views of the flat buffers through casts, copies, loading and zero_grad; the row table is right."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import igulora
from igulora import find_bank
from igulora.bank import PARTS


def assert_packed(model: nn.Module) -> None:
    """Every parameter, gradient and mask is a view of its flat buffer, where the layout says."""
    bank = find_bank(model)
    bank.bind_grads()
    values, grads = bank.matrix_views(bank.weight), bank.matrix_views(bank.grad)
    for i, (name, layer) in enumerate(zip(bank.names, bank.layers, strict=True)):
        for part in ("lora_P", "lora_E", "lora_Q"):
            param = getattr(layer, part)
            if not param.numel():
                continue
            assert param.data_ptr() == values[name, part].data_ptr()
            assert param.shape == values[name, part].shape
            assert param.grad.data_ptr() == grads[name, part].data_ptr()
        assert torch.equal(layer.mask, bank.mask[bank.starts[i] : bank.starts[i + 1]])
        if layer.r:
            assert layer.mask.data_ptr() == bank.mask[bank.starts[i] :].data_ptr()
    assert dict(model.named_modules())[bank.names[0]] is bank.layers[0]


@pytest.fixture
def adapted(net, config) -> Callable[..., nn.Module]:
    """A model of mixed ranks, rank 0 among them, with values everywhere."""

    def make(**changes: Any) -> nn.Module:
        model = igulora.adapt(net(), config(rank_pattern={"up": 0, "head": 3}, **changes))
        for layer in model.igulora_bank.layers:
            nn.init.normal_(layer.lora_E, generator=torch.Generator().manual_seed(3))
        return model

    return make


def test_layout(adapted) -> None:
    bank = adapted().igulora_bank
    table, seen = bank.row_table, torch.zeros(bank.weight.numel(), dtype=torch.int64)
    values = torch.arange(bank.weight.numel(), dtype=torch.float32)
    assert bank.triplets == 4 + 0 + 4 + 3
    assert table.shape == (3 * bank.triplets, 3)
    for offset, length, _ in table.tolist():
        seen[offset : offset + length] += 1
    assert int(seen.max()) == 1  # no two rows overlap
    assert int(seen.sum()) == sum(
        p.numel() for layer in bank.layers for p in (layer.lora_P, layer.lora_E, layer.lora_Q)
    )
    # Row k of the table is row i of the matrix it names, and its triplet is that layer's i-th.
    by_offset = {int(o): (int(n), int(t)) for o, n, t in table.tolist()}
    for (name, _), view in bank.matrix_views(values).items():
        start = bank.starts[bank.names.index(name)]
        rows = view.view(view.shape[0], -1) if view.numel() else []
        for i, row in enumerate(rows):
            assert by_offset[int(row[0])] == (row.numel(), start + i)
    # One lambda, one p and one q per triplet, each with a slot of its own.
    assert sorted(bank.slots.tolist()) == list(range(3 * bank.triplets))
    assert torch.equal(bank.slots % bank.triplets, table[:, 2])
    parts = {(name, part): k for (name, part) in bank.matrix_views(values) for k, p in enumerate(PARTS) if p == part}
    rows_of = {
        int(row[0]): parts[key]
        for key, view in bank.matrix_views(values).items()
        if view.numel()
        for row in view.view(view.shape[0], -1)
    }
    assert [int(s) // bank.triplets for s in bank.slots] == [rows_of[int(o)] for o in table[:, 0]]
    assert bank.layer_index.tolist() == [0] * 4 + [2] * 4 + [3] * 3
    assert bank.cost.tolist() == [20] * 4 + [22] * 4 + [15] * 3
    # The operators' regions cover the same rows in the same order.
    regions = bank.layout.regions
    rows = [
        (regions[i] + j * regions[i + 2], regions[i + 2])
        for i in range(0, len(regions), 3)
        for j in range(regions[i + 1])
    ]
    assert rows == [(o, n) for o, n, _ in table.tolist()]
    assert all(offset % 64 == 0 for offset in regions[::3])
    # What the kernels walk over is the same rows with their slots, and every matrix.
    assert torch.equal(bank.score_table, torch.column_stack((table[:, :2], bank.slots)))
    heads = {(offset, rank, length) for offset, rank, length, *_ in bank.matrix_table.tolist()}
    assert heads == {(s.offset, s.rows, s.length) for s in bank.layout.slices if s.name != "lora_E" and s.rows}
    matrices = sum(bank.layout.groups[1::4])
    assert matrices == 2 * 3


def test_all_ranks_zero(net, config, run, trainer, batches) -> None:
    model = igulora.adapt(net(), config(r=0, target_rank=0))
    assert model.igulora_bank.triplets == 0
    assert_packed(model)


def casts() -> dict[str, Callable[[nn.Module], Any]]:
    def reload(model: nn.Module, **options: Any) -> None:
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, **options)

    return {
        "bfloat16": lambda m: m.to(torch.bfloat16),
        "half": lambda m: m.half(),
        "double": lambda m: m.double(),
        "there and back": lambda m: m.half().float(),
        "cpu": lambda m: m.to("cpu"),
        "load": reload,
        "assign": lambda m: reload(m, assign=True),
        "apply": lambda m: m._apply(lambda t: t.clone()),
        "share_memory": lambda m: m.share_memory(),
    }


@pytest.mark.parametrize("name", list(casts()))
def test_views_survive(adapted, loss_of, batches, name) -> None:
    model = adapted()
    bank = model.igulora_bank
    held = {k: v.detach().clone() for k, v in model.named_parameters() if "lora" in k}
    loss_of(model)(batches(1)[0]).backward()
    grad, live = bank.grad.clone(), bank.live.clone()
    casts()[name](model)
    assert_packed(model)
    for key, value in held.items():
        now = model.get_parameter(key)
        assert torch.equal(now.to(value.dtype), value), key
        assert now.requires_grad
    assert bank is model.igulora_bank
    if name != "assign":  # new parameters start without gradients
        assert torch.equal(bank.grad.to(grad.dtype), grad)
    assert torch.equal(bank.live.to(live.dtype), live)


def twins() -> dict[str, Callable[[nn.Module], nn.Module]]:
    def through_torch_save(model: nn.Module) -> nn.Module:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "torch.save": through_torch_save,
        "deepcopy inside": lambda m: copy.deepcopy(nn.Sequential(m))[0],
    }


@pytest.mark.parametrize("name", list(twins()))
def test_twins_are_equal_and_apart(adapted, batches, loss_of, name) -> None:
    model = adapted()
    model.igulora_bank.live[1] = 0.0
    model.igulora_bank.path.fill_(2.0)
    x = batches(1)[0][0]
    twin = twins()[name](model)
    assert torch.equal(twin(x), model(x))
    assert twin.igulora_config == model.igulora_config
    assert_packed(twin)
    assert_packed(model)
    bank, other = find_bank(model), find_bank(twin)
    assert bank is not other
    assert torch.equal(other.weight, bank.weight)
    assert torch.equal(other.live, bank.live)
    assert torch.equal(other.path, bank.path)
    assert other.context is twin.first.context
    assert other.context is not bank.context
    other.weight.add_(1)
    loss_of(twin)(batches(1)[0]).backward()
    assert torch.count_nonzero(bank.grad) == 0
    assert float(bank.path.min()) == float(bank.path.max()) == 2.0


def test_pickle_holds_each_row_once(net, config) -> None:
    def size(r: int) -> int:
        model = igulora.adapt(net(), config(r=r, target_rank=2))
        return len(pickle.dumps(model))

    stored = 4 * (12 + 8 + 10 + 12 + 12 + 10 + 3 + 12 + 4 * 3)  # bytes a rank adds: rows, lambdas, masks, live
    assert size(200) - size(100) < 1.1 * 100 * stored


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("where", ["optimizer", "model"])
def test_zero_grad(adapted, trainer, batches, loss_of, set_to_none, where) -> None:
    model = adapted()
    optimizer = torch.optim.SGD(igulora.param_groups(model, lr=1e-2))
    controller = igulora.Controller(model)
    bank = model.igulora_bank
    grads = []
    for _ in range(2):
        controller.backward(loss_of(model), batches(1)[0])
        assert_packed(model)
        grads.append(bank.grad.clone())
        controller.step()
        (optimizer if where == "optimizer" else model).zero_grad(set_to_none=set_to_none)
    assert torch.equal(*grads)
    assert torch.count_nonzero(grads[0]) > 0


def test_gradients_made_outside_the_bank_are_kept(adapted, batches, loss_of) -> None:
    model = adapted()
    bank = model.igulora_bank
    loss_of(model)(batches(1)[0]).backward()
    expected = bank.grad.clone()
    model.zero_grad(set_to_none=True)
    loss_of(model)(batches(1)[0]).backward()  # new gradient tensors of autograd's own
    bank.bind_grads()
    assert torch.equal(bank.grad, expected)
    assert_packed(model)


INTERRUPTIONS = {
    "bfloat16 and back": lambda m: m.to(torch.bfloat16).to(torch.float32) and None,
    "reload": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())) and None,
    "to cpu": lambda m: m.to("cpu") and None,
    "deepcopy elsewhere": lambda m: copy.deepcopy(m) and None,
    "pickle elsewhere": lambda m: pickle.dumps(m) and None,
    "repack": lambda m: m.igulora_bank.repack(),
}


@pytest.mark.parametrize("estimator", ["gauss", "instantaneous"])
@pytest.mark.parametrize("name", list(INTERRUPTIONS))
@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_goes_on_the_same(net, config, trainer, run, batches, estimator, name, set_to_none) -> None:
    """An interruption in the middle of a window, and again after pruning has begun, changes no bit."""
    runs = []
    for interrupted in (False, True):
        model, controller, optimizer = trainer(net(), config(estimator=estimator, window=3, t_init=10))
        for p in (p for m in model.igulora_bank.layers for p in m.base_layer.parameters()):
            p.data = p.data.bfloat16().float()  # so that a cast of the base loses nothing
        losses, data = [], batches(18)
        for start, stop in ((0, 4), (4, 13), (13, 18)):
            losses += run(model, controller, optimizer, data[start:stop], set_to_none=set_to_none)
            if interrupted:
                INTERRUPTIONS[name](model)
        bank = find_bank(model)
        runs.append((losses, bank.weight.clone(), bank.live.clone(), controller.importance.mean.clone()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1:], runs[1][1:], strict=True))


def test_a_copy_trains_on_as_the_original(net, config, trainer, run, batches) -> None:
    model, _, _ = trainer(net(), config())
    runs = []
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        optimizer = torch.optim.AdamW(igulora.param_groups(twin, lr=1e-2))
        losses = run(twin, igulora.Controller(twin), optimizer, batches(12))
        runs.append((losses, find_bank(twin).weight.clone()))
    for other in runs[1:]:
        assert other[0] == runs[0][0]
        assert torch.equal(other[1], runs[0][1])
