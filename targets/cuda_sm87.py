"""NVIDIA Jetson Orin, with its Cortex-A78AE."""

import dataclasses

from targets import cortex_a76
from targets._gpu import Gpu

TARGET = dataclasses.replace(
    cortex_a76.TARGET,
    name="cuda-sm87",
    popcount="1-bit tensor cores (BMMA, and)",
    source="CUDA C++ Programming Guide 13.0, compute capabilities; PTX ISA 9.0, mma; nvcc 13.0.88's SASS",
    byte_popcount=None,
    shift_insert=None,
    gpu=Gpu(arch="sm_87", bit_product="and", fragment=(16, 8, 256), async_copy=True, shared_bytes=163 << 10),
)
