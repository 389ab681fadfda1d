"""The re-implemented release computes what igulora computes with the release's settings, and launches what the release launches."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import igulora
from igulora.benchmarks.cases import CASES, MODELS
from igulora.benchmarks.methods import METHODS, Release, ReleaseFinal
from igulora.benchmarks.methods.release import ReleaseLinear, last_charged
from igulora.benchmarks.models import load_model, make_batch, small_batch
from igulora.measure.counting import Counting

pytest.importorskip("transformers")

CASE = CASES["tiny-4x16"]
SHORT = dataclasses.replace(CASE, total_steps=24)
ALPHAS = (0.85, 1.0, 0.6, 0.95, 0.7, 0.9, 0.75, 0.8, 1.0, 0.65, 0.85, 0.9)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """The tiny model in float32, so that only rounding separates two ways to compute."""
    return load_model(dataclasses.replace(MODELS["tiny"], dtype="float32"))


class _EachStep(Release):
    delta_t = 1


def _release(base: nn.Module, monkeypatch: Any, *, penalty: bool) -> Release:
    torch.manual_seed(0)
    method = _EachStep(copy.deepcopy(base), SHORT)
    method.optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.5)
    drawn = iter(ALPHAS)
    monkeypatch.setattr(method, "draw", lambda: next(drawn))
    if not penalty:
        monkeypatch.setattr(method, "penalty", lambda: 0.0)
    return method


def _ours(
    base: nn.Module, release: Release, monkeypatch: Any, gamma: float
) -> tuple[nn.Module, igulora.Controller, torch.optim.Optimizer]:
    """igulora with the release's options, its weights and its alphas."""
    config = igulora.IGUConfig(
        r=CASE.rank,
        target_rank=CASE.target_rank,
        total_steps=SHORT.total_steps,
        t_init=3,
        t_final=SHORT.total_steps // 4,
        delta_t=1,
        window=1,
        estimator="on-path",
        path="factors",
        combine="snr-release",
        lambda_score="score",
        normalize="none",
        budget_unit="parameters",
        init="gaussian",
        orthogonality=gamma,
        orthogonality_form="offdiagonal",
    )
    model = igulora.adapt(copy.deepcopy(base), config)
    theirs = {n: m for n, m in release.model.named_modules() if isinstance(m, ReleaseLinear)}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, igulora.FusedSVDLinear):
                layer.lora_Q.copy_(theirs[name].lora_A)
                layer.lora_E.copy_(theirs[name].lora_E.view(-1))
                layer.lora_P.copy_(theirs[name].lora_B.t())
    controller = igulora.Controller(model)
    drawn = iter(ALPHAS)
    monkeypatch.setattr(controller.passes.quadrature, "on_path", lambda rows: [next(drawn)])
    layers = controller.bank.layers
    optimizer = torch.optim.SGD([p for m in layers for p in (m.lora_P, m.lora_E, m.lora_Q)], lr=0.5)
    return model, controller, optimizer


def _as_release(model: nn.Module, what: str) -> dict[str, Tensor]:
    """igulora's parameters (``data``) or gradients by the release's names and in its shapes."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, igulora.FusedSVDLinear):
            found[f"{name}.lora_A"] = getattr(layer.lora_Q, what)
            found[f"{name}.lora_E"] = getattr(layer.lora_E, what).view(-1, 1)
            found[f"{name}.lora_B"] = getattr(layer.lora_P, what).t()
    return found


def test_gradients_are_igulora_s_with_the_release_s_settings(base: nn.Module, monkeypatch: Any) -> None:
    release = _release(base, monkeypatch, penalty=True)
    model, controller, _ = _ours(base, release, monkeypatch, gamma=1.0)
    for seed in range(3):
        batch = make_batch(base, 4, 16, seed)
        release.zero_grad()
        controller.bank.grad.zero_()
        loss = release.backward(batch)
        torch.testing.assert_close(loss, controller.backward(lambda b: model(**b).loss, batch))
        controller._reset_step()  # three looks at one point: nothing is stepped
        torch.testing.assert_close(release.penalty().detach(), controller.penalty, rtol=1e-4, atol=1e-6)
        expected = _as_release(model, "grad")
        for name, parameter in release.model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-4, atol=1e-6, msg=name)


def test_scores_and_masks_are_igulora_s_with_the_release_s_settings(base: nn.Module, monkeypatch: Any) -> None:
    release = _release(base, monkeypatch, penalty=False)
    object.__setattr__(release.scores.schedule, "t_init", 3)
    model, controller, optimizer = _ours(base, release, monkeypatch, gamma=0.0)
    assert release.scores.schedule == controller.allocator.schedule
    pruned = []
    for seed in range(len(ALPHAS)):
        batch = make_batch(base, 4, 16, seed)
        release.step(batch)
        controller.backward(lambda b: model(**b).loss, batch)
        optimizer.step()
        controller.step()
        bank = controller.bank
        states = _as_bank_names(bank, controller.importance.mean)
        for name, mean in release.scores.mean.items():
            torch.testing.assert_close(mean, states[name].reshape(mean.shape), rtol=2e-3, atol=1e-9, msg=name)
        if seed >= 3:
            scores = torch.cat([release.scores.triplets()[name].view(-1) for name in bank.names])
            torch.testing.assert_close(scores, controller.importance.triplet_scores(), rtol=2e-3, atol=1e-4)
            lives = [alive for name in bank.names for alive in release.scores.pattern[name]]
            assert lives == bank.live.tolist()
            pruned.append(lives.count(0.0))
        values = _as_release(model, "data")
        for name, parameter in release.model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.data, values[name], rtol=2e-4, atol=1e-6, msg=name)
        optimizer.zero_grad(set_to_none=False)
    assert pruned == sorted(pruned)
    assert 0 < pruned[0] < pruned[-1]


def _as_bank_names(bank: Any, flat: Tensor) -> dict[str, Tensor]:
    parts = {"lora_P": "lora_B", "lora_E": "lora_E", "lora_Q": "lora_A"}
    views = bank.matrix_views(flat)
    return {f"{module}.{parts[part]}": view.t() if part == "lora_P" else view for (module, part), view in views.items()}


def test_its_start_changes_the_outputs_and_without_lambda_does_not(base: nn.Module) -> None:
    batch = small_batch(base, CASE)
    with torch.no_grad():
        reference = base(input_ids=batch["input_ids"]).logits
    method = Release(copy.deepcopy(base), CASE)
    assert not method.starts_as_base
    torch.testing.assert_close(method.logits(batch), reference, rtol=0, atol=0)
    with torch.no_grad():
        as_it_is = method.model(input_ids=batch["input_ids"]).logits
    assert (as_it_is - reference).abs().max() > 1e-6 * reference.abs().max()
    assert all(layer.lora_E.eq(0.1).all() for layer in method._layers)


def _count(run: Any) -> Counting:
    with Counting() as counting:
        run()
    return counting


def test_it_launches_what_the_release_launches(base: nn.Module) -> None:
    """Per module what PEERS counted for 224: 6,720 for a score update, about 8,000 for orthogonality; a sync for each comparison."""
    method = Release(copy.deepcopy(base), CASE)
    batch = small_batch(base, CASE)
    method.prepare(batch)
    modules = len(method._layers)
    for layer in method._layers:  # so that autograd adds to them in both passes
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    whole, bare = (_count(lambda run=run: run(batch)).launches.total() for run in (method.backward, method.bare))
    alpha = _count(lambda: method._set_alpha(1.0)).launches.total()
    assert alpha == 2 * modules
    assert (whole - bare - 2 * alpha) / modules == pytest.approx(8000 / 224, rel=0.1)
    scores = _count(method.scores.update)
    assert scores.launches.total() == 6720 / 224 * modules
    assert not scores.syncs
    allocation = _count(lambda: method.scores.allocate(method._middle))
    triplets = modules * CASE.rank
    compared = allocation.launches["aten::lt"]
    assert triplets * 5 < compared < triplets * 7  # log2(112) = 6.8
    assert allocation.syncs["aten::_local_scalar_dense"] == compared + modules


def test_the_sort_compares_as_often_as_peers_counted() -> None:
    torch.manual_seed(0)
    scored = [(1, score) for score in torch.rand(224 * 32)]
    counting = _count(lambda: last_charged(scored, 3000))
    assert counting.launches["aten::lt"] == pytest.approx(82_319, rel=0.01)
    assert counting.syncs.total() == counting.launches["aten::lt"]


@pytest.mark.parametrize(
    ("excess", "threshold"), [(0, 1.0), (1, 1.0), (2, 2.0), (3, 3.0), (5, 3.0), (6, 4.0), (99, 4.0)]
)
def test_triplets_are_charged_from_the_lowest_up(excess: int, threshold: float) -> None:
    scored = [(cost, torch.tensor(score)) for cost, score in ((3, 3.0), (1, 1.0), (1, 2.0), (2, 4.0))]
    assert last_charged(scored, excess).item() == threshold


def test_a_schedule_without_an_allocation_is_refused(base: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"expected a pruning phase of at least 20 steps.*got 18"):
        Release(copy.deepcopy(base), SHORT)


def test_its_steps_are_of_two_kinds(base: nn.Module) -> None:
    method = Release(copy.deepcopy(base), CASE)
    batch = small_batch(base, CASE)
    method.prepare(batch)
    assert method.kinds() == {"plain": pytest.approx(19 / 20), "mask": pytest.approx(1 / 20)}
    stored = CASE.rank * len(method._layers)
    assert method.live() is not None
    assert 0 < method.live() < stored
    sorts = []
    for kind in ("plain", "mask", "mask", "plain"):
        method.seek(kind, batch)
        sorts.append(_count(lambda: method.step(batch)).syncs.total() > stored)
    assert sorts == [False, True, True, False]


def test_in_its_final_phase_each_step_sorts_and_none_scores(base: nn.Module) -> None:
    method = ReleaseFinal(copy.deepcopy(base), CASE)
    batch = small_batch(base, CASE)
    method.prepare(batch)
    before = {name: mean.clone() for name, mean in method.scores.mean.items()}
    for _ in range(2):
        assert _count(lambda: method.step(batch)).syncs.total() > CASE.rank * len(method._layers)
    assert all(torch.equal(mean, before[name]) for name, mean in method.scores.mean.items())
    target = CASE.target_rank * sum(method.scores.costs.values())
    kept = sum(method.scores.costs[name] * sum(lives) for name, lives in method.scores.pattern.items())
    assert kept <= target


def test_its_states_have_the_model_s_dtype() -> None:
    base16 = load_model(MODELS["tiny"])
    method = METHODS["release"](copy.deepcopy(base16), CASE)
    assert isinstance(method, Release)
    method.prepare(small_batch(base16, CASE))
    trained = [p for p in method.model.parameters() if p.requires_grad]
    states = [method.scores.sensitivity, method.scores.mean, method.scores.deviation]
    kept = sum(t.nbytes for state in states for t in state.values())
    kept += sum(t.nbytes for p in trained for t in method.optimizer.state[p].values() if t.numel() > 1)
    kept += 2 * sum(p.nbytes for p in trained)  # the parameters and their gradients
    assert kept == 14 * sum(p.numel() for p in trained)  # PEERS: 14 bytes for each adapter parameter


def test_it_adapts_the_matrices_that_the_case_names(base: nn.Module) -> None:
    method = Release(copy.deepcopy(base), dataclasses.replace(CASE, targets=("q_proj", "v_proj")))
    names = [name for name, m in method.model.named_modules() if isinstance(m, ReleaseLinear)]
    assert names == [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qv"]
    assert [layer.name for layer in method.adapted()] == names
