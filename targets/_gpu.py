"""The record of an NVIDIA GPU, and what this machine's GPU is."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

SOURCE = "CUDA C++ Programming Guide 13.0, compute capabilities; PTX ISA 9.0, mma; nvcc 13.0.88's SASS"
"""Where the numbers of all GPUs are from."""


@dataclass(frozen=True)
class Gpu:
    """A compute capability as facts.

    Attributes:
        arch: 'sm_80' is compute capability 8.0. Its code runs on GPUs of the same major number and no lower minor one.
        bit_product: what its 1-bit tensor cores do to a pair of words before they count; '' without such cores (or
            where the compiler emulates them), and words meet by xor in the ordinary cores.
        fragment: rows x columns x bits of that instruction.
        async_copy: whether global memory is copied to shared memory in the background (cp.async).
        shared_bytes: shared memory that one block may have, with the kernel's leave.
    """

    arch: str
    bit_product: Literal["and", "xor", ""]
    fragment: tuple[int, int, int]
    async_copy: bool
    shared_bytes: int

    @property
    def popcount(self) -> str:
        """How a target with this GPU counts words."""
        if self.bit_product:
            return f"1-bit tensor cores (BMMA, {self.bit_product})"
        return "POPC: no 1-bit tensor cores, the compiler emulates them"

    def missing(self) -> str:
        """What this machine lacks to run its code; '' when it can."""
        return missing((self.arch,))

    def takes(self, other: Gpu, shared_bytes: int) -> bool:
        """Whether kernels made for ``other``, whose blocks share so many bytes at most, are right here too."""
        alike = replace(other, arch=self.arch, shared_bytes=self.shared_bytes) == self
        return alike and shared_bytes <= self.shared_bytes


def missing(architectures: Sequence[str]) -> str:
    """What this machine lacks to run code for one of ``architectures``; '' when it can."""
    oldest: dict[int, int] = {}
    for number in sorted((int(arch.removeprefix("sm_")) for arch in architectures), reverse=True):
        oldest[number // 10] = number % 10
    found = capability()
    if found and found[1] >= oldest.get(found[0], 10):
        return ""
    ranges = [f"{major}.{minor}" + (f" to {major}.9" if minor < 9 else "") for major, minor in sorted(oldest.items())]
    return f"an NVIDIA GPU of compute capability {' or '.join(ranges)}"


@cache
def capability() -> tuple[int, int] | None:
    """The compute capability of this machine's first GPU, by its driver; None without either."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    numbers = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        numbers.append(value.value)
    return numbers[0], numbers[1]
