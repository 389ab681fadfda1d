"""Budget schedule and allocation in a model: exactly b(t) live after each allocation, whatever the options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import igulora
from igulora.allocation import Allocator
from igulora.budget import BudgetSchedule
from igulora.importance import Importance, normalized


@given(
    initial=st.integers(0, 500),
    share=st.floats(0, 1),
    t_init=st.integers(0, 50),
    length=st.integers(1, 200),
    delta_t=st.integers(1, 60),
)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_schedule(initial: int, share: float, t_init: int, length: int, delta_t: int) -> None:
    target, t_end = int(initial * share), t_init + length
    schedule = BudgetSchedule(initial, target, t_init, t_end, delta_t)
    budgets = [schedule.budget(t) for t in range(t_end + 5)]
    assert budgets[: t_init + 1] == [initial] * (t_init + 1)
    assert budgets[t_end:] == [target] * 5
    assert budgets == sorted(budgets, reverse=True)
    for t in range(t_init, t_end + 1):
        exact = target + (initial - target) * (1 - (t - t_init) / length) ** 3
        assert budgets[t] - 1e-6 <= exact < budgets[t] + 1 + 1e-6
    due = [t for t in range(t_end + 50) if schedule.is_due(t)]
    assert due[-1] == t_end  # the last allocation fixes the ranks
    assert all(t > t_init and (t % delta_t == 0 or t == t_end) for t in due)
    assert schedule.first_allocation == due[0]
    phases = [schedule.phase(t) for t in range(t_end + 2)]
    assert phases == ["warmup"] * (t_init + 1) + ["pruning"] * (length - 1) + ["final"] * 2


OPTIONS = {
    "igu": {},
    "adalora": {"method": "adalora"},
    "random": {"method": "random"},
    "magnitude": {"method": "magnitude"},
    "score of lambda": {"lambda_score": "score"},
    "rank": {"normalize": "rank"},
    "unit": {"normalize": "unit"},
    "as they are": {"normalize": "none"},
    "min_rank": {"min_rank": 1},
    "to nothing": {"target_rank": 0},
    "no room": {"target_rank": 4},
    "separate": {"path_pass": "separate", "estimator": "trapezoid", "include_f0": True},
    "absolute": {"aggregate": "absolute"},
    "on-path": {"estimator": "on-path-stratified", "path": "factors"},
}


@pytest.mark.parametrize("prune", ["soft", "hard"])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_exactly_the_budget_lives(net, config, trainer, batches, loss_of, prune, name) -> None:
    options = config(prune=prune, rank_pattern={"up": 0, "head": 2}, **OPTIONS[name])
    model, controller, optimizer = trainer(net(), options)
    bank, final, history = model.igulora_bank, None, []
    stored = {n: layer.r for n, layer in zip(bank.names, bank.layers, strict=True)}
    for batch in batches(21):
        controller.backward(loss_of(model), batch)
        optimizer.step()
        lambdas = bank.lambdas.clone()
        info = controller.step()
        optimizer.zero_grad()
        assert info.step == controller.global_step
        assert info.budget == controller.budget
        ranks = controller.live_ranks()
        if info.allocated:
            history.append({"step": info.step, "budget": info.budget, "ranks": ranks})
            assert sum(ranks.values()) == info.budget == controller.budget
            assert all(0 <= ranks[n] <= stored[n] for n in stored)
            assert all(ranks[n] >= min(options.min_rank, stored[n]) for n in stored)
            # The dead lose their lambda, the living keep theirs.
            assert torch.equal(bank.lambdas, lambdas * bank.live)
        if prune == "hard" or info.phase == "final":
            assert torch.equal(bank.mask, bank.live)
        else:
            assert torch.equal(bank.mask, torch.ones_like(bank.mask))
        if info.phase == "final":
            final = final if final is not None else bank.live.clone()
            assert torch.equal(bank.live, final)
            assert not info.scored
    assert [h["step"] for h in history] == [8, 10, 12, 14, 15]
    assert controller.history == history
    assert history[-1]["budget"] == min(options.target_rank * 4, bank.triplets)


def test_hard_pruning_only_shrinks_and_soft_may_return(net, config, trainer, batches, loss_of) -> None:
    for prune in ("hard", "soft"):
        model, controller, optimizer = trainer(
            net(), config(prune=prune, total_steps=40, t_final=10, delta_t=1), lr=0.2
        )
        bank, before, returned = model.igulora_bank, model.igulora_bank.live.clone(), 0
        for batch in batches(31):
            controller.backward(loss_of(model), batch)
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            returned += int(((bank.live > 0) & (before == 0)).sum())
            before = bank.live.clone()
        assert (returned > 0) == (prune == "soft")


def test_parameters_are_charged_in_and_out(net, config, trainer, run, batches) -> None:
    model, controller, optimizer = trainer(net(), config(budget_unit="parameters"))
    bank = model.igulora_bank
    cost = {n: layer.in_features + layer.out_features for n, layer in zip(bank.names, bank.layers, strict=True)}
    assert controller.budget == 4 * sum(cost.values())
    run(model, controller, optimizer, batches(16))
    assert controller.budget == 2 * sum(cost.values())
    assert len(controller.history) == 5
    for entry in controller.history:
        spent = sum(cost[n] * r for n, r in entry["ranks"].items())
        assert entry["budget"] - max(cost.values()) < spent <= entry["budget"]


def scored(net, config, terms: torch.Tensor, **changes):
    """An allocator of a model whose score terms are given."""
    model = igulora.adapt(net(), config(**changes))
    bank = model.igulora_bank
    importance = Importance(bank, model.igulora_config)
    importance.terms.copy_(terms)
    importance.updates = 3
    return bank, importance, Allocator(bank, model.igulora_config)


@pytest.mark.parametrize("normalize", ["none", "rank", "unit"])
@pytest.mark.parametrize("score", ["magnitude", "score"])
def test_ties_keep_the_lower_index(net, config, normalize, score) -> None:
    bank, importance, allocator = scored(net, config, torch.ones(3, 16), normalize=normalize, lambda_score=score)
    for step in (8, 10, 12, 14, 15):
        allocator.allocate(importance, step)
        b = allocator.schedule.budget(step)
        assert bank.live.tolist() == [1.0] * b + [0.0] * (16 - b)


@pytest.mark.parametrize("normalize", ["none", "rank", "unit"])
def test_nan_loses(net, config, normalize) -> None:
    terms = torch.arange(48.0).view(3, 16)
    terms[1, [3, 15]] = float("nan")
    bank, importance, allocator = scored(net, config, terms, normalize=normalize)
    allocator.allocate(importance, 15)
    assert torch.nonzero(bank.live).flatten().tolist() == [7, 8, 9, 10, 11, 12, 13, 14]


def test_scores_add_their_three_terms(net, config) -> None:
    terms = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).abs()
    bank, importance, _ = scored(net, config, terms, normalize="none")
    bank.lambdas.copy_(torch.randn(16, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(importance.triplet_scores(), bank.lambdas.abs() + terms[1] + terms[2])
    bank, importance, _ = scored(net, config, terms, lambda_score="score", normalize="none")
    torch.testing.assert_close(importance.triplet_scores(), terms.sum(0))
    bank, importance, _ = scored(net, config, terms, lambda_score="score", normalize="unit")
    torch.testing.assert_close(importance.triplet_scores(), (terms / terms.mean(1, keepdim=True)).sum(0))


def test_normalized(net, config) -> None:
    bank = igulora.adapt(net(), config()).igulora_bank
    term = torch.tensor([3.0, 1.0, 3.0, 2.0, 0.0])
    assert torch.equal(normalized(term, "none", bank), term)
    torch.testing.assert_close(normalized(term, "rank", bank), torch.tensor([3.5, 1.0, 3.5, 2.0, 0.0]) / 4)
    torch.testing.assert_close(normalized(term, "unit", bank), term / 1.8)
    assert torch.equal(normalized(torch.zeros(3), "unit", bank), torch.zeros(3))
    assert normalized(torch.ones(1), "rank", bank).tolist() == [0.0]
    assert normalized(torch.ones(0), "rank", bank).tolist() == []


def test_normalized_by_matrix(net, config) -> None:
    """Triplets are told apart from those of their own matrix, whatever the others are like."""
    model = igulora.adapt(net(), config(rank_pattern={"up": 2}))
    bank = model.igulora_bank
    ranks = [layer.r for layer in bank.layers]
    assert len(set(ranks)) == 2
    parts = [10.0**i * torch.randn(r, generator=torch.Generator().manual_seed(i)) + i for i, r in enumerate(ranks)]
    wanted = [(part - part.mean()) / part.std(correction=0) for part in parts]
    torch.testing.assert_close(normalized(torch.cat(parts), "matrix", bank), torch.cat(wanted))
    parts[0][1] = torch.nan  # counts for no other
    left = parts[0][~parts[0].isnan()]
    found = normalized(torch.cat(parts), "matrix", bank).split(ranks)[0]
    assert torch.nonzero(found.isnan()).flatten().tolist() == [1]
    torch.testing.assert_close(found[~found.isnan()], (left - left.mean()) / left.std(correction=0))
    among = torch.ones(bank.triplets, dtype=torch.bool)
    among[1] = False  # nor does what is pruned for ever
    parts[0][1] = 100.0
    found = normalized(torch.cat(parts), "matrix", bank, among).split(ranks)[0]
    torch.testing.assert_close(found[[0, *range(2, ranks[0])]], (left - left.mean()) / left.std(correction=0))
    assert torch.equal(normalized(torch.ones(bank.triplets), "matrix", bank), torch.zeros(bank.triplets))
    none = igulora.adapt(net(), config(r=0, target_rank=0)).igulora_bank
    assert normalized(torch.ones(0), "matrix", none).tolist() == []


def test_chance_is_seeded_and_magnitude_is_lambda(net, config, trainer, run, batches) -> None:
    ends = []
    for seed in (0, 0, 1):
        model, controller, optimizer = trainer(net(), config(method="random", seed=seed))
        run(model, controller, optimizer, batches(16))
        ends.append(model.igulora_bank.live.tolist())
    assert ends[0] == ends[1] != ends[2]
    bank, importance, allocator = scored(net, config, torch.zeros(3, 16), method="magnitude")
    bank.lambdas.copy_(torch.tensor([(-1.0) ** i * i for i in range(16)]))
    allocator.allocate(importance, 15)
    assert bank.live.tolist() == [0.0] * 8 + [1.0] * 8


@pytest.mark.parametrize("updates", [0, 2])
def test_allocation_before_three_updates_is_an_error(net, config, updates) -> None:
    bank, importance, allocator = scored(net, config, torch.ones(3, 16))
    importance.updates = updates
    with pytest.raises(ValueError, match=f"at least 3 score updates before an allocation, got {updates}"):
        allocator.allocate(importance, 8)
    assert torch.equal(bank.live, torch.ones(16))


def test_scores_before_any_update_are_an_error(net, config) -> None:
    model = igulora.adapt(net(), config())
    importance = Importance(model.igulora_bank, model.igulora_config)
    with pytest.raises(ValueError, match="got none yet"):
        importance.triplet_scores()
    with pytest.raises(ValueError, match="no score update"):
        importance.module_stats()


@pytest.mark.parametrize(
    ("t_init", "length", "delta_t"), [(7, 8, 1), (7, 9, 5), (7, 5000, 1), (8, 4100, 3), (7, 10**7, 1)]
)
def test_budgets_on_the_device_are_those_of_the_schedule(net, config, t_init: int, length: int, delta_t: int) -> None:
    """They go there in tables, which must not grow with the length of a run."""
    options = {"t_init": t_init, "t_final": 2, "delta_t": delta_t, "total_steps": t_init + length + 2}
    model = igulora.adapt(net(), config(**options))
    allocator = Allocator(igulora.find_bank(model), model.igulora_config)
    schedule = allocator.schedule
    due = range(schedule.first_allocation, schedule.t_end, delta_t)
    for step in [*due[:2100], *due[-3:], schedule.t_end, schedule.t_end + 1]:
        assert int(allocator._budget(step)) == schedule.budget(step)
    assert allocator._table is not None
    assert allocator._table.numel() <= 1024
