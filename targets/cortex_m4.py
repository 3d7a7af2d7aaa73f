"""ARM Cortex-M4F, bare metal, no vectors: STM32F4, nRF52, many others."""

from targets._target import Target

TARGET = Target(
    name="cortex-m4",
    machine="arm-none",
    triple="thumbv7em-none-eabihf",
    cpu="cortex-m4",
    attributes=(),
    features=frozenset(),
    vector_bits=32,
    registers=8,  # r0-r12 less addresses and counters
    popcount="shifts and adds of a word",
    source="ARM 100166, Cortex-M4 TRM; ARM DDI 0403, Armv7-M ARM: no popcount",
    cflags=("-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"),
    gnu_triple="arm-none-eabi",
    float_abi="hard",
    tvm_runtime=False,
)
