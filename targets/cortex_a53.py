"""ARM Cortex-A53, in order: Raspberry Pi 3 and Zero 2, i.MX 8M, Zynq UltraScale+."""

from targets._target import BytePopcount, Target

TARGET = Target(
    name="cortex-a53",
    machine="aarch64",
    triple="aarch64-linux-gnu",
    cpu="cortex-a53",
    attributes=(),
    features=frozenset({"asimd"}),
    vector_bits=128,
    registers=32,
    popcount="cnt, uadalp",
    source="ARM DDI 0500, Cortex-A53 TRM; Linux arch/arm64/include/asm/cputype.h",
    cflags=("-mcpu=cortex-a53",),
    gnu_triple="aarch64-linux-gnu",
    zig_triple="aarch64-linux-gnu",
    cpu_part="0xd03",
    byte_popcount=BytePopcount(
        name="neon",
        add="llvm.aarch64.neon.uaddlp.v8i16.v16i8",
        lane_bits=16,
        operands="bytes",
        widen="llvm.aarch64.neon.uaddlp.v4i32.v8i16",
    ),
)
