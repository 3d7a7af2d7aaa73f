"""x86-64 with AVX2: what every desktop and server core since 2013 (Haswell, Zen 1) runs."""

from targets._target import ByteCounter, Target
from targets._x86 import AVX2, SIGN_BITS

TARGET = Target(
    name="x86-avx2",
    machine="x86_64",
    triple="x86_64-linux-gnu",
    cpu="x86-64-v3",
    attributes=(),
    features=frozenset({"avx2", "fma", "bmi2", "popcnt"}),
    vector_bits=256,
    registers=16,
    popcount="full adders, nibble table (vpshufb)",
    source="x86-64 psABI, micro-architecture level v3",
    cflags=("-march=x86-64-v3",),
    gnu_triple="x86_64-linux-gnu",
    zig_triple="x86_64-linux-gnu",
    sign_bits=SIGN_BITS,
    byte_counter=ByteCounter(
        name="avx2",
        lanes=8,
        ternary_logic="",
        pair_sum=AVX2.pairs,
        quad_sum=AVX2.words,
        look_up="llvm.x86.avx2.pshuf.b",
    ),
    byte_product=AVX2,
)
