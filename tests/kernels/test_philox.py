"""Dropout masks: the words are Triton's, the rate is p, and a mask depends on nothing but seed and shape."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from igulora.kernels import dropout_keep_mask
from igulora.kernels.philox import _philox_words

TRITON = """
import sys, torch, triton, triton.language as tl

@triton.jit
def kernel(seed_ptr, offset_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), tl.load(offset_ptr + i))
    tl.store(out_ptr + 4 * i, a.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out_ptr + 4 * i + 1, b.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out_ptr + 4 * i + 2, c.to(tl.int64) & 0xFFFFFFFF)
    tl.store(out_ptr + 4 * i + 3, d.to(tl.int64) & 0xFFFFFFFF)

for seed in map(int, sys.argv[1].split(",")):
    for start in map(int, sys.argv[2].split(",")):
        offsets = torch.arange(start, start + 8, dtype=torch.int64)
        out = torch.full((8, 4), -1, dtype=torch.int64)
        kernel[(1,)](torch.tensor([seed]), offsets, out, BLOCK=8)
        print(*out.flatten().tolist())
"""
SEEDS = (0, 1, 12345, 2**31 + 7, 2**40 + 99, 2**62 - 1)
STARTS = (0, 2**31 - 4, 2**32 - 4, 2**41 + 3)


def test_words_are_those_of_triton(tmp_path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "words.py"  # the interpreter reads a kernel's source from its file
    script.write_text(TRITON)
    args = [sys.executable, str(script), ",".join(map(str, SEEDS)), ",".join(map(str, STARTS))]
    run = subprocess.run(args, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = iter(run.stdout.splitlines())
    for seed in SEEDS:
        for start in STARTS:
            theirs = torch.tensor([int(w) for w in next(lines).split()]).view(8, 4)
            ours = _philox_words(torch.tensor(seed), torch.arange(start, start + 8))
            assert torch.equal(ours, theirs), f"seed {seed}, counter {start}"


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 4242])
def test_rate_and_mean(p: float, seed: int) -> None:
    rows, cols = 400, 501
    keep = dropout_keep_mask(torch.tensor(seed), rows, cols, p)
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(float(keep.double().mean()) - (1 - p)) < 5 * deviation
    assert abs(float((keep.double() / (1 - p)).mean()) - 1) < 5 * deviation / (1 - p)
    # No row, column or neighbour stands out: five standard deviations of each mean.
    for axis, count in ((0, rows), (1, cols)):
        means = keep.double().mean(axis)
        assert float((means - (1 - p)).abs().max()) < 6 * (p * (1 - p) / count) ** 0.5
    together = (keep[:, 1:] & keep[:, :-1]).double().mean()
    assert abs(float(together) - (1 - p) ** 2) < 0.01


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0), (1, 1), (3, 4), (7, 13), (5000, 19)])
def test_shape_and_independence_of_the_rest_of_the_matrix(rows: int, cols: int) -> None:
    seed = torch.tensor(8)
    keep = dropout_keep_mask(seed, rows, cols, 0.4)
    assert keep.shape == (rows, cols)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, dropout_keep_mask(seed.view(1), rows, cols, 0.4))
    assert torch.equal(keep[: rows // 2], dropout_keep_mask(seed, rows // 2, cols, 0.4))


def test_p_zero_keeps_all_and_seeds_differ() -> None:
    assert dropout_keep_mask(torch.tensor(1), 9, 9, 0.0).all()
    one, two = (dropout_keep_mask(torch.tensor(s), 64, 64, 0.5) for s in (1, 1 + 2**33))
    assert 0.4 < float((one == two).double().mean()) < 0.6
