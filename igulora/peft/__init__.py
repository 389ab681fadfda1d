"""igulora as a method of PEFT: ``get_peft_model(model, IGULoraConfig(...))``. Importing this package registers it.

A saved adapter names its method, so a fresh process that loads one with ``PeftModel.from_pretrained`` imports this package first.
"""

from .config import IGULoraConfig
from .layer import IGULoraConv2d, IGULoraEmbedding, IGULoraLayer, IGULoraLinear
from .model import IGULoraModel
from .registration import register

register(IGULoraConfig, IGULoraModel)

__all__ = ["IGULoraConfig", "IGULoraConv2d", "IGULoraEmbedding", "IGULoraLayer", "IGULoraLinear", "IGULoraModel"]
