"""What NEON counts and gathers bits with, each shared by the cores that have it."""

from targets._target import BytePopcount, ShiftInsert

# 16-bit sums of pairs of bytes, added apart: LLVM makes uadalp of both.
NEON = BytePopcount(
    name="neon",
    add="llvm.aarch64.neon.uaddlp.v8i16.v16i8",
    lane_bits=16,
    operands="bytes",
    straight=18,
    fenced=6,
    widen="llvm.aarch64.neon.uaddlp.v4i32.v8i16",
)

# Dot products with ones, to 32-bit lanes: cores from Armv8.2 on.
NEON_DOT = BytePopcount(
    name="neon_dot",
    add="llvm.aarch64.neon.udot.v4i32.v16i8",
    lane_bits=32,
    operands="sums, bytes, factors",
    straight=18,
    fenced=6,
)

# 32-bit ARM: vpadal, which LLVM forms from its intrinsic only.
NEON_32 = BytePopcount(
    name="neon32",
    add="llvm.arm.neon.vpadalu.v8i16.v16i8",
    lane_bits=16,
    operands="sums, bytes",
    straight=12,
    fenced=0,
    widen="llvm.arm.neon.vpaddlu.v4i32.v8i16",
)

SLI = ShiftInsert("llvm.aarch64.neon.vsli.v4i32", amounts=False)
SLI_32 = ShiftInsert("llvm.arm.neon.vshiftins.v4i32", amounts=True)
