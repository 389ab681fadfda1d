"""Whole steps as a training loop takes them: no wait for the device, errors of the dtype, fallbacks, the compiler, checkpointing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import igulora
from igulora.kernels import svd_linear
from igulora.kernels.backend import MAX_RANK, ReferenceWarning, runs_fused, use_backend

from ..kernels.fused.exactness import assert_exact, compiled_anew  # noqa: F401
from .steps import DTYPES, Inputs, Size, adapted, options

ESTIMATORS = {
    "mixed": {"estimator": "gauss"},
    "separate": {"estimator": "gauss", "path_pass": "separate"},
    "on-path": {"estimator": "on-path"},
    "instantaneous": {"estimator": "instantaneous"},
    "hard, by parameters": {"estimator": "gauss", "prune": "hard", "budget_unit": "parameters", "min_rank": 1},
}


# -- no wait for the device -----------------------------------------------------------------------------------------------


@contextmanager
def without_sync(device: torch.device) -> Iterator[None]:
    """Whatever waits for the device inside the block raises."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def controlled_steps(
    device: torch.device, changes: dict[str, object], count: int, trace: str | tuple[str, ...] = ()
) -> list[igulora.StepInfo]:
    """Steps in the pruning phase, each with a score update, none of which may wait for the device."""
    config = options(device, window=1, t_init=3, t_final=20, delta_t=1, dropout=0.1, **changes)
    model = adapted(device, DTYPES[-1], config)
    optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=1e-3), fused=True)
    controller = igulora.Controller(model, trace=trace)

    def step(batch: dict[str, Tensor]) -> igulora.StepInfo:
        controller.backward(lambda b: (model(b["x"]) - b["y"]).float().square().mean(), batch)
        optimizer.step()
        info = controller.step()
        optimizer.zero_grad()
        return info

    inputs = [Inputs.draw(device, DTYPES[-1], seed) for seed in range(4 + count)]
    batches = [{"x": i.x, "y": i.target} for i in inputs]
    for batch in batches[:4]:  # compiles, allocates, and compares the loss of the first mixed batch with its parts
        step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    with without_sync(device):
        infos = [step(batch) for batch in batches[4:]]
    assert sum(controller.live_ranks().values()) <= model.igulora_bank.triplets
    assert all(layer.lora_P.isfinite().all() for layer in model.igulora_bank.layers)
    return infos


@pytest.mark.gpu
@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_step_waits_for_the_device(device, name) -> None:
    infos = controlled_steps(device, ESTIMATORS[name], count=4)
    assert all(info.scored and info.allocated for info in infos)


@pytest.mark.gpu
def test_no_traced_step_waits_for_the_device(device) -> None:
    controlled_steps(device, ESTIMATORS["mixed"], count=2, trace="all")


def path_gradient(device: torch.device, where: torch.device, path_pass: str) -> Tensor:
    """T of two scored micro-batches whose tensors lie ``where``; the loss function brings them to the device, which is busy meanwhile."""
    model = adapted(device, torch.float32, options(device, path_pass=path_pass, window=8, t_init=24, ig_fraction=0.5))
    controller = igulora.Controller(model)
    model.igulora_bank.context.allowed_unstepped = 8
    for seed in range(3):
        inputs = Inputs.draw(device, torch.float32, seed)
        batch = {"x": inputs.x.to(where), "y": inputs.target.to(where)}
        if device.type == "cuda" and seed:  # the first one compares losses, and waits for the device
            torch.cuda._sleep(200_000_000)
        controller.backward(
            lambda b: (model(b["x"].to(device)) - b["y"].to(device)).square().mean(),
            batch,
        )
    return model.igulora_bank.path.clone()


@pytest.mark.gpu
@pytest.mark.parametrize("path_pass", ["mixed", "separate"])
def test_a_batch_on_the_host_gives_the_same_path_gradient(device, path_pass) -> None:
    found = [path_gradient(device, where, path_pass) for where in (device, torch.device("cpu"))]
    assert torch.equal(*found)


@pytest.mark.gpu
def test_a_model_need_not_lie_on_the_current_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found = []
    for index in range(2):
        where = torch.device("cuda", index)
        model = adapted(where, torch.float32, options(where))
        inputs = Inputs.draw(where, torch.float32, seed=1)
        assert torch.cuda.current_device() == 0
        (model(inputs.x) - inputs.target).square().mean().backward()
        found.append(igulora.find_bank(model).grad.cpu())
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.slow
def test_steps_score_and_allocate(device) -> None:
    (info,) = controlled_steps(device, ESTIMATORS["mixed"], count=1)
    assert info.scored
    assert info.allocated


# -- errors -----------------------------------------------------------------------------------------------------------------


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, P: Tensor, E: Tensor, Q: Tensor, mask: Tensor, alpha: Tensor
) -> Tensor:
    """The layer in PyTorch, in x's dtype."""
    T = (x @ Q.to(x.dtype).t()) * alpha.view(-1, 1, 1).to(x.dtype)
    return F.linear(x, weight, bias) + (T * (0.5 * mask * E).to(x.dtype)) @ P.to(x.dtype)


def with_gradients(call: Callable[..., Tensor], operands: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of x and the masters."""
    wanted = {name: operands[name].detach().requires_grad_() for name in ("x", "P", "E", "Q")}
    y = call(**{**operands, **wanted})
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, tuple(wanted.values()), dy), strict=True))}


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float32, torch.float16], ids=str
)
def test_errors_are_at_most_twice_those_of_pytorch(device, dtype) -> None:
    n, L, K, N, r = (4, 130, 520, 392, 24) if device.type == "cuda" else (2, 7, 24, 20, 5)
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=g) * size).to(device, kind)

    operands = {
        "x": normal(n, L, K, kind=dtype),
        "weight": normal(N, K, size=K**-0.5, kind=dtype),
        "bias": normal(N, kind=dtype),
        "P": normal(r, N, size=r**-0.5),
        "E": normal(r),
        "Q": normal(r, K, size=K**-0.5),
        "mask": (torch.rand(r, generator=g) > 0.2).float().to(device),
        "alpha": torch.rand(n, generator=g).to(device),
    }
    dy = normal(n, L, N, kind=dtype)
    ours = with_gradients(lambda alpha, **t: svd_linear(*t.values(), alpha, scale=0.5), operands, dy)
    same = with_gradients(plain, operands, dy)
    exact = with_gradients(plain, {name: t.double() for name, t in operands.items()}, dy.double())
    for name in exact:
        assert_exact(ours[name], same[name], exact[name])


# -- fallbacks --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_device_runs_the_kernels_unless_a_case_is_beyond_them(device) -> None:
    capability = torch.cuda.get_device_capability(device)
    with use_backend(None), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ReferenceWarning)
        assert runs_fused(torch.empty(1, dtype=torch.bfloat16, device=device), 32) is (capability >= (8, 0))
        if capability >= (8, 0):
            assert not caught
        assert not runs_fused(torch.empty(1, dtype=torch.float64, device=device))
        assert not runs_fused(torch.empty(1, dtype=torch.bfloat16, device=device), MAX_RANK + 1)


@pytest.mark.gpu
def test_what_the_kernels_cannot_take_runs_by_reference(device) -> None:
    model = adapted(device, torch.float64, options(device))
    x = Inputs.draw(device, torch.float64, seed=1).x
    with use_backend("triton"), pytest.raises(ValueError, match="the dtype is torch.float64"):
        model(x)
    with use_backend("reference"):
        expected = model(x)
    with use_backend(None), warnings.catch_warnings():
        warnings.simplefilter("ignore", ReferenceWarning)  # told once per process: perhaps already
        assert torch.equal(model(x), expected)


def test_both_backends_agree(device) -> None:
    """Within float32's rounding, over a forward and backward of the whole block."""
    model = adapted(device, torch.float32, options(device))
    inputs, found = Inputs.draw(device, torch.float32, seed=1), {}
    bank = igulora.find_bank(model)
    for backend in ("triton", "reference"):
        with use_backend(backend):
            bank.grad.zero_()
            (model(inputs.x) - inputs.target).square().mean().backward()
            found[backend] = bank.grad.clone()
    scale = found["reference"].abs().max().item()
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-4, atol=1e-5 * scale)


# -- torch.compile ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dropout", [0.0] + [0.3] * torch.cuda.is_available())
def test_a_compiled_llama_takes_the_step_of_an_eager_one(device, dropout) -> None:
    """Without a graph break. With dropout the compiler draws seeds of its own, so that only a finite step is asked for."""
    transformers = pytest.importorskip("transformers")
    wide = device.type == "cuda"
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=128 if wide else 16,
            intermediate_size=192 if wide else 24,
            num_hidden_layers=2 if wide else 1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).to(device)
    model = igulora.adapt(llama, options(device, dropout=dropout, estimator="instantaneous")).train()
    bank = igulora.find_bank(model)
    bank.context.allowed_unstepped = 8
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1)).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if wide else "aot_eager")
    losses, grads = [], []
    for forward in (model, compiled):
        bank.grad.zero_()
        bank.bind_grads()
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append(bank.grad.clone())
    assert grads[1].isfinite().all()
    assert grads[1].any()
    if not dropout:
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3 * grads[0].abs().max().item())


# -- activation checkpointing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_drops_what_the_forward_dropped(device, dtype, reentrant) -> None:
    size = Size.on(device)
    block = adapted(device, dtype, options(device, dropout=0.3)).train()
    bank = igulora.find_bank(block)
    x = Inputs.draw(device, dtype, seed=1).x[: size.train].requires_grad_()

    def through(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Gradients of two passes of the block, one after the other: their masks differ."""
        bank.grad.zero_()
        x.grad = None
        torch.manual_seed(3)
        call(call(x)[..., : size.features]).float().square().mean().backward()
        assert x.grad is not None
        return [bank.grad.clone(), x.grad]

    kept, recomputed = through(block), through(lambda t: checkpoint(block, t, use_reentrant=reentrant))
    assert kept[0].any()
    for ours, expected in zip(recomputed, kept, strict=True):
        assert torch.equal(ours, expected)
