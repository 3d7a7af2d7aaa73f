"""ARM Cortex-M7 with double precision, bare metal, no vectors: STM32F7, STM32H7, i.MX RT."""

from targets._target import Target

TARGET = Target(
    name="cortex-m7",
    machine="arm-none",
    triple="thumbv7em-none-eabihf",
    cpu="cortex-m7",
    attributes=(),
    features=frozenset(),
    vector_bits=32,
    registers=8,  # r0-r12 less addresses and counters
    popcount="shifts and adds of a word",
    source="ARM DDI 0489, Cortex-M7 TRM; ARM DDI 0403, Armv7-M ARM: no popcount",
    cflags=("-mcpu=cortex-m7", "-mthumb", "-mfpu=fpv5-d16", "-mfloat-abi=hard"),
    gnu_triple="arm-none-eabi",
    float_abi="hard",
    tvm_runtime=False,
)
