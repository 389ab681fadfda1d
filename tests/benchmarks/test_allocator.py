"""What the suite's processes free stays theirs."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
import torch
from igulora.benchmarks import allocator

if sys.argv[1] == "keep":
    allocator.keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults(), allocator.state(), sep=";")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_was_freed_comes_back_without_page_faults() -> None:
    found = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
        count, state = done.stdout.strip().split(";")
        found[how] = int(count)
        assert state == ("glibc, keeps what is freed" if how == "keep" else "as it is")
    assert found["keep"] * 20 < found["leave"]
