"""ARM Cortex-A53, in order: Raspberry Pi 3 and Zero 2, i.MX 8M, Zynq UltraScale+."""

from targets._neon import NEON, SLI_IN_ORDER
from targets._target import Target

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
    byte_popcount=NEON,
    shift_insert=SLI_IN_ORDER,
)
