"""NVIDIA Turing: T4, RTX 20."""

import dataclasses

from targets import x86_avx2
from targets._gpu import Gpu

TARGET = dataclasses.replace(
    x86_avx2.TARGET,
    name="cuda-sm75",
    popcount="1-bit tensor cores (BMMA, xor)",
    source="CUDA C++ Programming Guide 13.0, compute capabilities; PTX ISA 9.0, mma; nvcc 13.0.88's SASS",
    byte_counter=None,
    gpu=Gpu(arch="sm_75", bit_product="xor", fragment=(8, 8, 128), async_copy=False, shared_bytes=64 << 10),
)
