"""Where the parts of dy P^T would leave the cache, dy is passed over twice: the same gradients, and a bounded workspace."""

from __future__ import annotations

import pytest
import torch

from igulora.kernels import svd_linear
from igulora.kernels.backend import use_backend
from igulora.kernels.fused import dy_pass
from igulora.kernels.fused.common import padded_rank


def gradients(device: torch.device, kind: str, r: int = 7) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device)

    x, weight = draw(3, 22, 40).requires_grad_(), draw(70, 40)
    P, E, Q = (t.requires_grad_() for t in (draw(r, 70), draw(r), draw(r, 40)))
    path = tuple(torch.zeros_like(t, requires_grad=False) for t in (P, E, Q))
    options: dict = {}
    if kind != "plain":
        train, start = {"mixed": (2, 2), "overlap": (3, 1), "path": (0, 0)}[kind]
        options = {"alpha": torch.tensor([1.0, 0.5, 0.3], device=device), "train_groups": train, "path_start": start}
        options |= {"path_weight": torch.tensor([0.2, 2.0, -1.0], device=device), "path": path}
    y = svd_linear(x, weight, None, P, E, Q, torch.ones(r, device=device), scale=1.5, **options)
    y.backward(draw(*y.shape))
    return [t.grad for t in (x, P, E, Q) if t.grad is not None] + list(path)


@pytest.mark.parametrize("kind", ["plain", "mixed", "overlap", "path"])
def test_same_gradients_in_two_passes(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    real = dy_pass.launch_dy_pass
    monkeypatch.setattr(dy_pass, "launch_dy_pass", lambda *a: (launched.append(a[8] is not None), real(*a)))
    once = gradients(device, kind)
    assert any(launched)  # made the parts of dy P^T
    launched.clear()
    monkeypatch.setattr(dy_pass, "PARTS_LIMIT", 0)
    twice = gradients(device, kind)
    assert launched
    assert not any(launched)
    with use_backend("reference"):
        expected = gradients(device, kind)
    for a, b, c in zip(once, twice, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-4)


def test_the_workspace_of_a_very_wide_layer_is_bounded() -> None:
    for family in ("sm_80", "sm_90", "sm_120"):
        for rank, wide in ((16, 128256), (64, 128256), (256, 4096)):
            tile = dy_pass.config(family, 2, max(rank, 16))
            assert not dy_pass.in_one_pass(8192, wide, padded_rank(rank), tile)
        assert dy_pass.in_one_pass(8192, 4096, 32, dy_pass.config(family, 2, 32))
