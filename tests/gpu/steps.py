"""A whole step of an adapted attention block, every input of which is a tensor that can be written in place; and its CUDA graph."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

import igulora
from igulora.kernels import allocate_triplets, importance_update, orthogonality_grad_

# Triton's interpreter computes products of bfloat16 wrongly.
DTYPES = [torch.float32] + [torch.bfloat16] * torch.cuda.is_available()
GAMMA = 0.1


@dataclass(frozen=True)
class Size:
    """Of a block and its batch: training sequences, path rows, tokens, features, rank. A device gets more than one block per axis."""

    train: int
    path: int
    length: int
    features: int
    r: int

    @classmethod
    def on(cls, device: torch.device) -> Size:
        """What takes a second or two there."""
        return cls(4, 1, 64, 320, 24) if device.type == "cuda" else cls(2, 1, 6, 32, 3)


class Block(nn.Module):
    """Causal attention, of which q, k and v read one input; written out, since the fused ones' backward adds up in any order."""

    def __init__(self, features: int, length: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(features, features, bias=i == 0) for i in range(3))
        self.o_proj = nn.Linear(features, features + 8)
        self.register_buffer("causal", torch.full((length, length), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + self.causal, -1) @ v
        return self.o_proj(y.transpose(1, 2).flatten(-2))


def adapted(device: torch.device, dtype: torch.dtype, config: igulora.IGUConfig) -> nn.Module:
    """The block with adapters that do something: lambda starts at 0.5."""
    torch.manual_seed(0)
    size = Size.on(device)
    model = igulora.adapt(Block(size.features, size.length).to(device, dtype), config)
    # The guard against a forgotten Controller.step counts passes; these tests take steps of their own.
    model.igulora_bank.context.allowed_unstepped = sys.maxsize
    return model


def options(device: torch.device, **changes: object) -> igulora.IGUConfig:
    """Options that start to prune after a few steps."""
    size = Size.on(device)
    given = {
        "r": size.r,
        "target_rank": size.r // 2,
        "total_steps": 40,
        "t_init": 6,
        "t_final": 10,
        "delta_t": 2,
        "window": 2,
        "ig_every": 1,
        "init_lambda": 0.5,
    }
    return igulora.IGUConfig(**{**given, **changes})


@dataclass(frozen=True)
class Inputs:
    """What differs from step to step: data, positions on the path, weights of the path rows, and the budget."""

    x: Tensor
    target: Tensor
    alpha: Tensor
    weight: Tensor
    budget: Tensor

    @classmethod
    def draw(cls, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        """Random ones; drawn on the host, so that they do not depend on the device."""
        size, g = Size.on(device), torch.Generator().manual_seed(seed)
        n, d = size.train + size.path, size.features
        alpha = torch.cat((torch.ones(size.train), torch.rand(size.path, generator=g)))
        return cls(
            torch.randn(n, size.length, d, generator=g).to(device, dtype),
            torch.randn(n, size.length, d + 8, generator=g).to(device, dtype),
            alpha.to(device),
            torch.rand(n, generator=g).to(device),
            torch.randint(1, 4 * size.r, (), generator=g).to(device),
        )

    def take(self, other: Inputs) -> None:
        """Write the values of others in place."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


class StaticStep:
    """Forward and backward of a mixed batch, orthogonality, scores and allocation; a step's masks are those of the next step's forward.

    Attributes:
        inputs: read by every step; write other values into them in place.
        out: results of the last step that are no state: loss, penalty, live mask.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, dropout: float = 0.0) -> None:
        self.size = Size.on(device)
        self.model = adapted(device, dtype, options(device, dropout=dropout))
        self.bank = igulora.find_bank(self.model)
        self.inputs = Inputs.draw(device, dtype, seed=0)
        bank = self.bank
        self.mean, self.deviation = torch.zeros_like(bank.weight), torch.zeros_like(bank.weight)
        self.out: dict[str, Tensor] = {}
        bank.path.zero_()
        bank.bind_grads()

    def run(self) -> None:
        """One step from what the inputs hold now."""
        bank, inputs, train = self.bank, self.inputs, self.size.train
        bank.grad.zero_()
        bank.path.zero_()
        with bank.context.at(inputs.alpha, train, train, inputs.weight):
            loss = (self.model(inputs.x) - inputs.target).float().square().mean()
            loss.backward()
        penalty = orthogonality_grad_(bank.weight, bank.grad, list(bank.layout.groups), GAMMA, table=bank.matrix_table)
        stats, finite = importance_update(
            bank.weight, bank.path, self.mean, self.deviation, list(bank.layout.regions), table=bank.score_table
        )
        terms = stats.view(4, 3, bank.triplets)[0]
        live = allocate_triplets(bank.lambdas.abs() + terms[1] + terms[2], inputs.budget, bank.layer_index, min_rank=1)
        bank.mask.copy_(live)
        self.out = {"loss": loss.detach(), "penalty": penalty, "stats": stats, "finite": finite, "live": live}

    def state(self) -> dict[str, Tensor]:
        """Everything a step changes and the next one reads."""
        bank = self.bank
        held = {"weight": bank.weight, "grad": bank.grad, "path": bank.path, "mask": bank.mask}
        return {**held, "mean": self.mean, "deviation": self.deviation}

    def results(self) -> dict[str, Tensor]:
        """Copies of all that the last step left."""
        return {name: t.detach().clone() for name, t in {**self.out, **self.state()}.items()}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Put a state back, in place."""
        for name, t in self.state().items():
            with torch.no_grad():
                t.copy_(saved[name])

    def after(self, inputs: Inputs, run: Callable[[], object] | None = None, seed: int = 1) -> dict[str, Tensor]:
        """The results of one step with these inputs, by :meth:`run` or by a replay."""
        self.inputs.take(inputs)
        torch.manual_seed(seed)
        (run or self.run)()
        return self.results()


def captured(step: StaticStep) -> Callable[[], object]:
    """The step's replay as one CUDA graph; its state is what it was before."""
    before = step.results()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and gives autograd and cuBLAS the buffers that they keep
            step.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step.run()
    step.restore(before)
    torch.cuda.synchronize()
    return graph.replay


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to the bit, NaN included."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}[value.element_size()]
        assert torch.equal(got[name].view(bits), value.view(bits)), name
