"""ARM Cortex-A72: Raspberry Pi 4, i.MX 8 QuadMax, AWS Graviton 1."""

from targets._neon import NEON, SLI
from targets._target import Target

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
    byte_popcount=NEON,
    shift_insert=SLI,
)
