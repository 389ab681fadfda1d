"""Two processes whose gradients igulora averages: whatever the model returns, whichever part is called, whatever wraps it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def test_two_processes_hold_equal_weights_however_the_model_is_called(tmp_path: Path) -> None:
    """The script averaging.py says what it does; it asserts what one process can see."""
    pytest.importorskip("peft")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("averaging.py")), str(tmp_path)],
            env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert len(one) == 13
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].any(), name
        assert torch.equal(one[name], two[name]), name
