"""What the suite's processes free stays theirs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from igulora.benchmarks import allocator

_FAULTS = """
import resource, sys
import torch
from igulora.benchmarks import allocator

how, mib = sys.argv[1], int(sys.argv[2])
if how != "leave":
    allocator.keep_freed_memory(large=how == "keep")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(mib << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults(), allocator.state(), sep=";")
"""


def _faults(how: str, mib: int) -> tuple[int, str]:
    plain = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS, how, str(mib)], capture_output=True, text=True, check=True, env=plain
    )
    count, state = done.stdout.strip().split(";")
    return int(count), state


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_was_freed_comes_back_without_page_faults() -> None:
    kept, state = _faults("keep", 64)
    left, as_it_is = _faults("leave", 64)
    assert (state, as_it_is) == ("glibc, keeps what is freed", "as it is")
    assert kept * 20 < left


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_blocks_go_back_to_the_system_where_only_small_ones_are_kept() -> None:
    small, state = _faults("small", 16)
    large, _ = _faults("small", 64)
    assert state == "glibc, keeps blocks of up to 32 MiB"
    assert small * 20 < large


def test_a_record_says_that_huge_pages_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert allocator.state().endswith(", huge pages")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    assert "huge" not in allocator.state()
