"""Bytes, FLOPs and launches of single PyTorch operators, against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from igulora.measure.costs import Cost, aten_cost, flops_of, multi_tensor_launches
from igulora.measure.counting import Counting


class Seen(TorchDispatchMode):
    """Costs of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.costs.append(aten_cost(func, args, kwargs or {}, out))
        return out


def cost(call: Callable[[], object]) -> Cost:
    """Of all operators of a call."""
    with Seen() as seen:
        call()
    return sum(seen.costs, Cost())


@pytest.fixture(params=["cpu", "meta"])
def make(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    """Makes float32 tensors; on the meta device there is nothing but a shape."""
    return lambda *shape: torch.empty(shape, device=request.param)


def test_products(make) -> None:
    a, b, c = make(5, 7), make(7, 3), make(5, 3)
    product = Cost(1, 4 * (35 + 21), 4 * 15, 2 * 5 * 7 * 3)
    assert cost(lambda: a @ b) == product
    assert cost(lambda: torch.addmm(c, a, b)) == product + Cost(0, 4 * 15)
    assert cost(lambda: c.addmm_(a, b)) == product + Cost(0, 4 * 15)
    assert cost(lambda: torch.bmm(make(2, 5, 7), make(2, 7, 3))) == Cost(1, 8 * (35 + 21), 8 * 15, 4 * 5 * 7 * 3)


def test_views_and_allocation_are_free(make) -> None:
    x = make(6, 4)
    assert cost(lambda: x.t().view(4, 6)[1:].unsqueeze(0).expand(9, 3, 6).detach()) == Cost()
    assert cost(lambda: torch.empty_like(x)) == Cost()


def test_what_was_expanded_counts_once_and_so_does_an_operand_given_twice(make) -> None:
    x, row = make(100, 4), make(4)
    assert cost(lambda: x + row.expand(100, 4)) == Cost(1, 4 * (400 + 4), 1600)
    assert cost(lambda: x * x) == Cost(1, 1600, 1600)
    assert cost(lambda: x * x[:]) == Cost(1, 1600, 1600)


def test_in_place(make) -> None:
    x, y = make(10), make(10)
    assert cost(lambda: x.add_(y)) == Cost(1, 80, 40)
    assert cost(lambda: x.copy_(y)) == Cost(1, 40, 40)
    assert cost(lambda: x.zero_()) == Cost(1, 0, 40)
    assert cost(lambda: torch.add(x, y, out=make(10))) == Cost(1, 80, 40)


def test_gathers_read_what_they_gather() -> None:
    table, where = torch.randn(1000, 8), torch.tensor([3, 3, 5])
    gathered = 3 * 8 * 4
    assert cost(lambda: torch.nn.functional.embedding(where, table)) == Cost(1, 24 + gathered, gathered)
    assert cost(lambda: table[where]) == Cost(1, 24 + gathered, gathered)
    assert cost(lambda: table.index_select(0, where)) == Cost(1, 24 + gathered, gathered)


def test_scatters_write_what_they_are_given() -> None:
    table, where, rows = torch.randn(1000, 8), torch.tensor([3, 4, 5]), torch.ones(3, 8)
    values = 3 * 8 * 4
    assert cost(lambda: table.index_copy_(0, where, rows)) == Cost(1, 24 + values, values)
    assert cost(lambda: table.index_add_(0, where, rows)) == Cost(1, 24 + 2 * values, values)


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([], 1, 0),
        ([0, 0], 1, 0),
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([1] * 73, 4, 3),
        ([65536 * 320], 4, 1),
        ([65536 * 320 + 1], 4, 2),
        # The first 2 tensors fill the 320 chunks; what is left of the second begins the next launch, where 35 more find room.
        ([65536 * 200, 65536 * 200, *[1] * 35], 4, 2),
        ([65536 * 200, 65536 * 200, *[1] * 36], 4, 3),
    ],
    ids=str,
)
def test_multi_tensor_launches(sizes: list[int], lists: int, launches: int) -> None:
    assert multi_tensor_launches(sizes, lists) == launches


def test_a_fused_optimizer_is_a_few_launches() -> None:
    params = [torch.zeros(10, requires_grad=True) for _ in range(80)]
    optimizer = torch.optim.AdamW(params, fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with Counting() as counting:
        optimizer.step()
    # 80 parameters, gradients and two states: 36 + 36 + 8. Their 80 counters: one launch.
    assert counting.costs["step"].launches == 3 + 1
    assert counting.costs["step"].read == 80 * (4 * 40 + 4) + 80 * 4
    assert counting.costs["step"].written == 80 * 3 * 40 + 80 * 4
    assert counting.launches["aten::_fused_adamw_"] == 1


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_attention_of_a_gpu_counts_every_query_head(kind: str) -> None:
    """Also where several of them share one key head, which PyTorch's own formulas refuse up to version 2.11."""
    q, k = torch.empty((2, 8, 16, 4), device="meta"), torch.empty((2, 2, 16, 4), device="meta")
    product = 2 * 2 * 8 * 16 * 16 * 4
    forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention").default
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention_backward").default
    assert flops_of(forward, (q, k, k), {}, (q,)) == 2 * product
    assert flops_of(backward, (q, q, k, k), {}, (q, k, k)) == 5 * product


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_counted_as_by_pytorch(causal: bool) -> None:
    q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    with Counting() as counting:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()
    one = 2 * 2 * 4 * 6 * 6 * 8  # of one of the products, of which there are two forward and five backward
    assert counting.total.flops == 7 * one
