"""Every kind of base layer: forward, gradients, path samples, schedule, merging, files, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import igulora

from .cases import CASES, Case, adapted, assert_near, densified, shaken


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    case = CASES[request.param]
    case.build()  # skips where the package is not installed
    return case


def loss_of(model: nn.Module) -> object:
    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        y = model(batch[0])
        return (y - batch[1].view(-1, *[1] * (y.ndim - 1)).to(y.dtype)).square().mean()

    return loss


def batch_of(case: Case, seed: int, rows: int = 5) -> tuple[Tensor, Tensor]:
    x = case.inputs(seed, rows)
    return x, torch.sin(x.double().flatten(1).sum(1))


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if "lora_" in n and p.grad is not None}


def test_starts_as_the_base(case: Case) -> None:
    x = case.inputs(0, 3)
    plain = case.build()
    model = igulora.adapt(
        case.build(),
        igulora.IGUConfig(r=3, target_rank=2, total_steps=99, init="orthonormal", target_modules=case.targets),
    )
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), plain.train(mode)(x), rtol=0, atol=1e-6)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{n}.lora_{part}" for n in case.targets for part in "PEQ"
    }


# Five vectors and thirty: few take another kernel in packed layers than many do.
@pytest.mark.parametrize("rows", [1, 6])
def test_forward_and_all_gradients_are_those_of_the_dense_weight(case: Case, rows: int) -> None:
    model = adapted(case)
    plain = densified(model)
    x, target = batch_of(case, 0, rows)
    for one in (model, plain):
        loss_of(one)((x, target)).backward()
    assert_near(model(x), plain(x), case.tolerance)
    wanted = grads(plain)
    assert wanted.keys() == {f"{n}.lora_{part}" for n in case.targets for part in "PEQ"}
    for name, grad in grads(model).items():
        assert_near(grad, wanted[name], case.tolerance)


@pytest.mark.parametrize("estimator", ["gauss", "trapezoid"])
def test_a_mixed_batch_equals_separate_passes(case: Case, estimator: str) -> None:
    results = {}
    for how in ("mixed", "separate"):
        model = adapted(case, path_pass=how, estimator=estimator, ig_every=1, ig_fraction=0.5)
        ctl = igulora.Controller(model, accumulation_steps=2)
        for i in range(4):
            ctl.backward(loss_of(model), batch_of(case, i))
            if i % 2:
                ctl.step()
        results[how] = (ctl.bank.grad.clone(), ctl.importance.mean.clone())
    for mixed, separate in zip(results["mixed"], results["separate"], strict=True):
        assert_near(mixed, separate, max(case.tolerance, 1e-9))


def test_path_samples_are_the_gradient_at_alpha(case: Case) -> None:
    """With one node and every row, T is the gradient of W at alpha in P, lambda and Q: autograd's of the dense weights, alpha in lambda."""
    model = adapted(case)
    bank, x = igulora.find_bank(model), case.inputs(3, 4)
    bank.path.zero_()
    alpha = torch.full((4,), 0.3, dtype=bank.dtype)
    with bank.context.at(alpha, 0, 0, torch.ones_like(alpha)):
        model(x).square().sum().backward()
    assert not bank.grad.any()
    with torch.no_grad():
        bank.lambdas.mul_(0.3)
    plain = densified(model)
    plain(x).square().sum().backward()
    got = bank.matrix_views(bank.path)
    for name, wanted in grads(plain).items():
        layer, _, part = name.rpartition(".")
        # W(alpha) is linear in each factor: the gradients of P and Q lack the factor alpha, that of lambda has it already.
        assert_near(got[layer, part], wanted / (1.0 if part == "lora_E" else 0.3), max(case.tolerance, 1e-9))


def test_a_whole_schedule(case: Case, trainer, config) -> None:
    torch.manual_seed(0)
    model, ctl, opt = trainer(case.build(), config(target_modules=case.targets, orthogonality=0.1))
    batch = batch_of(case, 0, 6)
    before = float(loss_of(model)(batch).detach())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    for _ in range(20):
        ctl.backward(loss_of(model), batch)
        opt.step()
        ctl.step()
        opt.zero_grad()
    assert sum(ctl.bank.ranks().values()) == 2 * len(case.targets)
    assert float(loss_of(model)(batch).detach()) < before
    for name, param in model.named_parameters():
        if name in frozen:
            assert torch.equal(_numbers(param), _numbers(frozen[name])), name


def _numbers(t: Tensor) -> Tensor:
    return t.dequantize() if type(t).__module__.startswith("torchao") else t.detach()


def test_peft_959_merging_and_unmerging(case: Case) -> None:
    model, x = shaken(adapted(case), size=0.3).eval(), case.inputs(0, 3)
    y, plain = model(x).detach(), case.build().eval()(x).detach()
    before = {n: _numbers(p).clone() for n, p in model.named_parameters()}
    if not case.merges:
        with pytest.raises(ValueError, match=r"expected weights that can be written, got 'base' \(GGUF\).*export_peft"):
            igulora.merge(model)
        assert torch.equal(model(x), y)  # nothing is changed, in no layer
        with pytest.raises(ValueError, match="expected a weight that can be written"):
            model.base.merge()
        return
    if case.quantised:
        base, update = model.base.base.dense().float(), model.base.delta_weight().detach()
        with pytest.warns(igulora.MergeWarning, match=r"quantised 1 weights anew, .*\(base, "):
            igulora.merge(model)
        assert {n for n, _ in model.named_parameters()} == before.keys()
        errors = igulora.merge_errors(model)
        missed = (model.base.base.dense().float() - (base + update)).norm() / update.norm()
        assert errors == {"first": 0.0, "base": pytest.approx(float(missed))}
        assert 1e-3 < errors["base"] < 1.0
        merged = model(x).detach()
        assert (merged - plain).norm() > 2 * (merged - y).norm()  # the update survived
    else:
        igulora.merge(model)
        torch.testing.assert_close(model(x), y)
        assert set(igulora.merge_errors(model).values()) == {0.0}
    igulora.unmerge(model)
    for name, param in model.named_parameters():
        if case.quantised and not name.startswith("first"):
            assert torch.equal(_numbers(param), before[name]), name
    torch.testing.assert_close(model(x), y)
    with pytest.raises(ValueError, match="expected a merged model"):
        igulora.merge_errors(model)


@pytest.mark.filterwarnings("ignore::igulora.MergeWarning")
def test_removing_gives_the_base_back_and_after_merging_the_merged_one(case: Case) -> None:
    x, kind = case.inputs(0, 3), type(case.build().base)
    model = igulora.remove(adapted(case))
    assert type(model.base) is kind
    assert torch.equal(model(x), case.build()(x))
    if case.merges:
        model = igulora.merge(adapted(case))
        y = model(x)
        igulora.remove(model)
        assert type(model.base) is kind
        assert torch.equal(model(x), y)


def test_saved_and_loaded(case: Case, tmp_path) -> None:
    model, x = adapted(case), case.inputs(0, 3)
    igulora.save_adapter(model, tmp_path)
    other = igulora.load_adapter(case.build(), tmp_path)
    assert torch.equal(other(x), model(x))
    # bitsandbytes does not load its own packed weights with load_state_dict.
    state = {k: v for k, v in model.state_dict().items() if not case.quantised or "lora_" in k}
    igulora.find_bank(other).lambdas.zero_()
    other.load_state_dict(state, strict=not case.quantised)
    assert torch.equal(other(x), model(x))


def test_copies_and_pickles(case: Case) -> None:
    model, x = adapted(case), case.inputs(0, 3)
    y = model(x).detach()  # packed layers settle in their first forward
    twins = [copy.deepcopy(model)]
    if case.pickles:
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(twin(x), y)
        igulora.find_bank(twin).lambdas.zero_()
        assert not torch.equal(twin(x), y)
    assert torch.equal(model(x), y)


def test_disabled_adapters_leave_the_base(case: Case) -> None:
    model, x = adapted(case), case.inputs(0, 3)
    with igulora.adapters_disabled(model):
        assert torch.equal(model(x), case.build()(x))


@pytest.mark.filterwarnings("ignore:PEFT's LoRA runs convolutions:UserWarning")
def test_exported_factors_are_the_update(case: Case, tmp_path) -> None:
    from safetensors.torch import load_file

    model = adapted(case)
    igulora.export_peft(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name in case.targets:
        layer = dict(model.named_modules())[name]
        A, B = (t.flatten(1) for n in "AB" for k, t in stored.items() if f"{name}.lora_" in k and f"_{n}" in k)
        assert_near((B @ A).to(layer.lora_P.dtype), layer.delta_weight().detach(), 1e-5)


# Dynamo makes an instance of every autograd function that it meets, those of bitsandbytes too.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["nf4", "torchao-int8", "gguf-q8_0", "embedding", "conv2d"])
def test_compiled_whole(name: str) -> None:
    case = CASES[name]
    model, x = adapted(case), case.inputs(0, 6)
    twin = copy.deepcopy(model)
    model(x).square().sum().backward()
    torch.compile(twin, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    wanted = grads(model)
    for part, grad in grads(twin).items():
        assert_near(grad, wanted[part], case.tolerance)


def test_a_weight_in_a_form_of_its_own_is_refused_by_name() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"got '0' \(nn.Linear\): its weight is stored as torch.float8_e4m3fn"):
        igulora.adapt(nn.Sequential(layer), igulora.IGUConfig(r=2, target_rank=1, total_steps=99))
