"""Which form of the base product with rank term runs: what tuning measured for this device and shape, else a table by architecture family.

Forms: ``library`` (cuBLAS, starting from the rank term that a kernel wrote), ``pointers`` and ``descriptors`` (one kernel, see
``gemm.py``), ``augmented`` (one library product over K + r columns). The table says ``library`` everywhere: it never loses to cuBLAS plus
an epilogue, being just that, and what beats it differs from shape to shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from .common import Tile

FORMS = ("library", "pointers", "descriptors", "augmented")


@dataclass(frozen=True)
class Product:
    """One form, with the tiles of a kernel where it is one."""

    form: str
    tile: Tile = field(default_factory=Tile)


_DEFAULT = Product("library")
_forced: list[Product] = []  # innermost use_product last


@contextmanager
def use_product(product: Product) -> Iterator[None]:
    """Force a form inside the block."""
    _forced.append(product)
    try:
        yield
    finally:
        _forced.pop()


def choose(A: Tensor, weight: Tensor, F: Tensor, *, transposed: bool) -> Product:
    """The form for ``A W^T`` (transposed) or ``A W`` plus a rank term with F."""
    if _forced:
        return _forced[-1]
    return _DEFAULT
