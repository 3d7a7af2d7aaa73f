"""NVIDIA Blackwell data centre GPUs: B200."""

from targets import x86_avx2
from targets._gpu import Gpu

TARGET = x86_avx2.TARGET.with_gpu(
    Gpu(arch="sm_100", bit_product="", fragment=(0, 0, 0), async_copy=True, shared_bytes=227 << 10)
)
