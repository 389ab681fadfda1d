"""What all launchers share: rank buckets, architecture families, and the record of a shipped configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

# Pointer types of Triton signatures.
TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "u1",
}
# Largest shared memory of one program in bytes, by architecture family; a family is named by its first compute capability.
SHARED_MEMORY = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}
# Arguments that hold one number for each triplet or group. They begin wherever the layers before end in a flat buffer, and are read
# narrowly anyway: a kernel specialised on their alignment would be compiled again for other ranks.
NARROW = ("e_ptr", "mask_ptr", "alpha_ptr", "weight_ptr")
_RANK_MULTIPLE = 16


@cache
def block_rank(rank: int) -> int:
    """The bucket a rank falls into: its tile's size, a power of two of at least 16."""
    return max(_RANK_MULTIPLE, 1 << (rank - 1).bit_length()) if rank > 0 else _RANK_MULTIPLE


def rank_step(rank: int) -> int:
    """Triplets that a rank term takes at once: a bucket's all, up to a limit that keeps registers independent of the rank."""
    return min(block_rank(rank), 32)


def padded_rank(rank: int) -> int:
    """Columns of buffers indexed by row and triplet: a multiple of 16, so that accesses stay 16 bytes wide at any rank."""
    return (rank + _RANK_MULTIPLE - 1) // _RANK_MULTIPLE * _RANK_MULTIPLE


def cdiv(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)


Where = torch.device | int  # a device, or the number of multiprocessors of one that is not here (for projections)


@cache
def processors(device: Where) -> int:
    """Multiprocessors of a device; a small number under the interpreter, so that work is split there too."""
    if isinstance(device, int):
        return device
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def family(device: torch.device) -> str:
    """Architecture family of a device (a key of :data:`SHARED_MEMORY`); one unknown to us counts as the smallest."""
    if device.type != "cuda":
        return "sm_86"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120" if major == 12 else "sm_86")


@dataclass(frozen=True)
class Specimen:
    """A kernel in one configuration we ship, in the terms of ``triton.compiler.ASTSource``: what the compile report compiles.

    Attributes:
        label: names kernel and configuration in the report.
        kernel: the ``triton.jit`` function.
        types: type of every argument that is no constant: ``"*bf16"``, ``"*fp32"``, ``"i32"`` ... Pointers, and integers that the
            kernel specialises on, are taken to be multiples of 16, as they are for aligned inputs.
        constants: values of the constexpr arguments, and of strides that are 1.
        dots: whether it computes matrix products, which must run on tensor cores.
        narrow_loads, narrow_stores: why most of its accesses are narrower than 16 bytes on aligned inputs, where they must be.
    """

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    dots: bool = True
    narrow_loads: str = ""
    narrow_stores: str = ""


class Tile(NamedTuple):
    """Tile sizes and launch options of one kernel; sizes it has no use for stay 0."""

    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    GROUP_M: int = 0
    num_warps: int = 4
    num_stages: int = 3

    @cache  # noqa: B019 - tiles are few, and live as long as their tables
    def blocks(self, *names: str) -> dict[str, int]:
        """The named sizes and the launch options, as keyword arguments of a launch."""
        sizes = {name: getattr(self, name) for name in names}
        return {**sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def specimen(
        self, label: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], dots: bool = True
    ) -> Specimen:
        """A kernel with these tiles: sizes that the kernel takes are added to its constants."""
        sizes = {name: getattr(self, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}
        taken = {name: size for name, size in sizes.items() if name in kernel.arg_names}
        return Specimen(label, kernel, types, {**taken, **constants}, self.num_warps, self.num_stages, dots)


# Of which specimens are listed. A kernel of float16 is that of bfloat16 with other names of the same instructions, unless it scales what it
# read: converting that to float32 differs. So float16 has specimens where a kernel scales, and bfloat16's stand for it elsewhere.
SPECIMEN_DTYPES = (torch.bfloat16, torch.float32)
SCALING_DTYPES = (*SPECIMEN_DTYPES, torch.float16)


def dot_precision(dtype: torch.dtype) -> str:
    """How products of this dtype run: three TF32 products keep float32's accuracy on tensor cores; 16-bit types ignore it."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def drops(seed: torch.Tensor | None, dropout_p: float) -> bool:
    """Whether anything is dropped."""
    return seed is not None and dropout_p > 0.0


def keep_arguments(seed: torch.Tensor | None, dropout_p: float) -> tuple[int, float]:
    """(threshold, scale) of dropout as kernels take them; a threshold of 0 means none. Its 32 bits come as those of a signed number."""
    if not drops(seed, dropout_p):
        return 0, 1.0
    threshold = int(dropout_p * 2**32)
    return threshold - 2**32 if threshold >= 2**31 else threshold, 1.0 / (1.0 - dropout_p)
