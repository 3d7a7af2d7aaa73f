"""ARM Cortex-A710, big core of Armv9 phones. Its SVE registers are 128 bits too, so the code is NEON."""

from targets._neon import NEON_DOT, SLI
from targets._target import Target

TARGET = Target(
    name="cortex-a710",
    machine="aarch64",
    triple="aarch64-linux-gnu",
    cpu="cortex-a710",
    attributes=("-sve",),  # LLVM would count with predicated SVE instructions: one more a vector than cnt, udot
    features=frozenset(
        {"asimd", "asimddp", "asimdfhm", "asimdhp", "asimdrdm", "atomics", "bf16", "fcma", "flagm", "flagm2", "fphp"}
        | {"frint", "i8mm", "ilrcpc", "jscvt", "lrcpc", "uscat"}
    ),
    vector_bits=128,
    registers=32,
    popcount="cnt, udot",
    source="ARM 101800, Cortex-A710 TRM; Linux arch/arm64/include/asm/cputype.h",
    cflags=("-mcpu=cortex-a710+nosve",),
    gnu_triple="aarch64-linux-gnu",
    zig_triple="aarch64-linux-gnu",
    cpu_part="0xd47",
    byte_popcount=NEON_DOT,
    shift_insert=SLI,
)
