"""Layers that are no linear layer but hold one matrix: ``nn.Embedding`` and ``nn.Conv2d``. Adapted only where they are named."""

from __future__ import annotations

from torch import Tensor, nn

from .base import PLAIN_TENSORS, DenseBase, TransposedBase, runs_as


class EmbeddingBase(TransposedBase):
    """``nn.Embedding``, a product with rows of the identity: W is (dimension, number of ids), the weight transposed."""

    kind = "nn.Embedding"
    linear = False

    def __init__(self, module: nn.Embedding) -> None:
        super().__init__(module)
        self.in_features, self.out_features = module.num_embeddings, module.embedding_dim

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @property
    def factor(self) -> float | None:
        """What the layer multiplies its rows by (the ``ScaledWordEmbedding`` of Gemma, BART and kin); None where it does something else."""
        if runs_as(self.module, nn.Embedding):
            return 1.0
        if "ScaledWordEmbedding" not in type(self.module).__name__:
            return None
        return float(getattr(self.module, "scalar_embed_scale", self.module.embed_scale))

    def obstacle(self) -> str | None:
        module = self.module
        if type(module.weight) not in PLAIN_TENSORS or not module.weight.is_floating_point():
            return "its table is quantised; leave it out of target_modules, or load it unquantised"
        if self.factor is None:
            return f"{type(module).__name__} computes more than a lookup; leave it out of target_modules"
        if module.max_norm is not None:
            return "its max_norm rewrites the table in every forward; set max_norm=None"
        if module.sparse or module.scale_grad_by_freq:
            which = "sparse" if module.sparse else "scale_grad_by_freq"
            return f"its gradient is of another form ({which}=True) than an adapter's; set {which}=False"
        return None


class Conv2dBase(DenseBase):
    """``nn.Conv2d``, a product with patches of its input: W is (out channels, in channels * kernel height * kernel width)."""

    kind = "nn.Conv2d"
    linear = False

    def __init__(self, module: nn.Conv2d) -> None:
        super().__init__(module)
        self.out_features = module.out_channels
        self.in_features = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d)

    def obstacle(self) -> str | None:
        module = self.module
        if not runs_as(module, nn.Conv2d) or type(module.weight) not in PLAIN_TENSORS:
            return f"{type(module).__name__} computes more than a convolution with its weight; leave it out of target_modules"
        if module.groups > 1:
            return f"its {module.groups} groups make W a block-diagonal matrix, which has no rank-r update; leave it out of target_modules"
        return None

    def dense(self) -> Tensor:
        return self.module.weight.flatten(1)

    def laid_out(self, dense: Tensor) -> Tensor:
        return dense.reshape(self.module.weight.shape)
