"""NVIDIA Hopper: H100, H200."""

from targets import x86_avx2
from targets._gpu import Gpu

TARGET = x86_avx2.TARGET.with_gpu(
    Gpu(arch="sm_90", bit_product="and", fragment=(16, 8, 256), async_copy=True, shared_bytes=227 << 10)
)
