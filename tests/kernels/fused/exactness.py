"""What tests of kernels share: the error bound, memory poisoned with NaN, canaries around buffers written in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

_CANARY = 64  # elements: buffers of the bank start on 256-byte boundaries


def assert_exact(ours: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """The largest error against float64 is at most twice that of PyTorch in the same dtype (STYLE 17), plus a rounding or two.

    Args:
        ours: result of the kernel.
        same_dtype: result of the same computation in PyTorch.
        exact: the result in float64; where it is not finite, ours has to be the same.
    """
    assert ours.shape == exact.shape
    ours, same_dtype, exact = (t.cpu().double() for t in (ours, same_dtype, exact))
    odd = ~exact.isfinite()
    assert torch.equal(ours[odd].nan_to_num(12345.0), exact[odd].nan_to_num(12345.0))
    if not (~odd).any():
        return
    ours, same_dtype, exact = ours[~odd], same_dtype[~odd], exact[~odd]
    bound = 2 * (same_dtype - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    worst = (ours - exact).abs().max()
    assert worst <= bound, f"expected an error of at most {float(bound):.3g}, got {float(worst):.3g}"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is asked for without a value holds NaN, or the smallest integer: what a kernel leaves unwritten shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            # A leaf that requires a gradient may not be written to (checkpointing makes one, of no elements).
            if out.is_meta or out.dtype == torch.bool or out.requires_grad:
                return out
            return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)

        return made

    # ``with torch.device(...)`` makes its list of functions once in a process: of the true ones, or it would pass over them for ever after.
    _device_constructors()
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """The compiler keeps what it made of earlier versions of the operators, or of the other backend, on disk; here it reads none of it."""
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


class Guarded:
    """A flat buffer with canaries before and behind it.

    Args:
        values: what the buffer holds.

    Attributes:
        buffer: the view to hand to a kernel.
    """

    def __init__(self, values: Tensor) -> None:
        n = values.numel()
        self._whole = torch.full((n + 2 * _CANARY,), torch.nan, dtype=values.dtype, device=values.device)
        self.buffer = self._whole[_CANARY : _CANARY + n]
        self.buffer.copy_(values)

    def assert_intact(self) -> None:
        """Nothing was written beside the buffer."""
        n = self.buffer.numel()
        assert self._whole[:_CANARY].isnan().all()
        assert self._whole[_CANARY + n :].isnan().all()
