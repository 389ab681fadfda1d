"""Path samples: mixed batches equal separate passes, and estimators converge as Theorem 1 says."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import igulora
from igulora.quadrature import Quadrature, gauss_legendre

transformers = pytest.importorskip("transformers")


def tiny_lm() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config).double()


class Regressor(nn.Module):
    """A model with a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh())
        self.head = nn.Linear(10, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.head(self.body(x)).squeeze(-1) - y).square().mean()


def lm_batch(rows: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (rows, 9), generator=generator)
    labels = ids.clone()
    for i in range(rows):  # every sequence has another number of loss terms
        labels[i, : 1 + 2 * (i % 4)] = -100
    return {"input_ids": ids, "labels": labels}


def assert_near(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the norm: transformers computes norms, attention and loss in float32 even for a float64 model."""
    assert wanted.norm() > 0
    error = float((got - wanted).norm() / wanted.norm())
    assert error < tolerance, error


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Lambdas away from 0, as after some training."""
    bank = igulora.find_bank(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bank.lambdas.copy_(torch.randn(bank.triplets, generator=generator, dtype=bank.dtype))
    return model


OPTIONS = [
    {"estimator": "gauss"},
    {"estimator": "gauss", "nodes": 1, "path": "factors"},
    {"estimator": "stratified", "ig_every": 2},
    {"estimator": "trapezoid"},
    {"estimator": "trapezoid", "include_f0": True},
    {"estimator": "trapezoid", "include_f0": True, "weights": "eq6", "aggregate": "absolute"},
    {"estimator": "stratified", "aggregate": "absolute", "path": "factors"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_mixed_batch_equals_separate_passes(options: dict[str, object]) -> None:
    """Gradients and the score states that the path accumulator leads to agree."""
    results = {}
    for how in ("mixed", "separate"):
        config = igulora.IGUConfig(
            r=4,
            target_rank=2,
            total_steps=100,
            window=4,
            path_pass=how,
            init="orthonormal",
            **{"ig_every": 1, "ig_fraction": 0.5, **options},
        )
        model = shaken(igulora.adapt(tiny_lm(), config))
        ctl = igulora.Controller(model, accumulation_steps=2)
        for i in range(4):
            ctl.backward(lambda b, m=model: m(**b).loss, lm_batch(5, i))
            if i % 2:
                ctl.step()
        results[how] = (ctl.bank.grad.clone(), ctl.importance.mean.clone(), ctl.importance.updates)
    assert results["mixed"][2] == results["separate"][2] == 1
    for mixed, separate in zip(results["mixed"][:2], results["separate"][:2], strict=True):
        assert_near(mixed, separate)


def test_path_rows_leave_training_gradients_and_saved_modules_alone() -> None:
    """A mixed batch trains adapters and head exactly as the training rows alone would."""
    config = igulora.IGUConfig(
        r=3,
        target_rank=2,
        total_steps=100,
        window=2,
        ig_every=1,
        ig_fraction=0.5,
        modules_to_save=["head"],
        orthogonality=0.0,
    )
    torch.manual_seed(0)
    model = shaken(igulora.adapt(Regressor().double(), config))
    plain = copy.deepcopy(model)
    x, y = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    igulora.Controller(model).backward(lambda b: model(*b), (x, y))
    plain(x, y).backward()
    theirs = dict(plain.named_parameters())
    for name, param in model.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(param.grad, theirs[name].grad, rtol=1e-10, atol=1e-13)
    assert igulora.find_bank(model).path.abs().max() > 0


def test_on_path_sample_is_the_section_1_gradient() -> None:
    """On the path "delta" the sample carries no factor alpha, the training gradient does."""
    config = igulora.IGUConfig(
        r=3, target_rank=2, total_steps=100, window=2, ig_every=1, estimator="on-path", orthogonality=0.0
    )
    model = shaken(igulora.adapt(tiny_lm(), config))
    ctl = igulora.Controller(model)
    alpha = copy.deepcopy(ctl.passes.quadrature).on_path(None)[0]
    ctl.backward(lambda b: model(**b).loss, lm_batch(4, 0))
    # Two scored micro-batches a window: this one enters with weight 1/2.
    assert_near(ctl.bank.grad, 2 * alpha * ctl.bank.path)
    assert 0 < alpha <= 1


def test_stratified_on_path_visits_every_stratum_once() -> None:
    """Each sequence of a micro-batch draws alpha from a stratum of its own, and trains at it."""
    config = igulora.IGUConfig(
        r=3, target_rank=2, total_steps=100, window=2, ig_every=1, estimator="on-path-stratified"
    )
    model = shaken(igulora.adapt(tiny_lm(), config))
    ctl = igulora.Controller(model)
    drawn = copy.deepcopy(ctl.passes.quadrature).on_path(8)
    assert sorted(int(a * 8 - 1e-9) for a in drawn) == list(range(8))
    assert all(0 < a <= 1 for a in drawn)
    ctl.backward(lambda b: model(**b).loss, lm_batch(8, 0))
    by_hand = torch.zeros_like(ctl.bank.path)
    batch = lm_batch(8, 0)
    total = (batch["labels"][:, 1:] != -100).sum()
    for i, alpha in enumerate(drawn):
        row = {k: v[i : i + 1] for k, v in batch.items()}
        share = (row["labels"][:, 1:] != -100).sum() / total
        by_hand += share * section_1_gradient(model, row, alpha)
    assert_near(2 * ctl.bank.path, by_hand)


def section_1_gradient(model: nn.Module, batch: dict[str, torch.Tensor], alpha: float) -> torch.Tensor:
    """The gradient of ALGORITHMS section 1 at alpha, by a path pass of weight 1, flat; T is restored."""
    bank = igulora.find_bank(model)
    before, where = bank.path.clone(), torch.tensor([alpha], dtype=bank.dtype)
    bank.path.zero_()
    with bank.context.at(where, 0, 0, torch.ones_like(where)):
        model(**batch).loss.backward()
    gradient = bank.path.clone()
    bank.path.copy_(before)
    return gradient


def smooth(alpha: float) -> float:
    """An integrand with the integral (1 - exp(-3)) / 3 + sin(2) / 2 over [0, 1]."""
    return float(
        torch.exp(torch.tensor(-3.0 * alpha, dtype=torch.float64))
        + torch.cos(torch.tensor(2.0 * alpha, dtype=torch.float64))
    )


EXACT = float(
    (1 - torch.exp(torch.tensor(-3.0, dtype=torch.float64))) / 3 + torch.sin(torch.tensor(2.0, dtype=torch.float64)) / 2
)


def estimate(estimator: str, window: int, seed: int, **options: object) -> float:
    """One window's integral of ``smooth``."""
    config = igulora.IGUConfig(
        r=4, target_rank=2, total_steps=10_000_000, window=window, ig_every=1, estimator=estimator, seed=seed, **options
    )
    quadrature, total = Quadrature(config), 0.0
    for _ in range(window):
        sample = quadrature.sample(1)
        pairs = zip(itertools.chain(*sample.alphas), itertools.chain(*sample.factors), strict=True)
        total += sum(u * smooth(a) for a, u in pairs) + sample.endpoint * smooth(1.0)
    return total / window


def rms_error(estimator: str, window: int, **options: object) -> float:
    errors = torch.tensor([estimate(estimator, window, seed, **options) - EXACT for seed in range(60)])
    return float(errors.square().mean().sqrt())


def test_trapezoid_sampling_error_falls_with_the_root_of_the_window() -> None:
    """Theorem 1: O(M^-1/2). Sixteen times the mini-batches, a quarter of the error (60 seeds: within a third)."""
    ratio = rms_error("trapezoid", 16, include_f0=True) / rms_error("trapezoid", 256, include_f0=True)
    assert 4 / 1.4 < ratio < 4 * 1.4


def test_stratified_error_falls_faster_than_one_over_the_window() -> None:
    assert rms_error("stratified", 8) / rms_error("stratified", 64) > 8


def test_gauss_window_is_the_exact_rule() -> None:
    """Nodes taken in turn over a window make the Gauss rule, whether or not their number divides the window."""
    points, weights = gauss_legendre(3)
    rule = sum(w * smooth(p) for p, w in zip(points, weights, strict=True))
    assert abs(rule - EXACT) < 2e-4
    for window in (3, 6, 16):
        assert estimate("gauss", window, 0) == pytest.approx(rule, rel=1e-12)


def test_eq6_underweighs_the_interior() -> None:
    """Eq. 6 as printed gives a constant integrand the integral 2/N, appendix A.1 gives 1."""
    for weights, expected in (("eq6", 2 / 20), ("trapezoid", 1.0)):
        config = igulora.IGUConfig(
            r=2, target_rank=1, total_steps=1000, estimator="trapezoid", weights=weights, include_f0=True
        )
        sample = Quadrature(config).sample(1)
        assert sum(itertools.chain(*sample.factors)) + sample.endpoint == pytest.approx(expected)
    for include_f0 in (False, True):
        config = igulora.IGUConfig(r=2, target_rank=1, total_steps=1000, estimator="trapezoid", include_f0=include_f0)
        sample = Quadrature(config).sample(3)
        assert sum(f[0] for f in sample.factors) + sample.endpoint == pytest.approx(1.0)
        assert len(sample.alphas) == 1 + include_f0


def test_ig_every_scores_every_kth_micro_batch_and_keeps_the_mean() -> None:
    """With a loss whose gradient does not change, scoring fewer micro-batches gives the same T."""
    found = []
    for every in (1, 2, 4):
        config = igulora.IGUConfig(
            r=4, target_rank=2, total_steps=100, window=4, ig_every=every, ig_fraction=1.0, estimator="gauss", nodes=1
        )
        model = shaken(igulora.adapt(tiny_lm(), config))
        ctl = igulora.Controller(model, accumulation_steps=4)
        calls = []
        for _ in range(4):
            ctl.backward(lambda b, m=model, c=calls: c.append(len(b["input_ids"])) or m(**b).loss, lm_batch(3, 0))
        assert calls.count(6) == 4 // every + 1  # once more to check that the loss is a mean
        found.append(ctl.bank.path.clone())
    for other in found[1:]:
        assert_near(other, found[0])


def test_discretisation_error_falls_with_the_square_of_the_nodes() -> None:
    """Theorem 1: O(N^-2). The mean over all of the library's interior nodes is the composite trapezoid."""
    errors = {}
    for n in (5, 10, 20):
        config = igulora.IGUConfig(
            r=2, target_rank=1, total_steps=1000, estimator="trapezoid", nodes=n, include_f0=True
        )
        quadrature, nodes = Quadrature(config), set()
        while len(nodes) < n - 1:
            sample = quadrature.sample(1)
            nodes.add(sample.alphas[0][0])
        interior, end = sample.factors[0][0], sample.factors[1][0]
        mean = sum(smooth(a) for a in nodes) / len(nodes)
        errors[n] = abs(end * smooth(0.0) + interior * mean + sample.endpoint * smooth(1.0) - EXACT)
    assert 3.8 < errors[5] / errors[10] < 4.2, errors
    assert 3.8 < errors[10] / errors[20] < 4.2, errors


LOSSES = {
    "sum": lambda out, y: (out - y).square().sum(),
    "weighted": lambda out, y: ((out - y).square() * y.abs()).sum() / y.abs().sum(),
    "coupled": lambda out, y: (out - y).square().mean() + out.std(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_no_mean_is_refused_for_mixed_batches(name: str) -> None:
    config = igulora.IGUConfig(
        r=3, target_rank=2, total_steps=100, window=2, ig_every=1, ig_fraction=0.5, init="orthonormal"
    )
    torch.manual_seed(0)
    model = shaken(igulora.adapt(Regressor().double(), config))
    ctl = igulora.Controller(model)
    x, y = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    before = [p.grad.clone() for p, _ in ctl.bank._grad_views]
    # Going on after the error does not silence it; the rows drawn next show a sum for certain, weights only mostly.
    for _ in range(2 if name == "sum" else 1):
        with pytest.raises(ValueError, match="be the mean over their terms .*path_pass="):
            ctl.backward(lambda b: LOSSES[name](model.head(model.body(b[0])).squeeze(-1), b[1]), (x, y))
    assert model.training
    for (param, _), grad in zip(ctl.bank._grad_views, before, strict=True):
        assert torch.equal(param.grad, grad)


def test_only_mixed_micro_batches_have_a_joint_loss() -> None:
    config = igulora.IGUConfig(r=3, target_rank=2, total_steps=100, window=2, ig_every=2, ig_fraction=0.5)
    model = shaken(igulora.adapt(tiny_lm(), config))
    ctl, found = igulora.Controller(model), []
    for i in range(4):
        loss = ctl.backward(lambda b: model(**b).loss, lm_batch(4, i))
        found.append(ctl.last_loss_is_joint)
        with torch.no_grad():
            alone = float(model(**lm_batch(4, i)).loss)
        assert (float(loss) == pytest.approx(alone, rel=1e-6)) is not ctl.last_loss_is_joint
        ctl.step()
    assert found == [True, False, True, False]


def test_path_rows_without_a_label_are_no_fault_of_the_loss() -> None:
    """The mean over no terms is NaN: the first mixed batches of such data say nothing of the loss, and sample nothing wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))
    options = igulora.IGUConfig(r=2, total_steps=40, window=2, ig_every=1, ig_fraction=0.25, init_lambda=0.5)
    igulora.adapt(model, options)
    controller = igulora.Controller(model)
    opt = torch.optim.SGD(igulora.param_groups(model, lr=1e-3))

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["ids"]).transpose(1, 2), batch["labels"], ignore_index=-100)

    ids = torch.randint(9, (4, 5))
    labels = ids.clone()
    labels[:2] = -100
    for _ in range(12):  # whichever row is drawn
        controller.backward(loss, {"ids": ids, "labels": labels})
        opt.step()
        controller.step()
        assert model[1].lora_Q.grad.isfinite().all()
        assert controller.bank.path.isfinite().all()
    assert controller.importance.updates == 6
