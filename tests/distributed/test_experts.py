"""Data-parallel processes whose tokens go to different experts: equal scores, masks and weights."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# Each process sends its tokens to an expert of its own and to one that both use; the fourth stays idle.
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import igulora

torch.set_num_threads(1)
dist.init_process_group("gloo")
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = MixtralConfig(hidden_size=6, intermediate_size=5, num_local_experts=4)
        sizes._experts_implementation = "eager"
        self.experts = MixtralExperts(sizes)
        for param in self.experts.parameters():
            nn.init.normal_(param, std=0.5)
    def forward(self, x):
        choice = torch.tensor([[0, 1 + dist.get_rank()]]).repeat(len(x), 1)
        return self.experts(x, choice, torch.tensor([[0.7, 0.3]]).repeat(len(x), 1))[:, :4]

torch.manual_seed(0)
model = Mixture()
config = igulora.IGUConfig(
    r=4, total_steps=24, window=2, ig_every=1, ig_fraction=0.5,
    target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)
igulora.adapt(model, config)
ctl = igulora.Controller(model)
replica = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(igulora.param_groups(model, lr=3e-2))
generator = torch.Generator().manual_seed(dist.get_rank())
for _ in range(24):
    x = torch.randn(6, 6, generator=generator)
    ctl.backward(lambda x: (replica(x) - x[:, :4]).square().mean(), x)
    optimizer.step(); ctl.step(); optimizer.zero_grad()
bank = ctl.bank
save_file({"weight": bank.weight, "live": bank.live, "mean": ctl.importance.mean}, f"{sys.argv[1]}/{dist.get_rank()}.safetensors")
dist.destroy_process_group()
"""


def test_two_processes_with_experts_of_their_own_agree(tmp_path: Path) -> None:
    """Without find_unused_parameters: what a process does not use must not hold the others up."""
    pytest.importorskip("transformers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "train.py"), str(tmp_path)],
            env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert 0 < one["live"].sum() < one["live"].numel()
    for name in one:
        assert torch.equal(one[name], two[name]), name
