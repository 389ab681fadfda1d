"""Which form of the base product with rank term runs: what was measured for this device and shape, else a table by architecture family.

Forms: ``library`` (cuBLAS, starting from the rank term that a kernel wrote), ``pointers`` and ``descriptors`` (one kernel, see
``gemm.py``), ``augmented`` (one library product over K + r columns; it copies the weight, so it is for weights that are temporaries).
``tuning.py`` measures, ``choice_file.py`` keeps what it chose. A choice is looked up once per process and problem; then it is one
dictionary access per product, without a look at the device.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import choice_file, settings
from . import gemm
from .common import TYPE_NAMES, Tile, block_rank, cdiv, family

FORMS = ("library", "pointers", "descriptors", "augmented")
# What a choice depends on beside versions: a change here makes old measurements void.
_SOURCES = ("common.py", "tiles.py", "gemm.py", "rank_term.py", "product.py")


@dataclass(frozen=True)
class Product:
    """One form, with the tiles of a kernel where it is one."""

    form: str
    tile: Tile = field(default_factory=Tile)

    def __str__(self) -> str:
        """Its name in the file of choices."""
        t = self.tile
        return (
            f"{self.form} {t.BLOCK_M}x{t.BLOCK_N}x{t.BLOCK_K} w{t.num_warps} s{t.num_stages}"
            if t.BLOCK_M
            else self.form
        )


# It never loses to cuBLAS plus an epilogue, being just that. What beats it differs from shape to shape, so that a family has another
# default only where that was measured (benchmarks/results/gpu): (form, tiles of the result from which on it runs).
LIBRARY = Product("library")
DEFAULTS = {"sm_90": ("descriptors", 256)}


class Problem(NamedTuple):
    """A product as far as the fastest form depends on it: (rows, inner) times the weight, giving (rows, columns).

    Attributes:
        transposed: ``A W^T`` (forward) or ``A W`` (backward).
        rows: rounded up to a power of two.
        block_r: bucket of the rank.
        temporary: the caller made the weight for this one product.
        dropout: the rank term's columns are dropped.
    """

    transposed: bool
    dtype: torch.dtype
    rows: int
    columns: int
    inner: int
    block_r: int
    temporary: bool = False
    dropout: bool = False

    def __str__(self) -> str:
        """The problem's name in the file of choices."""
        words = ["forward" if self.transposed else "backward", TYPE_NAMES[self.dtype]]
        words += [f"{self.rows}x{self.columns}x{self.inner}", f"r{self.block_r}"]
        words += ["temporary"] if self.temporary else []
        return " ".join(words + (["dropout"] if self.dropout else []))


_forced: list[Product] = []  # innermost use_product last
_chosen: dict[tuple[torch.device, Problem], Product] = {}
_deciding = threading.RLock()  # backward passes run in threads of their own


@contextmanager
def use_product(product: Product) -> Iterator[None]:
    """Force a form inside the block."""
    _forced.append(product)
    try:
        yield
    finally:
        _forced.pop()


def bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << max(0, rows - 1).bit_length()


def candidates(problem: Problem, family: str) -> list[Product]:
    """What is measured for a problem on a device of this family: the library first, then the default of each kernel and its other tiles."""
    found = [LIBRARY]
    # fp32 operands take so much shared memory that descriptors buy nothing; they are not shipped.
    with_descriptors = family in gemm.DESCRIPTOR_FAMILIES and problem.dtype != torch.float32
    for form in ("pointers", "descriptors") if with_descriptors else ("pointers",):
        descriptors = form == "descriptors"
        tiles = gemm.candidates(family, problem.dtype.itemsize, descriptors=descriptors, dropout=problem.dropout)
        found += [Product(form, tile) for tile in tiles]
    if problem.temporary and not problem.dropout:
        found.append(Product("augmented"))
    return found


def choose(
    A: Tensor, weight: Tensor, F: Tensor, *, transposed: bool, temporary: bool = False, dropout: bool = False
) -> Product:
    """The form for ``A W^T`` (transposed) or ``A W`` plus a rank term with F (r, N); see :class:`Problem` for the rest.

    Raises:
        ValueError: the form that was forced cannot compute this product.
    """
    if _forced:
        forced = _forced[-1]
        if forced.form == "descriptors" and not gemm.fits_descriptors(A, weight):
            raise ValueError(
                "expected 16-byte aligned storage and rows of multiples of 16 bytes, which the form 'descriptors' needs, got strides "
                f"{A.stride()} and {weight.stride()} of {A.dtype}; ask for another form"
            )
        if forced.form == "augmented" and dropout:
            raise ValueError("expected no dropout with the form 'augmented', got some; ask for another form")
        return forced
    (M, K), (R, N) = A.shape, F.shape
    problem = Problem(transposed, A.dtype, bucket(M), N, K, block_rank(R), temporary, dropout)
    product = _chosen.get((A.device, problem))
    if product is None:
        product = _decide(A.device, problem, M, R)
    if product.form == "descriptors" and not gemm.fits_descriptors(A, weight):
        return LIBRARY  # measured on aligned operands; these are not
    return product


def default(problem: Problem, family: str) -> Product:
    """The form without a measurement."""
    form, least = DEFAULTS.get(family, ("library", 0))
    if form == "library" or problem.dtype == torch.float32 or problem.dropout:
        return LIBRARY
    tile = gemm.config(family, problem.dtype.itemsize, descriptors=form == "descriptors")
    tiles = cdiv(problem.rows, tile.BLOCK_M) * cdiv(problem.columns, tile.BLOCK_N)
    return Product(form, tile) if tiles >= least else LIBRARY


def adopt(device: torch.device, problem: Problem, product: Product) -> None:
    """Use a form for a problem from now on, in this process."""
    _chosen[torch.empty(0, device=device).device, problem] = product  # tensors say "cuda:0", callers may say "cuda"


def forget() -> None:
    """Drop what this process knows of measured choices; the file is read again."""
    with _deciding:
        _chosen.clear()
        _remembered.cache_clear()


def _decide(device: torch.device, problem: Problem, rows: int, rank: int) -> Product:
    with _deciding:
        product = _chosen.get((device, problem)) or _recall(device, problem)
        if product is None and settings.search_asked():
            if not _may_measure(device):
                return default(problem, family(device))  # not adopted: measured when it comes up outside of the capture
            product = _search(device, problem, rows, rank)
        product = product or default(problem, family(device))
        adopt(device, problem, product)
        return product


def _may_measure(device: torch.device) -> bool:
    """Measuring waits for the device, which neither a capture nor a trace can hold."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not capturing and not torch.compiler.is_compiling()


def _search(device: torch.device, problem: Problem, rows: int, rank: int) -> Product | None:
    from . import tuning  # which runs the products, which ask this file

    try:
        return tuning.tune(problem, rows, rank, device).product
    except torch.OutOfMemoryError:
        choice_file.warn_once(
            f"igulora has no memory left to measure the forms of a product ({problem}); it runs the default, "
            f"{default(problem, family(device))}. 'igulora tune' measures it before training"
        )
        return None


@cache
def _remembered(environment: str) -> choice_file.Entries:
    return choice_file.read().get(environment, {})


def _recall(device: torch.device, problem: Problem) -> Product | None:
    """The form that the file holds for a problem, if it is one we would measure."""
    entry = _remembered(environment(device)).get(str(problem))
    if entry is None:
        return None
    for product in candidates(problem, family(device)):
        if str(product) == entry.get("product"):
            return product
    choice_file.warn_once(
        f"igulora ignores a damaged entry in {choice_file.path()} ({problem}: {entry}); 'igulora tune' measures it anew"
    )
    return None


@cache
def environment(device: torch.device) -> str:
    """A device and the versions of all that decides how fast a product runs on it: what measurements hold for."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        words = [torch.cuda.get_device_name(device), f"capability {major}.{minor}", f"driver {_driver()}"]
    else:
        words = [f"{device.type} under Triton's interpreter"]
    return ", ".join([*words, f"torch {torch.__version__}", f"triton {triton.__version__}", f"kernels {_sources()}"])


@cache
def _driver() -> str:
    """Version of the driver; of the CUDA release it brings where the system does not tell."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"NVRM version:.*?\s(\d+\.[\d.]*\d)\s", text)
    if found:
        return found[1]
    release = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"cuda {release()}" if release is not None else "unknown"


@cache
def _sources() -> str:
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for name in _SOURCES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:12]
