"""x86-64 with AVX-512 and VPOPCNTDQ: Ice Lake, Sapphire Rapids, Zen 4, Zen 5."""

from targets._target import Target
from targets._x86 import AVX512VNNI, SIGN_BITS

TARGET = Target(
    name="x86-avx512",
    machine="x86_64",
    triple="x86_64-linux-gnu",
    cpu="x86-64-v4",
    attributes=("+avx512vpopcntdq", "+avx512vnni", "+avx512bitalg", "-prefer-256-bit"),
    features=frozenset(
        {"avx2", "fma", "bmi2", "popcnt", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
        | {"avx512_vpopcntdq", "avx512_vnni", "avx512_bitalg"}
    ),
    vector_bits=512,
    registers=32,
    popcount="vpopcntd",
    source="Intel SDM vol. 1 ch. 15; AMD64 APM vol. 3 appendix D",
    cflags=("-march=x86-64-v4", "-mavx512vpopcntdq", "-mavx512vnni", "-mavx512bitalg", "-mprefer-vector-width=512"),
    gnu_triple="x86_64-linux-gnu",
    zig_triple="x86_64-linux-gnu",
    sign_bits=SIGN_BITS,
    byte_product=AVX512VNNI,
)
