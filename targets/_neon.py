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

# How many pixels, and which of the forms: what takes fewest cycles in LLVM's models of the A72, the A53 and the A9.
_SLI, _ADDP = "llvm.aarch64.neon.vsli.v4i32", "llvm.aarch64.neon.addp.v4i32"
SLI = ShiftInsert(_SLI, amounts=False, pairs=_ADDP, lanes=4, pixels=14, fenced=True)
SLI_IN_ORDER = ShiftInsert(_SLI, amounts=False, pairs=_ADDP, lanes=4, pixels=8, chained=True)
SLI_32 = ShiftInsert(
    "llvm.arm.neon.vshiftins.v4i32", amounts=True, pairs="llvm.arm.neon.vpadd.v2i32", lanes=2, pixels=1
)
