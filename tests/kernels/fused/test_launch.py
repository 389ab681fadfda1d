"""A kernel that the assembler made spill is assembled again with all registers, and launched so from then on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from igulora.kernels.fused import launch as launching
from igulora.kernels.fused import rank_term
from igulora.kernels.fused.common import Tile


class Kernel:
    """In place of a jitted function: remembers what it was asked to compile."""

    def __init__(self, n_spills: int) -> None:
        self.asked: list[dict[str, Any]] = []
        self.compiled = SimpleNamespace(n_spills=n_spills, run=None)

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> Any:
        self.asked.append({"arguments": arguments, "grid": grid, **options})
        return self.compiled


def first(n_spills: int, num_warps: int = 8) -> Any:
    return SimpleNamespace(n_spills=n_spills, metadata=SimpleNamespace(num_warps=num_warps))


def plan(kernel: Kernel) -> launching.Plan:
    return launching.Plan(kernel, (3,), (4, 0.5), {"BLOCK": 16, "num_warps": 8})


def test_what_does_not_spill_is_compiled_once() -> None:
    kernel, compiled = Kernel(0), first(0)
    assert launching._without_spills(compiled, plan(kernel), (1, 2)) is compiled
    assert kernel.asked == []


@pytest.mark.parametrize(("spills", "better"), [(0, True), (1, True), (2, False), (3, False)])
def test_what_spills_is_compiled_again(spills: int, better: bool) -> None:
    kernel, compiled = Kernel(spills), first(2)
    chosen = launching._without_spills(compiled, plan(kernel), (1, 2))
    assert chosen is (kernel.compiled if better else compiled)
    assert kernel.asked == [{"arguments": (1, 2, 4, 0.5), "grid": (3,), "BLOCK": 16, "num_warps": 8, "maxnreg": 255}]


@pytest.mark.parametrize(("num_warps", "registers"), [(1, 255), (4, 255), (8, 255), (16, 128), (32, 64)])
def test_a_program_fits_a_multiprocessor(num_warps: int, registers: int) -> None:
    assert launching.all_registers(num_warps) == registers
    assert registers * 32 * num_warps <= 65_536


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_with_all_registers_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    again, kernels = launching._without_spills, []

    def as_if_it_spilled(compiled: Any, *rest: Any) -> Any:
        kernels.append(again(first(2**30, compiled.metadata.num_warps), *rest))
        return kernels[-1]

    monkeypatch.setattr(launching, "_kernels", {})
    monkeypatch.setattr(launching, "_without_spills", as_if_it_spilled)
    S, F = (torch.randn(64, 128, device="cuda") for _ in range(2))
    outs = [torch.empty(64, 128, device="cuda") for _ in range(2)]
    for out in outs:  # as the assembler likes it, and with all registers
        rank_term.launch_rank_term(
            out, None, S, F.repeat(2, 1), None, None, None, None, 0.0, Tile(64, 64, num_warps=4, num_stages=1)
        )
    assert [kernel.metadata.maxnreg for kernel in kernels] == [255]
    assert torch.equal(*outs)
    assert bool(outs[0].any())
