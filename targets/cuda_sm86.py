"""NVIDIA Ampere: A10, A40, RTX 30."""

from targets import x86_avx2
from targets._gpu import Gpu

TARGET = x86_avx2.TARGET.with_gpu(
    Gpu(arch="sm_86", bit_product="and", fragment=(16, 8, 256), async_copy=True, shared_bytes=99 << 10)
)
