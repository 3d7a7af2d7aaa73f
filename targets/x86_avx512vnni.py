"""x86-64 with AVX-512 and byte products (VNNI), but no vector popcount: Cascade Lake, Cooper Lake."""

import dataclasses

from targets import x86_avx512bw
from targets._x86 import AVX512VNNI

TARGET = dataclasses.replace(
    x86_avx512bw.TARGET,
    name="x86-avx512vnni",
    cpu="cascadelake",
    features=x86_avx512bw.TARGET.features | {"avx512_vnni"},
    source="Intel SDM vol. 1 ch. 15 and vol. 2, VPDPBUSD; Intel Optimization Manual ch. 18",
    cflags=("-march=cascadelake", "-mprefer-vector-width=512"),
    byte_product=AVX512VNNI,
)
