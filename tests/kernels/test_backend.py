"""Which implementation runs: forced ones fail loudly, others fall back with one warning that names the reason."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from igulora.kernels import backend
from igulora.kernels.backend import ReferenceWarning, runs_fused, use_backend


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    """No cached answers from other tests, none left behind."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    caches = (backend._missing, backend._warn_once, backend._from_environment, backend.interpreting)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def test_a_cpu_runs_the_reference_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    backend.interpreting.cache_clear()
    monkeypatch.delenv("IGULORA_BACKEND", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runs_fused(torch.ones(2))
        with use_backend(None):
            assert not runs_fused(torch.ones(2))


def test_the_interpreter_makes_a_cpu_run_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("IGULORA_BACKEND", raising=False)
    assert runs_fused(torch.ones(2))


@pytest.mark.parametrize(
    ("like", "rank", "reason"),
    [
        (torch.ones(2, dtype=torch.float64), 8, "torch.float64, not bfloat16, float16 or float32"),
        (torch.ones(2), 257, "the rank is 257, above 256"),
        (torch.ones(2, dtype=torch.bfloat16), 8, "interpreter computes products of bfloat16 wrongly"),
    ],
)
def test_what_kernels_cannot_do_falls_back_with_one_warning(like, rank, reason) -> None:
    with use_backend(None):
        with pytest.warns(ReferenceWarning, match=reason):
            assert not runs_fused(like, rank)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not runs_fused(like, rank)  # said once
    with use_backend("triton"), pytest.raises(ValueError, match=reason):
        runs_fused(like, rank)
    with use_backend("reference"):
        assert not runs_fused(like, rank)


def test_the_meta_device_counts_silently() -> None:
    with use_backend(None), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runs_fused(torch.ones(2, device="meta"))
    with use_backend("triton"), pytest.raises(ValueError, match="device of type 'meta'"):
        runs_fused(torch.ones(2, device="meta"))


def test_triton_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    with use_backend(None), pytest.warns(ReferenceWarning, match="Triton is not installed"):
        assert not runs_fused(torch.ones(2))
    with use_backend("triton"), pytest.raises(ValueError, match="unset IGULORA_BACKEND"):
        runs_fused(torch.ones(2))


class _OnGpu:
    device = torch.device("cuda", 0)
    dtype = torch.float16


@pytest.mark.parametrize(
    ("hip", "capability", "reason"),
    [
        (None, (7, 5), r"a card has compute capability 7.5, below 8.0"),
        ("7.1", (9, 4), r"a card is an AMD GPU, for which the kernels have no tiles yet"),
    ],
    ids=["too old", "AMD"],
)
def test_devices_that_run_no_kernel(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, capability: tuple[int, int], reason: str
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a card")
    with use_backend(None), pytest.warns(ReferenceWarning, match=reason):
        assert not runs_fused(_OnGpu())  # type: ignore[arg-type]
    with use_backend("triton"), pytest.raises(ValueError, match=reason):
        runs_fused(_OnGpu())  # type: ignore[arg-type]


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="got 'cuda'"), use_backend("cuda"):
        pass
    monkeypatch.setenv("IGULORA_BACKEND", "fast")
    with pytest.raises(ValueError, match="expected IGULORA_BACKEND to be one of triton, reference"):
        runs_fused(torch.ones(2))


@pytest.mark.parametrize("forced", ["triton", "reference"])
def test_the_environment_forces_a_whole_process(forced: str) -> None:
    """Triton on a CPU without the interpreter cannot run: an error, not a silent fallback."""
    code = (
        "import json, torch\n"
        "from igulora.kernels import svd_linear\n"
        "t = torch.ones\n"
        "try:\n"
        "    svd_linear(t(3, 8), t(4, 8), None, t(2, 4), t(2), t(2, 8), t(2)); print(json.dumps('ran'))\n"
        "except ValueError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"IGULORA_BACKEND": forced}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    if forced == "reference":
        assert said == "ran"
    else:
        assert "Triton" in said
        assert "TRITON_INTERPRET=1" in said or "not installed" in said
