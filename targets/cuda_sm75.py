"""NVIDIA Turing: T4, RTX 20."""

from targets import x86_avx2
from targets._gpu import Gpu

TARGET = x86_avx2.TARGET.with_gpu(
    Gpu(arch="sm_75", bit_product="xor", fragment=(8, 8, 128), async_copy=False, shared_bytes=64 << 10)
)
