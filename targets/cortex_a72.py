"""ARM Cortex-A72: Raspberry Pi 4, i.MX 8 QuadMax, AWS Graviton 1."""

from targets._target import BytePopcount, Target

TARGET = Target(
    name="cortex-a72",
    machine="aarch64",
    triple="aarch64-linux-gnu",
    cpu="cortex-a72",
    attributes=(),
    features=frozenset({"asimd"}),
    vector_bits=128,
    registers=32,
    popcount="cnt, uadalp",
    source="ARM 100095, Cortex-A72 TRM; Linux arch/arm64/include/asm/cputype.h",
    cflags=("-mcpu=cortex-a72",),
    gnu_triple="aarch64-linux-gnu",
    zig_triple="aarch64-linux-gnu",
    cpu_part="0xd08",
    byte_popcount=BytePopcount(
        name="neon",
        add="llvm.aarch64.neon.uaddlp.v8i16.v16i8",
        lane_bits=16,
        operands="bytes",
        widen="llvm.aarch64.neon.uaddlp.v4i32.v8i16",
    ),
)
