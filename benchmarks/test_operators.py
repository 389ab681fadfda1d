"""Times of the operators, each beside the plain PyTorch that it replaces: a group for each, two entries in it.

    pytest benchmarks                              # SmolLM2's shapes on a CPU, 4096-wide layers where there is a CUDA device
    pytest benchmarks -k svd_linear                # some of them
    pytest benchmarks --tiny --benchmark-disable   # do they run, and compute the same

Both entries of a group compute the same from the same numbers, and are compared before either is timed. A time is that
of a call from Python until the device is done; what the kernels take by themselves is measured by ``gpu_kernels.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from igulora.kernels import (
    allocate_triplets,
    importance_update,
    orthogonality_grad_,
    svd_linear,
    svd_project,
    svd_update,
)
from igulora.kernels.importance import row_table
from igulora.kernels.orthogonality import work_table

GAMMA = 0.1
BETA, EPS = 0.85, 1e-6
BOTH = pytest.mark.parametrize("which", ["igulora", "pytorch"])
ALLOCATED = (10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class Setting:
    """Shapes of a model.

    Attributes:
        device, dtype: of activations and frozen weights; adapters are float32.
        sequences, length: of the training batch. path: sequences appended to it as path rows.
        linears: (in, out) features of the adapted layers of a block; the first three read one input. blocks: how many blocks.
        rank: triplets of each layer.
    """

    device: torch.device
    dtype: torch.dtype
    sequences: int
    length: int
    path: int
    linears: tuple[tuple[int, int], ...]
    blocks: int
    rank: int

    @property
    def lengths(self) -> dict[int, int]:
        """How many matrices of the model have rows of a length, P and Q together."""
        every = [length for features in self.linears for length in features]
        return {length: self.blocks * every.count(length) for length in sorted(set(every))}

    @property
    def layers(self) -> int:
        """Adapted layers of the model."""
        return self.blocks * len(self.linears)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers, of the setting's dtype by default."""
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)


def _llama(width: int, kv: int, hidden: int) -> tuple[tuple[int, int], ...]:
    """q, k, v, o, gate, up and down of a block."""
    return ((width, width), (width, kv), (width, kv), (width, width), (width, hidden), (width, hidden), (hidden, width))


@pytest.fixture(scope="module")
def setting(pytestconfig: pytest.Config) -> Setting:
    """The shapes of this run."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if pytestconfig.getoption("--tiny"):
        return Setting(device, torch.float32, 3, 5, 2, _llama(32, 16, 48), 2, 4)
    if cuda:
        return Setting(device, torch.bfloat16, 4, 512, 1, _llama(4096, 4096, 11008), 32, 32)
    return Setting(device, torch.bfloat16, 4, 128, 1, _llama(576, 192, 1536), 30, 32)


def _leaves(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def compare(
    benchmark: Any,
    group: str,
    which: str,
    ours: Callable[[], Any],
    plain: Callable[[], Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Check that both compute the same, then time one of them.

    Args:
        group: what they are shown under. which: "igulora" or "pytorch".
        ours, plain: return a tensor or several; in the same order.
        dtype: the coarsest that intermediate results have.
    """
    for i, (a, b) in enumerate(zip(_leaves(ours()), _leaves(plain()), strict=True)):
        assert a.shape == b.shape
        error, size = (a.double() - b.double()).norm().item(), b.double().norm().item()
        # Relative to the norm: the two round in different places, and single entries may be near 0.
        bound = 4 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-4
        assert error <= bound * size, f"output {i} of {group}: off by {error:.3g} where the norm is {size:.3g}"
    run = ours if which == "igulora" else plain
    cuda = torch.cuda.is_available()

    def timed() -> None:
        run()
        if cuda:
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark(timed)


# -- the adapted layer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer of K inputs and N outputs: x (sequences, length, K), the frozen weight, the float32 factors, and dy."""

    x: Tensor
    weight: Tensor
    P: Tensor
    E: Tensor
    Q: Tensor
    mask: Tensor
    dy: Tensor

    @classmethod
    def of(cls, s: Setting, K: int, N: int, sequences: int) -> Layer:
        torch.manual_seed(0)
        leaf = partial(s.randn, dtype=torch.float32)
        return cls(
            s.randn(sequences, s.length, K).requires_grad_(),
            s.randn(N, K) / K**0.5,
            (leaf(s.rank, N) / s.rank**0.5).requires_grad_(),
            (leaf(s.rank).abs() + 0.5).requires_grad_(),
            (leaf(s.rank, K) / K**0.5).requires_grad_(),
            torch.ones(s.rank, device=s.device),
            s.randn(sequences, s.length, N),
        )

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.P, self.E, self.Q

    def update(self, x: Tensor) -> Tensor:
        """The adapter's share of the output in plain PyTorch, masters cast at use."""
        dtype = x.dtype
        return ((x @ self.Q.to(dtype).t()) * (self.mask * self.E).to(dtype)) @ self.P.to(dtype)

    def plain(self) -> Tensor:
        return F.linear(self.x, self.weight) + self.update(self.x)

    def ours(self) -> Tensor:
        return svd_linear(self.x, self.weight, None, *self.factors, self.mask)

    def both(self, forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """Output, and gradients of x and the factors."""
        y = forward()
        return (y.detach(), *torch.autograd.grad(y, (self.x, *self.factors), self.dy))


def _widest(s: Setting) -> tuple[int, int]:
    return s.linears[4]


@BOTH
def test_svd_linear_forward(benchmark: Any, setting: Setting, which: str) -> None:
    K, N = _widest(setting)
    layer = Layer.of(setting, K, N, setting.sequences)

    def run(forward: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return forward()

    group = f"svd_linear, forward, {K} to {N}"
    compare(benchmark, group, which, partial(run, layer.ours), partial(run, layer.plain), setting.dtype)


@BOTH
def test_svd_linear_forward_and_backward(benchmark: Any, setting: Setting, which: str) -> None:
    K, N = _widest(setting)
    layer = Layer.of(setting, K, N, setting.sequences)
    group = f"svd_linear, forward and backward, {K} to {N}"
    compare(benchmark, group, which, partial(layer.both, layer.ours), partial(layer.both, layer.plain), setting.dtype)


@BOTH
def test_svd_linear_with_path_rows(benchmark: Any, setting: Setting, which: str) -> None:
    """Sequences at a point of the path beside the training ones: y, dx, the training rows' gradients, the path rows' weighted sum."""
    K, N = _widest(setting)
    trained, sequences = setting.sequences, setting.sequences + setting.path
    layer = Layer.of(setting, K, N, sequences)
    make = partial(torch.tensor, device=setting.device)
    alpha = make([1.0] * trained + [0.5] * setting.path)
    weight = make([0.0] * trained + [0.25] * setting.path)
    sums = tuple(torch.zeros_like(t) for t in layer.factors)

    def ours() -> tuple[Tensor, ...]:
        for t in sums:
            t.zero_()
        options: dict[str, Any] = {"train_groups": trained, "path_start": trained, "path_weight": weight, "path": sums}
        y = svd_linear(layer.x, layer.weight, None, *layer.factors, layer.mask, alpha, **options)
        return (y.detach(), *torch.autograd.grad(y, (layer.x, *layer.factors), layer.dy), *sums)

    def plain() -> tuple[Tensor, ...]:
        update = layer.update(layer.x)
        shape = (sequences, 1, 1)
        y = F.linear(layer.x, layer.weight) + alpha.to(update.dtype).view(shape) * update
        dx = torch.autograd.grad(y, layer.x, layer.dy, retain_graph=True)
        # Two kinds of rows, two sums of gradients: autograd has to go through the adapter twice.
        first = torch.autograd.grad(update[:trained], layer.factors, layer.dy[:trained], retain_graph=True)
        weighted = weight[trained:].to(layer.dy.dtype).view(-1, 1, 1) * layer.dy[trained:]
        return (y.detach(), *dx, *first, *torch.autograd.grad(update[trained:], layer.factors, weighted))

    group = f"svd_linear with path rows, forward and backward, {K} to {N}"
    compare(benchmark, group, which, ours, plain, setting.dtype)


@BOTH
def test_svd_project(benchmark: Any, setting: Setting, which: str) -> None:
    """S = x Q^T of the three layers that read one input, and the gradients of their Q."""
    torch.manual_seed(0)
    K = setting.linears[0][0]
    x = setting.randn(setting.sequences * setting.length, K)  # its gradient is part of each layer's own
    Qs = [setting.randn(setting.rank, K, dtype=torch.float32).div_(K**0.5).requires_grad_() for _ in range(3)]
    dS = [setting.randn(len(x), setting.rank) for _ in Qs]

    def both(forward: Callable[[], Iterable[Tensor]]) -> tuple[Tensor, ...]:
        S = list(forward())
        return (*(s.detach() for s in S), *torch.autograd.grad(S, Qs, dS))

    ours = partial(both, lambda: svd_project(x, Qs))
    plain = partial(both, lambda: [x @ Q.to(x.dtype).t() for Q in Qs])
    compare(benchmark, f"svd_project of three layers, forward and backward, {K}", which, ours, plain, setting.dtype)


@BOTH
def test_svd_update(benchmark: Any, setting: Setting, which: str) -> None:
    """The adapter on a base that runs its own forward, here a plain product; its output is overwritten."""
    K, N = _widest(setting)
    layer = Layer.of(setting, K, N, setting.sequences)

    def ours() -> Tensor:
        return svd_update(F.linear(layer.x, layer.weight), layer.x, *layer.factors, layer.mask)

    group = f"svd_update and its base, forward and backward, {K} to {N}"
    compare(benchmark, group, which, partial(layer.both, ours), partial(layer.both, layer.plain), setting.dtype)


# -- the books of a whole model -----------------------------------------------------------------------------------------


def _flat(s: Setting) -> tuple[list[int], int]:
    """(offset, matrices, rank, length) for each row length, as the bank lays them out, and the size of a buffer."""
    groups, offset = [], 0
    for length, matrices in s.lengths.items():
        groups += [offset, matrices, s.rank, length]
        offset += matrices * s.rank * length
    return groups, offset


def _matrices(flat: Tensor, groups: list[int]) -> list[Tensor]:
    """Views of a flat buffer, one per matrix."""
    found: list[Tensor] = []
    for i in range(0, len(groups), 4):
        offset, matrices, rank, length = groups[i : i + 4]
        found += flat[offset : offset + matrices * rank * length].view(matrices, rank, length).unbind()
    return found


@BOTH
def test_importance_update(benchmark: Any, setting: Setting, which: str) -> None:
    """One score update of all weights, beside a loop over the matrices such as AdaLoRA's."""
    torch.manual_seed(0)
    groups, size = _flat(setting)
    regions = [n for i in range(0, len(groups), 4) for n in (groups[i], groups[i + 1] * groups[i + 2], groups[i + 3])]
    table = row_table(regions).to(setting.device)
    weight, path = (setting.randn(size, dtype=torch.float32) for _ in range(2))
    start = [setting.randn(size, dtype=torch.float32).abs() for _ in range(2)]
    states = [t.clone() for t in start]

    def ours() -> Tensor:
        stats, _ = importance_update(weight, path, *states, regions, beta1=BETA, beta2=BETA, eps=EPS, table=table)
        return stats[0]

    each = [_matrices(t, groups) for t in (weight, path, *start)]

    def plain() -> Tensor:
        means = []
        for w, g, mean, deviation in zip(*each, strict=True):
            y = (w * g).abs()
            mean.mul_(BETA).add_(y, alpha=1 - BETA)
            deviation.mul_(BETA).add_((y - mean).abs(), alpha=1 - BETA)
            means.append((mean / (deviation + EPS)).mean(1))
        return torch.cat(means)

    compare(benchmark, f"importance_update, {size / 1e6:.1f}M weights", which, ours, plain)


@BOTH
def test_orthogonality_grad(benchmark: Any, setting: Setting, which: str) -> None:
    """The penalty of all matrices and its gradient, beside autograd over a loop."""
    torch.manual_seed(0)
    groups, size = _flat(setting)
    table = work_table(groups).to(setting.device)
    weight = setting.randn(size, dtype=torch.float32).mul_(0.05)
    grad = torch.zeros_like(weight)

    def ours() -> tuple[Tensor, Tensor]:
        grad.zero_()
        return orthogonality_grad_(weight, grad, groups, GAMMA, table=table), grad

    leaf = weight.clone().requires_grad_()
    eye = torch.eye(setting.rank, device=setting.device)

    def plain() -> tuple[Tensor, Tensor]:
        matrices = _matrices(leaf, groups)
        penalty = sum(torch.linalg.matrix_norm(A @ A.t() - eye) for A in matrices) / len(matrices)
        return penalty.detach(), torch.autograd.grad(GAMMA * penalty, leaf)[0]

    compare(benchmark, f"orthogonality_grad_, {2 * setting.layers} matrices", which, ours, plain)


@BOTH
@pytest.mark.parametrize("triplets", ALLOCATED)
def test_allocate_triplets(
    benchmark: Any, setting: Setting, pytestconfig: pytest.Config, which: str, triplets: int
) -> None:
    """Exact top-b without reading from the device, beside the k-th smallest value as a threshold, read by the host."""
    n = triplets // 100 if pytestconfig.getoption("--tiny") else triplets
    torch.manual_seed(0)
    scores = torch.randperm(n).to(setting.device, torch.float32)  # no ties, which a threshold gets wrong
    layer = torch.arange(n, device=setting.device) // setting.rank
    kept = n // 2
    budget = torch.tensor(kept, device=setting.device)

    def plain() -> Tensor:
        threshold = torch.kthvalue(scores, n - kept).values.item()
        return (scores > threshold).float()

    compare(benchmark, f"allocate_triplets, {n}", which, lambda: allocate_triplets(scores, budget, layer), plain)
