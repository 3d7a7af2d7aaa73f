"""NVIDIA Ampere: A100."""

import dataclasses

from targets import x86_avx2
from targets._gpu import Gpu

TARGET = dataclasses.replace(
    x86_avx2.TARGET,
    name="cuda-sm80",
    popcount="1-bit tensor cores (BMMA, and)",
    source="CUDA C++ Programming Guide 13.0, compute capabilities; PTX ISA 9.0, mma; nvcc 13.0.88's SASS",
    byte_counter=None,
    gpu=Gpu(arch="sm_80", bit_product="and", fragment=(16, 8, 256), async_copy=True, shared_bytes=163 << 10),
)
