"""FlexLoRA and igu-flex: which matrices give and which gain, what a move writes, and that nothing else changes (ALGORITHMS 4)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import igulora
from igulora.budget import ExchangeSchedule
from igulora.exchange import choose, spectral_entropy

EPS = 1e-6
Run = tuple[nn.Module, igulora.Controller, torch.optim.Optimizer]


# -- what matrices are ranked by ----------------------------------------------------------------------------------------


def test_entropy_of_known_spectra() -> None:
    assert spectral_entropy(torch.ones(7), EPS) == pytest.approx(1.0, abs=1e-5)
    assert spectral_entropy(torch.tensor([3.0, 0.0, 0.0]), EPS) == pytest.approx(0.0, abs=1e-5)
    half = spectral_entropy(torch.tensor([1.0, -1.0, 0.0, 0.0]), EPS)
    assert half == pytest.approx(math.log(2) / math.log(4), abs=1e-5)
    assert spectral_entropy(torch.tensor([2.0, -1.0]), EPS) == pytest.approx(
        -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)) / math.log(2), abs=1e-5
    )


@pytest.mark.parametrize(("lambdas", "entropy"), [([], 0.0), ([2.0], 0.0), ([0.0], 0.0), ([0.0, 0.0], 1.0)])
def test_entropy_where_the_source_leaves_it_open(lambdas: list[float], entropy: float) -> None:
    assert spectral_entropy(torch.tensor(lambdas), EPS) == entropy


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=40), st.floats(1e-3, 1e3))
def test_entropy_is_a_share_and_free_of_scale(values: list[float], scale: float) -> None:
    lambdas = torch.tensor(values, dtype=torch.float64)
    entropy = spectral_entropy(lambdas, EPS)
    assert 0.0 <= entropy <= 1.0
    if lambdas.abs().max() > 1e-3:
        assert spectral_entropy(lambdas * scale, EPS) == pytest.approx(entropy, abs=1e-6)


def contributions(energy: Tensor) -> Tensor:
    return -energy * energy.log()


@given(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=12))
def test_the_smallest_lambda_adds_least_to_the_entropy_where_no_energy_exceeds_1_over_e(values: list[float]) -> None:
    """FlexLoRA's monotonicity claim: -e log e rises up to e = 1/e."""
    energy = torch.tensor(values, dtype=torch.float64)
    energy /= energy.sum()
    if energy.max() <= 1 / math.e:
        assert contributions(energy).min() == contributions(energy)[energy.argmin()]


def test_the_claim_fails_where_one_lambda_dominates() -> None:
    energy = torch.tensor([0.9, 0.1], dtype=torch.float64)
    assert contributions(energy).argmin() == energy.argmax()


# -- who gives and who gains --------------------------------------------------------------------------------------------


@st.composite
def matrices(draw: Any) -> dict[str, Any]:
    count = draw(st.integers(1, 12))
    most = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    return {
        "importance": draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=count, max_size=count)),
        "ranks": [draw(st.integers(0, m)) for m in most],
        "most": most,
        "count": draw(st.integers(0, 8)),
        "least": draw(st.integers(0, 3)),
    }


@given(matrices(), st.sampled_from(["both", "prune", "expand"]))
def test_moves_keep_to_the_rules(case: dict[str, Any], direction: str) -> None:
    moves = choose(**case, direction=direction)
    importance, ranks, most = case["importance"], case["ranks"], case["most"]
    assert not set(moves.losers) & set(moves.gainers)
    assert len(moves.losers) <= case["count"]
    assert len(moves.gainers) <= case["count"]
    if direction == "both":
        assert len(moves.losers) == len(moves.gainers)
        assert all(
            importance[loser] <= importance[gainer] for loser, gainer in zip(moves.losers, moves.gainers, strict=True)
        )
    else:
        assert not (moves.gainers if direction == "prune" else moves.losers)
    for k in moves.losers:
        assert ranks[k] > max(case["least"], 1)
        left = [j for j in range(len(ranks)) if ranks[j] > max(case["least"], 1) and j not in moves.losers]
        assert all(importance[j] >= importance[k] for j in left)
    for k in moves.gainers:
        assert 0 < ranks[k] < most[k]
        left = [j for j in range(len(ranks)) if 0 < ranks[j] < most[j] and j not in moves.gainers]
        assert all(importance[j] <= importance[k] for j in left)


def test_fewer_move_where_the_lists_would_meet() -> None:
    moves = choose([0.1, 0.2, 0.3], [3, 3, 3], [9, 9, 9], 3, "both")
    assert (moves.losers, moves.gainers) == ((0,), (2,))


def test_the_schedule_is_the_source_s_cubic() -> None:
    schedule = ExchangeSchedule(moves=20, t_init=10, t_end=70, delta_t=5)
    assert [schedule.moves_at(t) for t in (0, 10, 70, 99)] == [0, 0, 0, 0]
    assert schedule.moves_at(15) == 16  # 20 (65/70)^3 = 16.01
    assert schedule.moves_at(45) == 3  # 20 (1/2)^3 = 2.5, rounded up
    assert schedule.moves_at(66) == 0  # 20 (14/70)^3 = 0.16
    values = [schedule.moves_at(t) for t in range(11, 70)]
    assert all(a >= b for a, b in pairwise(values))
    assert schedule.is_due(15)
    assert not schedule.is_due(16)
    assert [schedule.phase(t) for t in (10, 11, 69, 70)] == ["warmup", "pruning", "pruning", "final"]


# -- runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(net: Any) -> Callable[..., Run]:
    """``started(**options)``: a small model, its controller and optimizer."""

    def make(optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> Run:
        values = {
            "method": "flexlora", "r": 3, "max_rank": 6, "total_steps": 40, "t_init": 6, "t_final": 8, "delta_t": 2, "moves": 2,
            "orthogonality": 0.1,
        }  # fmt: skip
        model = igulora.adapt(net(), igulora.IGUConfig(**{**values, **options}))
        opt = optimizer(igulora.param_groups(model, lr=1e-2))
        return model, igulora.Controller(model, optimizer=opt), opt

    return make


IGU_FLEX = {"method": "igu-flex", "window": 2, "ig_every": 1}
KINDS: dict[str, dict[str, Any]] = {
    "flexlora": {},
    "nuclear": {"importance": "nuclear"},
    "frobenius": {"importance": "frobenius"},
    "sensitivity": {"importance": "sensitivity"},
    "orthogonal": {"new_directions": "orthogonal"},
    "zeros": {"new_directions": "zeros"},
    "gaussian": {"init": "gaussian"},
    "igu-flex": IGU_FLEX,
    "igu-flex by entropy": {**IGU_FLEX, "importance": "entropy"},
    "igu-flex, separate": {**IGU_FLEX, "path_pass": "separate", "estimator": "trapezoid", "nodes": 5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_total_stays_and_no_matrix_leaves_its_bounds(kind: str, started: Any, batches: Any, run: Any) -> None:
    model, ctl, opt = started(**KINDS[kind])
    assert ctl.live_ranks() == dict.fromkeys(ctl.bank.names, 3)
    run(model, ctl, opt, batches(40))
    assert ctl.history
    for event in ctl.history:
        assert sum(event["ranks"].values()) == event["budget"] == 12
        assert all(1 <= rank <= 6 for rank in event["ranks"].values())
        assert event["importance"].keys() == event["ranks"].keys()
    assert ctl.live_ranks() == ctl.history[-1]["ranks"] != dict.fromkeys(ctl.bank.names, 3)
    assert torch.equal(ctl.bank.mask, ctl.bank.live)
    assert ctl.phase == "final"


@pytest.mark.parametrize(("direction", "sign"), [("prune", -1), ("expand", 1)])
def test_one_direction_alone_changes_the_total(direction: str, sign: int, started: Any, batches: Any, run: Any) -> None:
    model, ctl, opt = started(direction=direction)
    run(model, ctl, opt, batches(40))
    totals = [12, *(event["budget"] for event in ctl.history)]
    assert all(sign * (b - a) > 0 for a, b in pairwise(totals))
    assert totals[-1] == sum(ctl.live_ranks().values()) == ctl.budget


def before_the_first(model: nn.Module, ctl: Any, opt: Any, batches: Any, loss_of: Any) -> None:
    """Up to the optimizer step of the first adjustment."""
    for batch in batches(8):
        ctl.backward(loss_of(model), batch)
        opt.step()
        if ctl.global_step == 7:
            return
        ctl.step()
        opt.zero_grad()


@pytest.mark.parametrize("kind", ["flexlora", "orthogonal", "igu-flex"])
def test_gaining_a_triplet_changes_no_bit_of_the_outputs(kind: str, started: Any, batches: Any, loss_of: Any) -> None:
    model, ctl, opt = started(direction="expand", **KINDS[kind])
    before_the_first(model, ctl, opt, batches, loss_of)
    x = torch.randn(50, 8)
    with torch.no_grad():
        before = model(x)
        assert ctl.step().allocated
        assert torch.equal(model(x), before)
    gained = (ctl.bank.live > 0) & (ctl.bank.lambdas == 0)
    assert gained.sum() == 2


def state_by_row(ctl: Any, opt: Any) -> dict[tuple[int, str, int], list[Tensor]]:
    """Everything that belongs to one row of one matrix."""
    means, deviations = (ctl.bank.matrix_views(t) for t in (ctl.importance.mean, ctl.importance.deviation))
    found = {}
    for layer, name in zip(ctl.bank.layers, ctl.bank.names, strict=True):
        for part in ("lora_P", "lora_E", "lora_Q"):
            param = getattr(layer, part)
            states = [v for v in opt.state[param].values() if v.shape == param.shape]
            for row in range(layer.r):
                values = [param, means[name, part], deviations[name, part], *states]
                found[layer.slot, part, row] = [value[row].detach().clone() for value in values]
    return found


@pytest.mark.parametrize("kind", ["flexlora", "sensitivity", "igu-flex"])
def test_states_of_new_triplets_start_at_zero_and_others_stay(
    kind: str, started: Any, batches: Any, loss_of: Any
) -> None:
    model, ctl, opt = started(**KINDS[kind])
    before_the_first(model, ctl, opt, batches, loss_of)
    for layer in ctl.bank.layers:  # something to forget, as of a triplet that has lived
        for part in ("lora_P", "lora_E", "lora_Q"):
            for value in opt.state[getattr(layer, part)].values():
                if value.ndim:
                    value[3:] = 1.0
    live, before = ctl.bank.live.clone(), state_by_row(ctl, opt)
    ctl.importance.update = lambda path: None  # a score update changes every state
    assert ctl.step().allocated
    after, lives = state_by_row(ctl, opt), ctl.bank.live
    starts = ctl.bank.starts
    gained = lost = 0
    for (slot, part, row), values in after.items():
        was, now = bool(live[starts[slot] + row]), bool(lives[starts[slot] + row])
        gained, lost = gained + (now and not was), lost + (was and not now)
        if now and not was:
            assert all(not value.any() for value in values[1:])
            assert part != "lora_E" or not values[0].any()
            assert part == "lora_E" or values[0].any()
        else:
            unchanged = values if was and now else values[1:]
            old = before[slot, part, row] if was and now else before[slot, part, row][1:]
            assert all(torch.equal(a, b) for a, b in zip(unchanged, old, strict=True))
    assert gained == lost == 3 * 2


def test_new_directions(started: Any, batches: Any, loss_of: Any) -> None:
    found = {}
    for kind in ("zero-impact", "orthogonal", "zeros"):
        model, ctl, opt = started(new_directions=kind)
        before_the_first(model, ctl, opt, batches, loss_of)
        was = ctl.bank.live.clone()
        ctl.step()
        triplet = int(((ctl.bank.live > 0) & (was == 0)).nonzero()[0])
        slot = next(k for k, stop in enumerate(ctl.bank.starts[1:]) if triplet < stop)
        layer, row = ctl.bank.layers[slot], triplet - ctl.bank.starts[slot]
        others = [i for i in range(layer.r) if layer.mask[i] > 0 and i != row]
        found[kind] = (layer.lora_Q[row].detach(), (layer.lora_Q[others] @ layer.lora_Q[row]).detach())
    assert 0.2 < found["zero-impact"][0].norm() < 3
    assert found["zero-impact"][1].abs().max() > 1e-2
    assert found["orthogonal"][1].abs().max() < 1e-6
    assert found["orthogonal"][0].norm() > 0.1
    assert not found["zeros"][0].any()


def test_igu_flex_loses_the_triplet_with_the_lowest_score(started: Any, batches: Any, loss_of: Any) -> None:
    model, ctl, opt = started(**IGU_FLEX)
    before_the_first(model, ctl, opt, batches, loss_of)
    was = ctl.bank.live.clone()
    ctl.step()
    scores = ctl.importance.triplet_scores()
    for triplet in ((ctl.bank.live == 0) & (was > 0)).nonzero().flatten().tolist():
        slot = next(k for k, stop in enumerate(ctl.bank.starts[1:]) if triplet < stop)
        own = slice(ctl.bank.starts[slot], ctl.bank.starts[slot + 1])
        assert scores[triplet] == scores[own][was[own] > 0].min()


@pytest.mark.parametrize("kind", ["flexlora", "igu-flex by entropy"])
def test_where_spectra_rank_the_smallest_lambda_goes(kind: str, started: Any, batches: Any, loss_of: Any) -> None:
    model, ctl, opt = started(**KINDS[kind])
    before_the_first(model, ctl, opt, batches, loss_of)
    was, sizes = ctl.bank.live.clone(), ctl.bank.lambdas.detach().abs().clone()
    ctl.step()
    lost = ((ctl.bank.live == 0) & (was > 0)).nonzero().flatten().tolist()
    assert len(lost) == 2
    for triplet in lost:
        slot = next(k for k, stop in enumerate(ctl.bank.starts[1:]) if triplet < stop)
        own = slice(ctl.bank.starts[slot], ctl.bank.starts[slot + 1])
        assert sizes[triplet] == sizes[own][was[own] > 0].min()


def test_a_padding_id_keeps_its_row() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 8), nn.Linear(8, 8))
    options = igulora.IGUConfig(
        method="flexlora",
        r=2,
        total_steps=40,
        t_init=2,
        t_final=2,
        delta_t=1,
        moves=1,
        direction="expand",
        target_modules=["0", "1", "2"],
    )
    igulora.adapt(model, options)
    opt = torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))
    ctl = igulora.Controller(model, optimizer=opt)
    for _ in range(20):
        ctl.backward(lambda ids: (model(ids) - 1.0).square().mean(), torch.randint(12, (4, 5)))
        opt.step()
        ctl.step()
        opt.zero_grad()
    assert ctl.live_ranks()["0"] > 2
    assert not model[0].lora_Q[:, 0].any()


def test_a_triplet_that_comes_back_within_a_window_starts_at_zero(started: Any, batches: Any, loss_of: Any) -> None:
    model, ctl, opt = started(**{**IGU_FLEX, "window": 2, "t_init": 6})
    before_the_first(model, ctl, opt, batches, loss_of)
    ctl.bank.path.fill_(1.0)
    was = ctl.bank.live.clone()
    ctl.importance.update = lambda path: None
    ctl.step()
    gained = (ctl.bank.live > 0) & (was == 0)
    views = ctl.bank.matrix_views(ctl.bank.path)
    for layer, name in zip(ctl.bank.layers, ctl.bank.names, strict=True):
        rows = gained[ctl.bank.starts[layer.slot] : ctl.bank.starts[layer.slot + 1]]
        for part in ("lora_P", "lora_E", "lora_Q"):
            assert not views[name, part][rows].any()
            assert bool((views[name, part][~rows] == 1.0).all())


def test_ranks_of_single_modules_are_those_at_the_start(net: Any) -> None:
    options = {"method": "flexlora", "r": 3, "total_steps": 40, "t_init": 6, "rank_pattern": {"head": 7, "first": 0}}
    model = igulora.adapt(net(), igulora.IGUConfig(**options))
    bank = igulora.find_bank(model)
    assert bank.ranks() == {"first": 0, "body.up": 3, "body.down": 3, "head": 7}
    assert [layer.r for layer in bank.layers] == [0, 7, 7, 7]


# -- saving, copies, compaction -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=6)
@given(stop=st.integers(1, 39))
def test_a_run_that_was_stopped_goes_on_bit_by_bit(tmp_path_factory: Any, stop: int) -> None:
    from ..conftest import Net, batches_of

    folder = tmp_path_factory.mktemp("run")
    config = igulora.IGUConfig(
        method="igu-flex", r=3, total_steps=40, t_init=6, t_final=8, delta_t=2, moves=2, window=2, ig_every=1
    )

    def make() -> Run:
        model = igulora.adapt(Net(), config)
        opt = torch.optim.AdamW(igulora.param_groups(model, lr=1e-2))
        return model, igulora.Controller(model, optimizer=opt), opt

    def go(run: Run, batches: list[Any]) -> None:
        model, ctl, opt = run
        for x, y in batches:
            ctl.backward(lambda batch: (model(batch[0]) - batch[1]).square().mean(), (x, y))
            opt.step()
            ctl.step()
            opt.zero_grad()

    data = batches_of(40)
    whole, first, second = make(), make(), make()
    go(whole, data)
    go(first, data[:stop])
    igulora.save_checkpoint(folder, first[0], first[2], first[1])
    igulora.load_checkpoint(folder, second[0], second[2], second[1])
    go(second, data[stop:])
    assert torch.equal(whole[1].bank.weight, second[1].bank.weight)
    assert torch.equal(whole[1].bank.mask, second[1].bank.mask)
    assert whole[1].history == second[1].history


def test_folders_copies_and_compaction(started: Any, net: Any, batches: Any, run: Any, tmp_path: Any) -> None:
    model, ctl, opt = started()
    run(model, ctl, opt, batches(20))
    with pytest.raises(ValueError, match="whose matrices may still gain triplets.*Compact after step 32"):
        igulora.compact(model, opt, ctl)
    with pytest.raises(ValueError, match="expected the controller of a run whose matrices may gain triplets"):
        igulora.compact(model, opt)
    twin, twin_ctl, twin_opt = copy.deepcopy((model, ctl, opt))
    for each in ((model, ctl, opt), (twin, twin_ctl, twin_opt)):
        run(*each, batches(20, seed=8))
    assert torch.equal(ctl.bank.weight, twin_ctl.bank.weight)
    assert ctl.history == twin_ctl.history
    x = torch.randn(5, 8)
    expected = model(x).detach()
    igulora.save_adapter(model, tmp_path, ctl)
    loaded = igulora.load_adapter(net(), tmp_path)
    assert torch.equal(loaded(x), expected)
    assert igulora.find_bank(loaded).ranks() == ctl.live_ranks()
    igulora.compact(model, opt, ctl)
    torch.testing.assert_close(model(x), expected)
    assert sum(layer.r for layer in ctl.bank.layers) == 12
    run(model, ctl, opt, batches(3))


# -- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_rank": 2}, "expected max_rank >= 3, the rank at the start, got 2"),
        ({"max_rank": 4, "rank_pattern": {"head": 5}}, "expected max_rank >= 5, the rank at the start, got 4"),
        ({"max_rank": 2.5}, "expected max_rank to be an int >= 1, got 2.5"),
        ({"moves": 0}, "expected moves to be an int >= 1, got 0"),
        ({"max_rank": 3}, "every matrix has max_rank=3 triplets already, so that none could be gained"),
        ({"r": 1}, "no matrix has more than the 1 triplets it keeps, so that none could be lost"),
        ({"min_rank": 3}, "no matrix has more than the 3 triplets it keeps"),
        ({"init": "lora"}, "expected init of 'orthonormal' or 'gaussian' for method='flexlora'"),
        ({"budget_unit": "parameters"}, "expected budget_unit of 'rank'"),
        ({"r": 0}, "expected a rank of at least 1 for method='flexlora', got 0"),
        ({"importance": "entropie"}, "Did you mean 'entropy'"),
        ({"method": "igu", "max_rank": 9}, "expected max_rank with method flexlora or igu-flex only, got method='igu'"),
        ({"method": "adalora", "importance": "entropy"}, "expected importance with method flexlora or igu-flex only"),
        ({"method": "igu", "direction": "prune"}, "expected direction with method"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        igulora.IGUConfig(**{"method": "flexlora", "r": 3, "total_steps": 100, **options})


@pytest.mark.parametrize(("direction", "most"), [("both", 2), ("prune", 4), ("expand", 4)])
def test_more_moves_than_matrices(net: Any, direction: str, most: int) -> None:
    model = net()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(names) == 4
    options = {"method": "flexlora", "r": 3, "total_steps": 100, "direction": direction}
    with pytest.raises(
        ValueError, match=rf"expected moves of at most {most} for 4 matrices and direction='{direction}'"
    ):
        igulora.adapt(model, igulora.IGUConfig(moves=most + 1, **options))
    assert not any(isinstance(module, igulora.FusedSVDLinear) for module in model.modules())
    igulora.adapt(model, igulora.IGUConfig(moves=most, **options))


def refused(model: nn.Module, ctl: Any, opt: Any, batches: Any, loss_of: Any, words: str, first: bool = False) -> None:
    """The first adjustment, or the first step of all, raises and changes nothing."""
    if first:
        ctl.backward(loss_of(model), batches(1)[0])
        opt.step()
    else:
        before_the_first(model, ctl, opt, batches, loss_of)
    step = ctl.global_step
    kept = [t.clone() for t in (ctl.bank.weight, ctl.bank.mask, ctl.bank.live)]
    with pytest.raises(ValueError, match=words):
        ctl.step()
    for now, then in zip((ctl.bank.weight, ctl.bank.mask, ctl.bank.live), kept, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    assert not first or ctl.global_step == step == 0


def test_without_the_optimizer(started: Any, batches: Any, loss_of: Any) -> None:
    model, _, opt = started()
    refused(
        model,
        igulora.Controller(model),
        opt,
        batches,
        loss_of,
        r"expected the optimizer in .*optimizer=\.\.\.",
        first=True,
    )


def test_an_optimizer_of_some_of_the_adapters(started: Any, batches: Any, loss_of: Any) -> None:
    model, _, opt = started()
    some = torch.optim.SGD([model.first.lora_P], lr=0.1)
    ctl = igulora.Controller(model, optimizer=some)
    refused(
        model, ctl, opt, batches, loss_of, "expected the one optimizer that trains the adapters, got SGD", first=True
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_diverged(value: float, started: Any, batches: Any, loss_of: Any) -> None:
    model, ctl, opt = started()
    step = opt.step

    def diverge() -> None:
        step()
        if ctl.global_step == 7:
            ctl.bank.lambdas[1] = value

    opt.step = diverge
    refused(model, ctl, opt, batches, loss_of, "expected finite lambda and scores .* for 'first'")


def test_an_optimizer_with_quantised_states(started: Any, batches: Any, loss_of: Any) -> None:
    model, ctl, opt = started()
    param, step = ctl.bank.layers[1].lora_P, opt.step

    def quantise() -> None:
        step()
        opt.state[param]["codes"] = torch.zeros(param.shape, dtype=torch.uint8)

    opt.step = quantise
    words = "states of floating-point numbers, got 'codes' of AdamW in torch.uint8"
    refused(model, ctl, opt, batches, loss_of, words, first=True)


def test_peft_and_imports_say_what_to_use(tmp_path: Any, net: Any) -> None:
    config = igulora.IGUConfig(method="flexlora", r=3, total_steps=100)
    with pytest.raises(
        ValueError, match="expected a method that starts from the ranks in the folder, got method='flexlora'"
    ):
        igulora.import_peft(net(), tmp_path, config)
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="got method='flexlora': PEFT's method has no rows in reserve"):
        igulora.IGULoraConfig(method="flexlora", r=3, total_steps=100)
