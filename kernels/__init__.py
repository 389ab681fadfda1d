"""Operators of igulora, each with its plain-PyTorch reference; installed as ``igulora.kernels``.

This package knows tensors only: no modules, no models. Every operator is a functional ``torch.library`` operator (or one that
names what it mutates), so autograd, ``torch.compile`` and meta-device counting see it as an ordinary PyTorch operator.

With the repository's root on ``sys.path`` (as ``python -m igulora`` puts it there) transformers finds this folder as a top-level
``kernels``, the name of a Hugging Face package, and imports it. Under that name it must stay empty: registering the operators a
second time over the first makes their calls fail at random.
"""

if __name__ == "igulora.kernels":
    from .allocation import allocate_triplets
    from .importance import importance_update
    from .orthogonality import orthogonality_grad_
    from .philox import dropout_keep_mask
    from .svd_linear import svd_linear

    __all__ = ["allocate_triplets", "dropout_keep_mask", "importance_update", "orthogonality_grad_", "svd_linear"]
