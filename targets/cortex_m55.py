"""ARM Cortex-M55 with Helium (MVE), bare metal: Alif Ensemble, Himax WE2, Corstone-300."""

from targets._target import Target

TARGET = Target(
    name="cortex-m55",
    machine="arm-none",
    triple="thumbv8.1m.main-none-eabihf",
    cpu="cortex-m55",
    attributes=(),
    features=frozenset(),
    vector_bits=128,
    registers=8,
    popcount="shifts and adds of a vector: MVE has no vcnt",
    source="ARM 101051, Cortex-M55 TRM; ARM DDI 0553, Armv8-M ARM: eight Q registers, no VCNT",
    cflags=("-mcpu=cortex-m55", "-mthumb", "-mfloat-abi=hard"),
    gnu_triple="arm-none-eabi",
    float_abi="hard",
    tvm_runtime=False,
)
