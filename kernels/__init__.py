"""Operators of igulora, each with its plain-PyTorch reference; installed as ``igulora.kernels``.

This package knows tensors only: no modules, no models. Every operator is a functional ``torch.library`` operator (or one that
names what it mutates), so autograd, ``torch.compile`` and meta-device counting see it as an ordinary PyTorch operator.
"""

# With the repository root on sys.path (python -m ... from there), transformers finds this folder while it looks for the Hugging Face
# package "kernels" and imports it. Operators must not be registered a second time then: it gets an empty module.
if __name__ != "kernels":
    from .allocation import allocate_triplets
    from .importance import importance_update
    from .orthogonality import orthogonality_grad_
    from .philox import dropout_keep_mask
    from .svd_conv import svd_conv
    from .svd_embed import svd_embed
    from .svd_linear import svd_linear
    from .svd_project import svd_project
    from .svd_update import svd_update

    __all__ = [
        "allocate_triplets",
        "dropout_keep_mask",
        "importance_update",
        "orthogonality_grad_",
        "svd_conv",
        "svd_embed",
        "svd_linear",
        "svd_project",
        "svd_update",
    ]
