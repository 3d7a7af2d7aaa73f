"""NVIDIA Jetson Orin, with its Cortex-A78AE."""

from targets import cortex_a76
from targets._gpu import Gpu

TARGET = cortex_a76.TARGET.with_gpu(
    Gpu(arch="sm_87", bit_product="and", fragment=(16, 8, 256), async_copy=True, shared_bytes=163 << 10)
)
