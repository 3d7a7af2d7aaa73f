"""x86-64 with AVX-512 but no vector popcount: Skylake-X, Cascade Lake, Cooper Lake."""

from targets._target import ByteCounter, Target
from targets._x86 import AVX512BW, SIGN_BITS

TARGET = Target(
    name="x86-avx512bw",
    machine="x86_64",
    triple="x86_64-linux-gnu",
    cpu="skylake-avx512",
    attributes=("-prefer-256-bit",),  # vpshufb has one port: 512-bit registers look up twice as much
    features=frozenset({"avx2", "fma", "bmi2", "popcnt", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    vector_bits=512,
    registers=32,
    popcount="full adders (vpternlogd), nibble table (vpshufb)",
    source="Intel SDM vol. 1 ch. 15; x86-64 psABI level v4",
    cflags=("-march=skylake-avx512", "-mprefer-vector-width=512"),
    gnu_triple="x86_64-linux-gnu",
    zig_triple="x86_64-linux-gnu",
    sign_bits=SIGN_BITS,
    byte_counter=ByteCounter(
        name="avx512bw",
        lanes=16,
        ternary_logic="llvm.x86.avx512.pternlog.d.512",
        pair_sum=AVX512BW.pairs,
        quad_sum=AVX512BW.words,
        look_up="llvm.x86.avx512.pshuf.b.512",
    ),
    byte_product=AVX512BW,
)
