"""ARM Cortex-A76, with dot products: Raspberry Pi 5, RK3588."""

from targets._neon import NEON_DOT, SLI
from targets._target import Target

TARGET = Target(
    name="cortex-a76",
    machine="aarch64",
    triple="aarch64-linux-gnu",
    cpu="cortex-a76",
    attributes=(),
    features=frozenset({"asimd", "asimddp", "asimdhp", "asimdrdm", "atomics", "fphp", "lrcpc"}),
    vector_bits=128,
    registers=32,
    popcount="cnt, udot",
    source="ARM 100798, Cortex-A76 TRM; Linux arch/arm64/include/asm/cputype.h",
    cflags=("-mcpu=cortex-a76",),
    gnu_triple="aarch64-linux-gnu",
    zig_triple="aarch64-linux-gnu",
    cpu_part="0xd0b",
    byte_popcount=NEON_DOT,
    shift_insert=SLI,
)
