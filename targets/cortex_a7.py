"""ARM Cortex-A7, 32 bits, hard float: Raspberry Pi 2, STM32MP1, i.MX 6UL. NEON takes subnormal floats for zero."""

from targets._neon import NEON_32, SLI_32
from targets._target import Target

TARGET = Target(
    name="cortex-a7",
    machine="armv7l",
    triple="armv7l-linux-gnueabihf",
    cpu="cortex-a7",
    attributes=(),
    features=frozenset({"idiva", "idivt", "neon", "vfpv4"}),
    vector_bits=128,
    registers=16,
    popcount="vcnt, vpadal",
    source="ARM DDI 0464, Cortex-A7 TRM; ARM DDI 0406, Armv7-A ARM, A2.7 (NEON flushes subnormals)",
    cflags=("-mcpu=cortex-a7", "-mfpu=neon-vfpv4", "-mfloat-abi=hard"),
    gnu_triple="arm-linux-gnueabihf",
    zig_triple="arm-linux-gnueabihf",
    float_abi="hard",
    cpu_part="0xc07",
    byte_popcount=NEON_32,
    shift_insert=SLI_32,
)
