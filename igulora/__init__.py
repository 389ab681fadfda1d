"""igulora: adaptive-rank fine-tuning (IGU-LoRA, AdaLoRA) at the cost of plain LoRA.

model = igulora.adapt(model, igulora.IGUConfig(r=32, target_rank=16, total_steps=1000))
opt = torch.optim.AdamW(igulora.param_groups(model, lr=5e-4), fused=True)
ctl = igulora.Controller(model)
for batch in loader:
    loss = ctl.backward(lambda b: model(**b).loss, batch)
    opt.step(); ctl.step(); opt.zero_grad()
"""

from .adapt import adapt, merge, remove, unmerge
from .bank import Bank, find_bank
from .checkpoint import AdapterFile, load_adapter, load_checkpoint, read_adapter, save_adapter, save_checkpoint
from .compact import compact
from .config import IGUConfig
from .controller import Controller, StepInfo
from .export import export_peft
from .layers import FusedSVDLinear, adapters_disabled
from .optim import param_groups

__version__ = "0.1.0"

__all__ = [
    "AdapterFile",
    "Bank",
    "Controller",
    "FusedSVDLinear",
    "IGUConfig",
    "StepInfo",
    "adapt",
    "adapters_disabled",
    "compact",
    "export_peft",
    "find_bank",
    "load_adapter",
    "load_checkpoint",
    "merge",
    "param_groups",
    "read_adapter",
    "remove",
    "save_adapter",
    "save_checkpoint",
    "unmerge",
]
