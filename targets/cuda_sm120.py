"""NVIDIA Blackwell: RTX 50, RTX PRO."""

import dataclasses

from targets import x86_avx2
from targets._gpu import Gpu

TARGET = dataclasses.replace(
    x86_avx2.TARGET,
    name="cuda-sm120",
    popcount="POPC: no 1-bit tensor cores, the compiler emulates them",
    source="CUDA C++ Programming Guide 13.0, compute capabilities; PTX ISA 9.0, mma; nvcc 13.0.88's SASS",
    byte_counter=None,
    gpu=Gpu(arch="sm_120", bit_product="", fragment=(0, 0, 0), async_copy=True, shared_bytes=99 << 10),
)
