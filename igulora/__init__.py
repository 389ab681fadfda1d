"""igulora: adaptive-rank fine-tuning (IGU-LoRA, AdaLoRA) at the cost of plain LoRA.

model = igulora.adapt(model, igulora.IGUConfig(r=32, target_rank=16, total_steps=1000))
opt = torch.optim.AdamW(igulora.param_groups(model, lr=5e-4), fused=True)
ctl = igulora.Controller(model)
for batch in loader:
    loss = ctl.backward(lambda b: model(**b).loss, batch)
    opt.step(); ctl.step(); opt.zero_grad()
"""

from typing import TYPE_CHECKING, Any

from . import distributed
from .adapt import adapt, merge, merge_errors, remove, unmerge
from .adapter_file import AdapterFile, read_adapter
from .alignment import Alignment, align
from .bank import Bank, find_bank
from .checkpoint import load_checkpoint, save_checkpoint
from .compact import compact
from .config import IGUConfig
from .controller import Controller, StepInfo
from .convert import import_peft
from .errors import MergeWarning
from .export import export_peft
from .layers import FusedSVDConv2d, FusedSVDEmbedding, FusedSVDLinear, adapters_disabled
from .optim import param_groups
from .saved_adapter import load_adapter, save_adapter

if TYPE_CHECKING:
    from .peft import IGULoraConfig
    from .trainer import IGUCallback, IGUTrainer, IGUTrainerMixin

__version__ = "0.1.0"


__all__ = [
    "AdapterFile",
    "Alignment",
    "Bank",
    "Controller",
    "FusedSVDConv2d",
    "FusedSVDEmbedding",
    "FusedSVDLinear",
    "IGUCallback",
    "IGUConfig",
    "IGULoraConfig",
    "IGUTrainer",
    "IGUTrainerMixin",
    "MergeWarning",
    "StepInfo",
    "adapt",
    "adapters_disabled",
    "align",
    "compact",
    "distributed",
    "export_peft",
    "find_bank",
    "import_peft",
    "load_adapter",
    "load_checkpoint",
    "merge",
    "merge_errors",
    "param_groups",
    "read_adapter",
    "remove",
    "save_adapter",
    "save_checkpoint",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """The Trainer's classes need transformers and IGULoraConfig needs PEFT, which are imported when they are asked for."""
    if name == "IGULoraConfig":
        from .peft import IGULoraConfig

        return IGULoraConfig
    if name in ("IGUCallback", "IGUTrainer", "IGUTrainerMixin"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
