"""ARM Cortex-A55, in order, with dot products: RK3568, i.MX 93, little cores of phones."""

from targets._neon import NEON_DOT, SLI_IN_ORDER
from targets._target import Target

TARGET = Target(
    name="cortex-a55",
    machine="aarch64",
    triple="aarch64-linux-gnu",
    cpu="cortex-a55",
    attributes=(),
    features=frozenset({"asimd", "asimddp", "asimdhp", "asimdrdm", "atomics", "fphp", "lrcpc"}),
    vector_bits=128,
    registers=32,
    popcount="cnt, udot",
    source="ARM 100442, Cortex-A55 TRM; Linux arch/arm64/include/asm/cputype.h",
    cflags=("-mcpu=cortex-a55",),
    gnu_triple="aarch64-linux-gnu",
    zig_triple="aarch64-linux-gnu",
    cpu_part="0xd05",
    byte_popcount=NEON_DOT,
    shift_insert=SLI_IN_ORDER,
)
