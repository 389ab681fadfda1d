"""Controller: accumulation, windows, what is refused, how much it launches, and that a seed fixes every bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import igulora
from igulora.layers import FusedSVDLinear


def cat(parts: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("orthogonality", [0.0, 0.1])
@pytest.mark.parametrize("estimator", ["gauss", "instantaneous", "on-path"])
def test_micro_batches_equal_one_big_batch(net, config, trainer, batches, loss_of, estimator, orthogonality) -> None:
    grads = []
    for parts in (1, 4):
        options = config(estimator=estimator, window=4 if parts == 4 else 1, orthogonality=orthogonality)
        if estimator == "on-path":
            options.nodes = 1  # alpha = 1: every draw is the same
        model, controller, _ = trainer(net(), options, accumulation_steps=parts)
        for layer in model.igulora_bank.layers:
            nn.init.normal_(layer.lora_E, generator=torch.Generator().manual_seed(1))
        data = batches(4)
        for batch in data if parts == 4 else [cat(data)]:
            controller.backward(loss_of(model), batch)
        grads.append(model.igulora_bank.grad.clone())
        if estimator != "gauss":  # the Gauss nodes of four micro-batches differ from those of one
            controller.step()
            grads[-1] = torch.cat((grads[-1], controller.importance.mean))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path_pass", ["mixed", "separate"])
@pytest.mark.parametrize("estimator", ["gauss", "stratified", "trapezoid"])
def test_path_rows_leave_the_training_gradient_alone(
    net, config, trainer, batches, loss_of, estimator, path_pass
) -> None:
    """And the modules to save: the gradients are those of the training batch without path rows."""
    options = config(estimator=estimator, path_pass=path_pass, modules_to_save=["head"], ig_fraction=0.5)
    model, controller, _ = trainer(net(), options)
    for layer in model.igulora_bank.layers:
        nn.init.normal_(layer.lora_E, generator=torch.Generator().manual_seed(1))
    (batch,) = batches(1)
    controller.backward(loss_of(model), batch)
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert torch.count_nonzero(model.igulora_bank.path) > 0
    model.zero_grad()
    controller.bank.context.unstepped = 0
    loss_of(model)(batch).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    assert "head.module.weight" in got
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_reported_loss_is_not_scaled(net, config, trainer, batches, loss_of) -> None:
    model, controller, _ = trainer(net(), config(estimator="instantaneous"), accumulation_steps=2)
    (batch,) = batches(1)
    loss = controller.backward(loss_of(model), batch)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, loss_of(model)(batch).detach())


def test_a_path_sample_does_not_depend_on_the_loss_scale(net, config, trainer, batches, loss_of) -> None:
    for path_pass in ("mixed", "separate"):
        paths = []
        for scale in (1.0, 1024.0):
            model, controller, _ = trainer(net(), config(path_pass=path_pass, estimator="trapezoid"))
            controller.backward(loss_of(model), batches(1)[0], scale=scale)
            paths.append(model.igulora_bank.path.clone())
        torch.testing.assert_close(paths[0], paths[1], rtol=1e-4, atol=1e-7)


# -- the guard against a run that never steps -------------------------------------------------------------------------


def test_the_penalty_takes_the_loss_scale_too(net, config, trainer, batches, loss_of) -> None:
    """What a loss scaler divides out of the gradient at the step must be in all of it."""
    found = []
    for factor in (1.0, 1024.0):
        model, controller, _ = trainer(net(), config(orthogonality=0.5))
        with torch.no_grad():  # away from orthonormal rows, where the penalty's gradient is 0
            controller.bank.weight.mul_(1.5)
        for batch in batches(1):
            controller.backward(loss_of(model), batch, scale=factor)
        found.append(controller.bank.grad / factor)
    assert float(found[0].abs().max()) > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_fixed_ranks_are_regularised_where_asked_for(net, trainer, batches, loss_of) -> None:
    found = {}
    for method, gamma in (("lora", 0.5), ("lora", None), ("random", 0.5)):
        times = {} if method == "lora" else {"total_steps": 40, "target_rank": 4}
        options = igulora.IGUConfig(method=method, r=4, init="orthonormal", orthogonality=gamma, **times)
        model, controller, _ = trainer(net(), options)
        with torch.no_grad():
            controller.bank.weight.mul_(1.5)
        controller.backward(loss_of(model), batches(1)[0])
        found[method, gamma] = controller.bank.grad.clone(), controller.penalty
    assert found["lora", None][1] is None
    assert float(found["lora", 0.5][1]) > 0
    assert not torch.equal(found["lora", 0.5][0], found["lora", None][0])
    torch.testing.assert_close(found["lora", 0.5][0], found["random", 0.5][0])


def test_fixed_ranks_with_a_backward_of_ones_own(net, trainer, batches, loss_of) -> None:
    options = igulora.IGUConfig(method="lora", r=4, init="orthonormal", orthogonality=0.5)
    model, controller, optimizer = trainer(net(), options)
    loss_of(model)(batches(1)[0]).backward()
    optimizer.step()
    with pytest.raises(
        ValueError, match=r"expected ctl.regularise\(\) between your own loss.backward\(\) and optimizer.step\(\)"
    ):
        controller.step()


def test_forgotten_step(net, config, trainer, batches, loss_of) -> None:
    model, controller, optimizer = trainer(net(), config())
    controller.backward(loss_of(model), batches(1)[0])
    optimizer.step()
    optimizer.zero_grad()
    held = model.igulora_bank.weight.clone()
    with pytest.raises(ValueError, match=r"expected ctl.step\(\) after each optimizer step, got 1"):
        controller.backward(loss_of(model), batches(1)[0])
    with pytest.raises(ValueError, match=r"accumulation_steps=K"):
        loss_of(model)(batches(1)[0])
    assert torch.equal(model.igulora_bank.weight, held)
    model.eval()
    loss_of(model)(batches(1)[0])  # evaluation is nobody's business
    model.train()
    with torch.no_grad():
        loss_of(model)(batches(1)[0])
    controller.step()
    controller.backward(loss_of(model), batches(1)[0])


def test_more_micro_batches_than_said(net, config, trainer, batches, loss_of) -> None:
    model, controller, _ = trainer(net(), config(), accumulation_steps=2)
    for batch in batches(2):
        controller.backward(loss_of(model), batch)
    with pytest.raises(ValueError, match="got 2 training passes without it"):
        controller.backward(loss_of(model), batches(1)[0])


def test_no_controller_at_all(net, config, batches, loss_of) -> None:
    model = igulora.adapt(net(), config())

    def train(model: nn.Module) -> None:
        for batch in batches(20):
            loss_of(model)(batch).backward()

    with pytest.raises(ValueError, match=r"igulora.Controller.*method=\"lora\""):
        train(model)
    train(igulora.adapt(net(), igulora.IGUConfig(method="lora", target_rank=2)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("estimator", ["gauss", "instantaneous"])
def test_activation_checkpointing_changes_no_bit(net, config, trainer, run, batches, reentrant, estimator) -> None:
    """The narrow head's gradient arrives first: the rerun of the first layer must not look like a second pass."""
    ends = []
    for recompute in (False, True):
        model, controller, optimizer = trainer(net(), config(estimator=estimator, dropout=0.2))
        first, forward = model.first, model.first.forward

        def again(x, forward=forward):
            return checkpoint(forward, x.requires_grad_(), use_reentrant=reentrant)

        if recompute:
            first.forward = again
        torch.manual_seed(4)
        losses = run(model, controller, optimizer, batches(16))
        ends.append((losses, model.igulora_bank.weight.clone()))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


# -- what is refused --------------------------------------------------------------------------------------------------


def test_coupled_models_are_refused_for_mixed_batches(config) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    igulora.adapt(model, config())
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) computes statistics.*path_pass=\"separate\""):
        igulora.Controller(model)
    model.eval()
    igulora.Controller(model)

    class Router(nn.Sequential):
        class config:
            output_router_logits, router_aux_loss_coef = True, 0.01

    routed = igulora.adapt(Router(nn.Linear(4, 4)), config())
    with pytest.raises(ValueError, match="router balancing loss"):
        igulora.Controller(routed)
    separate = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    igulora.Controller(igulora.adapt(separate, config(path_pass="separate")))


def test_other_trainable_parameters(net, config, batches, loss_of) -> None:
    model = igulora.adapt(net(), config())
    model.first.base_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"got also first.base_layer.bias"):
        igulora.Controller(model)
    grads = []
    for estimator in ("gauss", "instantaneous"):
        model = igulora.adapt(net(), config(path_pass="separate", estimator=estimator))
        model.first.base_layer.bias.requires_grad_(True)
        controller = igulora.Controller(model)
        controller.backward(loss_of(model), batches(1)[0])
        grads.append(model.first.base_layer.bias.grad)
        assert model.first.base_layer.bias.requires_grad
    assert torch.equal(*grads)  # the path pass did not reach it


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"trace": ["hed"]}, "got 'hed'. Did you mean 'head'"),
        ({"accumulation_steps": 0}, "accumulation_steps >= 1"),
    ],
)
def test_bad_arguments(net, config, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        igulora.Controller(igulora.adapt(net(), config()), **options)


def test_a_schedule_that_allocates_before_scores_exist_is_refused_at_once(net, config) -> None:
    with pytest.raises(ValueError, match=r"first allocation \(step 2\), got 1 with window=2.*raise t_init"):
        igulora.Controller(igulora.adapt(net(), config(t_init=1)))
    igulora.Controller(igulora.adapt(net(), config(t_init=1, method="random")))


@pytest.mark.parametrize("bad", [lambda x: x, lambda x: 3.0, lambda x: None])
def test_a_loss_that_is_no_scalar(net, config, trainer, batches, bad) -> None:
    model, controller, _ = trainer(net(), config())
    with pytest.raises(TypeError, match="scalar loss tensor"):
        controller.backward(lambda b: bad(model(b[0])), batches(1)[0])
    assert model.igulora_bank.context.alpha is None  # no pass is left open


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        (torch.zeros(0, 8), ValueError, "at least one sequence"),
        (
            [{"x": torch.zeros(3)}, {"x": torch.zeros(5)}],
            ValueError,
            "sizes .3, 5.; this is a list of examples: collate them",
        ),
        ("text", TypeError, "got str"),
        ((torch.zeros(2, 8), torch.zeros(3)), ValueError, r"sizes \[2, 3\]"),
    ],
)
def test_a_batch_that_is_none(net, config, trainer, batch, error, match) -> None:
    model, controller, _ = trainer(net(), config())
    with pytest.raises(error, match=match):
        controller.backward(lambda b: model(b).sum(), batch)


def test_loss_terms_of_a_wrong_shape(net, config, trainer, batches, loss_of) -> None:
    model, controller, _ = trainer(net(), config(), loss_terms=lambda b: torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"shape \(6,\), one count per sequence, got \(2, 2\)"):
        controller.backward(loss_of(model), batches(1)[0])


@pytest.mark.parametrize("estimator", ["gauss", "instantaneous"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients_leave_scores_untouched(
    net, config, trainer, run, batches, loss_of, estimator, value
) -> None:
    model, controller, optimizer = trainer(net(), config(estimator=estimator))
    run(model, controller, optimizer, batches(4))
    held = [
        t.clone() for t in (controller.importance.mean, controller.importance.deviation, controller.importance.terms)
    ]
    for batch in batches(2):
        controller.backward(lambda b: loss_of(model)(b) * value, batch)
        controller.step()  # the optimizer's step is skipped, as a GradScaler does
        optimizer.zero_grad()
    now = (controller.importance.mean, controller.importance.deviation, controller.importance.terms)
    assert all(torch.equal(a, b) for a, b in zip(now, held, strict=True))
    run(model, controller, optimizer, batches(2))
    assert not torch.equal(controller.importance.mean, held[0])
    assert controller.importance.mean.isfinite().all()


# -- launches and synchronisation -------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counts every operator that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def counted(model, controller, optimizer, batches, loss_of) -> tuple[list[Counter], Counter]:
    """Operators of every ctl.step() of a run over all phases, and those of all ctl.backward() together."""
    steps, passes = [], Counting()
    for batch in batches(17):
        with passes:
            controller.backward(loss_of(model), batch)
        optimizer.step()
        with Counting() as mode:
            controller.step()
        steps.append(mode.counts)
        optimizer.zero_grad()
    return steps, passes.counts


@pytest.mark.parametrize("method", ["igu", "adalora", "random"])
@pytest.mark.parametrize("normalize", ["none", "rank"])
def test_a_step_launches_the_same_for_any_number_of_layers(config, trainer, loss_of, method, normalize) -> None:
    g = torch.Generator().manual_seed(0)

    def batches(count: int) -> list[Any]:
        return [(torch.randn(4, 8, generator=g), torch.randn(4, 8, generator=g)) for _ in range(count)]

    totals = []
    for depth in (2, 6):
        torch.manual_seed(0)
        layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)])
        options = config(method=method, normalize=normalize, orthogonality=0.1)
        steps, passes = counted(*trainer(layers, options), batches, loss_of)
        # The first step of a window of training gradients makes views of the path accumulator, one per matrix, once.
        totals.append([counts for i, counts in enumerate(steps) if i])
        for counts in (*steps, passes):
            assert not [n for n in counts if "_local_scalar_dense" in n or "is_nonzero" in n or "aten::equal" in n]
        assert passes["igulora::orthogonality_grad_"] == 17
    assert totals[0] == totals[1]
    assert max(sum(counts.values()) for counts in totals[0]) > 0


@pytest.mark.parametrize("estimator", ["gauss", "stratified", "trapezoid", "on-path", "on-path-stratified"])
@pytest.mark.parametrize("aggregate", ["signed", "absolute"])
def test_no_estimator_reads_from_the_device(net, config, trainer, batches, loss_of, estimator, aggregate) -> None:
    run = trainer(net(), config(estimator=estimator, aggregate=aggregate, include_f0=True, modules_to_save=["head"]))
    steps, passes = counted(*run, batches, loss_of)
    for counts in (*steps, passes):
        assert not [n for n in counts if "_local_scalar_dense" in n]


# -- determinism, trace, the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["gauss", "stratified", "trapezoid", "on-path", "instantaneous"])
def test_same_seed_same_bits(net, config, trainer, run, batches, estimator) -> None:
    ends = []
    for seed in (0, 0, 1):
        model, controller, optimizer = trainer(net(), config(estimator=estimator, seed=seed, dropout=0.1))
        torch.manual_seed(seed)
        losses = run(model, controller, optimizer, batches(16))
        ends.append((losses, model.igulora_bank.weight.clone(), controller.importance.mean.clone(), controller.history))
    assert ends[0][0] == ends[1][0] != ends[2][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1:3], ends[1][1:3], strict=True))
    assert ends[0][3] == ends[1][3]


def test_series(net, config, trainer, run, batches) -> None:
    model, controller, optimizer = trainer(net(), config(), trace=["head"])
    run(model, controller, optimizer, batches(16))
    series = controller.series
    assert list(series) == ["head"]
    assert [entry["step"] for entry in series["head"]] == [2, 4, 6, 8, 10, 12, 14]
    for entry in series["head"]:
        assert entry["snr"] == entry["mean"] / (entry["deviation"] + 1e-6)
    beta, mean = model.igulora_config.beta1, 0.0
    for entry in series["head"]:
        mean = beta * mean + (1 - beta) * entry["y"]
        assert entry["mean"] == pytest.approx(mean, rel=1e-4)


def test_lora_steps_and_keeps_every_rank(net, trainer, run, batches) -> None:
    model, controller, optimizer = trainer(net(), igulora.IGUConfig(method="lora", target_rank=2))
    losses = run(model, controller, optimizer, batches(1) * 30)
    assert losses[-1] < losses[0]
    assert controller.phase == "final"
    assert controller.budget == 8
    assert set(controller.live_ranks().values()) == {2}
    assert controller.history == []
    assert controller.global_step == 30


def test_autocast_around_the_whole_step(net, config, trainer, batches, loss_of) -> None:
    model, controller, optimizer = trainer(net(), config(orthogonality=0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for batch in batches(16):
            controller.backward(loss_of(model), batch)
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
    assert sum(controller.live_ranks().values()) == 8
    assert isinstance(model.first, FusedSVDLinear)


# -- loops that send the loss backward themselves ---------------------------------------------------------------------


def sampled(net, config, trainer, batches, options, **changes):
    """Path accumulator and gradient after one micro-batch of a net whose lambda is not zero."""
    model, controller, _ = trainer(net(), config(ig_fraction=0.5, orthogonality=0.2, **options))
    for layer in model.igulora_bank.layers:
        nn.init.normal_(layer.lora_E, generator=torch.Generator().manual_seed(1))
    changes = {key: make(model) for key, make in changes.items()}
    loss_fn = changes.pop("loss_fn", lambda b: (model(b[0]) - b[1]).square().mean())
    loss = controller.backward(loss_fn, batches(1)[0], **changes)
    return loss, controller.bank.path.clone(), controller.bank.grad.clone()


PASSES = [
    {"path_pass": "mixed"}, {"path_pass": "separate"}, {"estimator": "trapezoid", "include_f0": True},
    {"estimator": "trapezoid", "include_f0": True, "path_pass": "separate"}, {"estimator": "on-path-stratified"},
]  # fmt: skip


@pytest.mark.parametrize("options", PASSES, ids=str)
def test_a_sum_over_items_is_sampled_as_a_mean(net, config, trainer, batches, options) -> None:
    """The loss over 24 items of a whole accumulation, six of them here: a quarter of the gradient, and the samples of the mean."""
    wanted = sampled(net, config, trainer, batches, options, step_scale=lambda m: 4.0)
    got = sampled(
        net, config, trainer, batches, options,
        loss_fn=lambda m: lambda b: (m(b[0]) - b[1]).square().mean(1).sum() / 24.0,
        items=lambda m: torch.tensor(24.0), step_scale=lambda m: 1.0,
    )  # fmt: skip
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(4.0 * got[2], wanted[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", PASSES, ids=str)
def test_a_scale_only_the_device_knows(net, config, trainer, batches, options) -> None:
    """A loss scaler's factor as a tensor: the samples do not carry it, everything in the gradient does."""
    wanted = sampled(net, config, trainer, batches, options)
    got = sampled(
        net, config, trainer, batches, options,
        scale=lambda m: torch.tensor(1024.0), step_scale=lambda m: torch.tensor(1024.0),
    )  # fmt: skip
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(got[2] / 1024.0, wanted[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", PASSES, ids=str)
def test_a_backward_in_the_loops_own_code(net, config, trainer, batches, options) -> None:
    """It is given the training batch with what a mixed batch adds, and a factor that makes up for that."""
    calls = []

    def make(model):
        def train(batch, factor):
            loss = (model(batch[0]) - batch[1]).square().mean()
            calls.append((batch[0].shape[0], factor))
            (loss if factor is None else loss * factor).backward()
            return loss.detach() if factor is None else (loss * factor).detach()

        return train

    wanted = sampled(net, config, trainer, batches, options)
    got = sampled(net, config, trainer, batches, options, train=make)
    torch.testing.assert_close(got[1:], wanted[1:], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(got[0], wanted[0])
    ((rows, factor),) = calls
    mixed = options.get("path_pass", "mixed") == "mixed" and options.get("estimator") != "on-path-stratified"
    assert rows == ((12 if "include_f0" in options else 9) if mixed else 6)
    assert (factor is not None) == mixed


def test_the_summary_is_what_the_other_attributes_say(net, config, trainer, batches, run) -> None:
    model, controller, optimizer = trainer(net(), config(orthogonality=0.1))
    assert controller.summary().keys() == {"step", "budget", "phase", "live", "rank_mean", "rank_min", "rank_max"}
    run(model, controller, optimizer, batches(20))
    summary, ranks = controller.summary(), list(controller.live_ranks().values())
    assert (summary["step"], summary["budget"], summary["phase"], summary["live"]) == (20, 8, 2, sum(ranks))
    assert (summary["rank_mean"], summary["rank_min"], summary["rank_max"]) == (2.0, min(ranks), max(ranks))
    scores = controller.importance.triplet_scores()[controller.bank.live > 0]
    assert summary["score_mean"] == pytest.approx(float(scores.mean()), rel=1e-5)
    assert (summary["score_min"], summary["score_max"]) == (float(scores.min()), float(scores.max()))
    assert summary["penalty"] == float(controller.penalty)


def test_start_step_goes_on_along_the_schedule_when_the_scores_are_there(
    net: Any, config: Any, batches: Any, run: Any, trainer: Any, loss_of: Any
) -> None:
    """Of a run that kept only its adapter. Of the allocations at 10, 12, 14 and 15 the first comes before the third score update."""
    model, ctl, opt = trainer(net(), config(window=1))
    run(model, ctl, opt, batches(9))
    again = igulora.Controller(model, start_step=9)
    assert (again.global_step, again.budget, again.phase) == (9, ctl.budget, "pruning")
    infos = []
    for batch in batches(11):
        again.backward(loss_of(model), batch)
        opt.step()
        infos.append(again.step())
        opt.zero_grad()
    assert [info.step for info in infos if info.allocated] == [12, 14, 15]
    assert sum(again.live_ranks().values()) == again.budget == 8
    state = again.state_dict()
    assert state["meta"]["start_step"] == 9


def test_start_step_at_the_end_trains_a_finished_adapter_on(
    net: Any, config: Any, batches: Any, run: Any, trainer: Any, tmp_path: Any
) -> None:
    model, ctl, opt = trainer(net(), config(orthogonality=0.1))
    run(model, ctl, opt, batches(20))
    igulora.save_adapter(model, tmp_path / "adapter")
    fresh = igulora.load_adapter(net(), tmp_path / "adapter")
    ctl = igulora.Controller(fresh, start_step=20)
    before, ranks = ctl.bank.weight.clone(), ctl.live_ranks()
    run(fresh, ctl, torch.optim.AdamW(igulora.param_groups(fresh, lr=1e-2)), batches(30))
    assert ctl.live_ranks() == ranks
    assert ctl.phase == "final"
    assert ctl.history == []
    assert not torch.equal(ctl.bank.weight, before)
    pruned = ctl.bank.live == 0
    assert pruned.any()
    assert not ctl.bank.mask[pruned].any()


@pytest.mark.parametrize("step", [-1, True, 2.0])
def test_start_step_is_a_number_of_steps(step: Any, net: Any, config: Any) -> None:
    with pytest.raises(ValueError, match="expected an int start_step >= 0, got"):
        igulora.Controller(igulora.adapt(net(), config()), start_step=step)
