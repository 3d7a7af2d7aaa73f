"""Floats or codes to bits, 32 channels a word."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from targets import ShiftInsert
from tvm_ops.bitplanes import WORD_BITS
from tvm_ops.output_transform import Threshold
from tvm_ops.tir import replaced

BLOCK = "pack_words"
"""The TIR block that packs, by which schedules know that it reads vectors and writes a word for 32 channels."""

_GATHER = "llvm.vector.reduce.or"
_LANES = 4  # of the vectors of `with_shifts`


FLAGS = "flags"
"""The TIR block of bits that GPUs pack, never a whole tensor."""


def constants(threshold: Threshold) -> list[np.ndarray]:
    """What `compute` takes after x: the lower bounds, and the upper ones where a channel descends.

    flip * x >= at is at <= x where flip is +1, and x <= -at where it is -1.
    """
    at, descends = threshold.at.astype(np.float32), threshold.flip < 0
    if not descends.any():
        return [at]
    return [np.where(descends, np.float32(-np.inf), at), np.where(descends, -at, np.float32(np.inf))]


def compute(x: Any, low: Any, high: Any = None) -> Any:
    """bit = low <= x (<= high), least significant bit first; a NaN on either side gives 0.

    x: float32 [..., C]. low, high: float32 [C]. -> uint32 [..., 1, ceil(C / 32)], the tail of the last word zero.
    """
    from tvm import te, tirx

    *outer, channels = (int(extent) for extent in x.shape)

    def word(*index: Any) -> Any:
        def bits(first: int, count: int) -> Any:
            lanes = ramp(index[-1] * WORD_BITS + first, count)
            value = x[(*index[:-2], lanes)]
            above = value >= low[lanes]
            return above if high is None else tirx.And(above, value <= high[lanes])

        return pack(bits, index[-1], channels)

    return te.compute((*outer, 1, -(-channels // WORD_BITS)), word, name=BLOCK)


def compute_planes(x: Any, planes: int) -> Any:
    """Bit p of every channel in plane p: uint8 [..., C] -> uint32 [..., planes, ceil(C / 32)]."""
    from tvm import te, tirx

    *outer, channels = (int(extent) for extent in x.shape)

    def word(*index: Any) -> Any:
        def bits(first: int, count: int) -> Any:
            chosen = tirx.shift_left(tirx.const(1, "uint8"), tirx.Cast("uint8", index[-2]))
            value = x[(*index[:-2], ramp(index[-1] * WORD_BITS + first, count))]
            return (as_vector(value, "uint8", count) & chosen) != tirx.const(0, "uint8")

        return pack(bits, index[-1], channels)

    return te.compute((*outer, planes, -(-channels // WORD_BITS)), word, name=BLOCK)


def compute_by_lanes(x: Any, low: Any, high: Any = None) -> Any:
    """`compute` for GPUs."""
    from tvm import tirx

    *outer, channels = (int(extent) for extent in x.shape)

    def bit(*index: Any) -> Any:
        *place, _, c = index
        value = x[(*place, c)]
        return value >= low[c] if high is None else tirx.And(value >= low[c], value <= high[c])

    return by_lanes(bit, tuple(outer), 1, channels)


def compute_planes_by_lanes(x: Any, planes: int) -> Any:
    """`compute_planes` for GPUs."""
    from tvm import tirx

    *outer, channels = (int(extent) for extent in x.shape)

    def bit(*index: Any) -> Any:
        *place, plane, c = index
        return (tirx.Cast("uint32", x[(*place, c)]) >> tirx.Cast("uint32", plane)) & tirx.const(1, "uint32")

    return by_lanes(bit, tuple(outer), planes, channels)


def by_lanes(bit: Callable[..., Any], outer: tuple[int, ...], planes: int, channels: int) -> Any:
    """A packing for GPUs, where a lane makes a bit: uint32 [*outer, planes, words] of bit(*outer, plane, channel)."""
    from tvm import te, tirx

    words = -(-channels // WORD_BITS)

    def flag(*index: Any) -> Any:
        *_, c = index
        one = tirx.Cast("uint32", bit(*index))
        return tirx.if_then_else(c < channels, one, tirx.const(0, "uint32")) if channels % WORD_BITS else one

    flags = te.compute((*outer, planes, words * WORD_BITS), flag, name=FLAGS)
    lane = te.reduce_axis((0, WORD_BITS), "lane")
    union = te.comm_reducer(lambda a, b: a | b, lambda dtype: tirx.const(0, dtype), name="union")

    def word(*index: Any) -> Any:
        *place, k = index
        return union(flags[(*place, k * WORD_BITS + lane)] << tirx.Cast("uint32", lane), axis=[lane])

    return te.compute((*outer, planes, words), word, name=BLOCK)


def ramp(first: Any, count: int) -> Any:
    """The vector index first, first + 1, ...; of one lane, the scalar."""
    from tvm import tirx

    return tirx.Ramp(first, tirx.const(1, "int32"), count) if count > 1 else first


def as_vector(value: Any, dtype: str, count: int) -> Any:
    """What is loaded at a `ramp`, typed as the vector that it is: TE takes it for a scalar, and arithmetic with real
    scalars would go wrong."""
    from tvm import tirx

    return tirx.call_intrin(f"{dtype}x{count}", "tirx.reinterpret", value) if count > 1 else value


def pack(bits: Any, word: Any, channels: int) -> Any:
    """Word number ``word`` of ``channels`` bits as a TIR expression; bits(first, count) is a vector of booleans.

    Or-reducing a vector of selected powers of two is the one portable form that LLVM turns into compare-to-mask
    instructions (x86) or an add across the vector (ARM): 14x14x256 floats pack in 4.4 us on one Cascade Lake core,
    where a chain of 32 scalar ors takes 66 and a TE reduction 39 (November 2026).
    """
    from tvm import tirx

    def gather(count: int) -> Any:
        ones = tirx.Broadcast(tirx.const(1, "uint32"), count)
        powers = tirx.shift_left(ones, tirx.Ramp(tirx.const(0, "uint32"), tirx.const(1, "uint32"), count))
        zeros = tirx.Broadcast(tirx.const(0, "uint32"), count)
        chosen = tirx.Select(bits(0, count), powers, zeros)
        return tirx.call_llvm_pure_intrin("uint32", _GATHER, chosen)

    whole, rest = divmod(channels, WORD_BITS)
    if not rest:
        return gather(WORD_BITS)
    tail = gather(rest) if rest > 1 else tirx.Cast("uint32", bits(0, 1))
    # A load past the last channel must not happen, so the choice is a branch and no Select.
    return tirx.if_then_else(word < whole, gather(WORD_BITS), tail) if whole else tail


def with_masks(function: Any, sign_bits: str) -> Any:
    """A scheduled function whose packings (`pack`) gather by ``sign_bits``, LLVM's intrinsic of the signs of 32 bytes.

    LLVM knows that it takes the comparisons themselves, and has instructions for those.
    """
    import tvm_ffi
    from tvm import DataType, ir, tirx

    def gather(call: Any) -> Any:
        if not _gathers(call) or DataType(str(call.args[1].ty.dtype)).lanes != WORD_BITS:
            return call
        ones, zeros = (tirx.Broadcast(tirx.const(bits, "int8"), WORD_BITS) for bits in (-1, 0))
        signs = tirx.Select(call.args[1].condition, ones, zeros)
        return tirx.Cast("uint32", tirx.call_llvm_pure_intrin("int32", sign_bits, signs))

    return function.with_body(tvm_ffi.structural_map(function.body, (ir.Call, gather)))


def with_shifts(function: Any, shift: ShiftInsert) -> Any:
    """A scheduled function whose packings (`pack`) of whole vectors of four lanes gather by ``shift``.

    Lane l of vector j decides bit 4 j + l. A comparison is all ones or all zeros, so shifts by 4, 8 and 16 (or by 4, in
    a chain) make one vector of eight, each a nibble of equal bits of every lane; of a nibble, a lane gives its own bit.
    That is 8 operations a word instead of 15 with selected powers of two. Additions of neighbours then make a vector
    of the words of unrolled loops.
    """
    import tvm_ffi
    from tvm import DataType, ir, s_tir, tirx

    def fence(value: Any) -> Any:  # LLVM would take single bits of comparisons apart, and words of stores together
        dtype = str(value.ty.dtype)
        floats = dtype.replace("uint", "float")
        fenced = tirx.call_llvm_pure_intrin(floats, "llvm.arithmetic.fence", tirx.reinterpret(floats, value))
        return tirx.reinterpret(dtype, fenced)

    def gathers(value: Any) -> bool:
        """Whether it is a `pack` of whole vectors."""
        if not isinstance(value, ir.Call) or not _gathers(value):
            return False
        return DataType(str(value.args[1].ty.dtype)).lanes % _LANES == 0

    def own_bits(call: Any) -> Any:
        """A vector of four lanes whose sum is the word."""
        chosen = call.args[1]
        count = DataType(str(chosen.ty.dtype)).lanes
        ones, zeros = (tirx.Broadcast(tirx.const(bits, "uint32"), count) for bits in (0xFFFFFFFF, 0))
        masks = fence(tirx.Select(chosen.condition, ones, zeros))

        def merged(first: int, vectors: int) -> Any:
            if vectors == 1:
                return tirx.Shuffle([masks], list(range(_LANES * first, _LANES * (first + 1))))
            low = 1 if shift.chained else 1 << ((vectors - 1).bit_length() - 1)  # a power of two: its bits are in place
            return shift.insert(merged(first + low, vectors - low), _LANES * low, merged(first, low))

        own = tirx.const(0x11111111 & ((1 << count) - 1), "uint32")
        lanes = tirx.Ramp(tirx.const(0, "uint32"), tirx.const(1, "uint32"), _LANES)
        return merged(0, count // _LANES) & tirx.shift_left(tirx.Broadcast(own, _LANES), lanes)

    def together(loop: Any) -> Any:
        """Unrolled loops around a packing, as straight code whose words are stored by vectors."""
        loops, block = [], loop
        while isinstance(block, tirx.For) and block.kind == tirx.ForKind.UNROLLED:
            loops.append(block)
            block = block.body
        if not isinstance(block, s_tir.SBlockRealize) or not gathers(getattr(block.block.body, "value", None)):
            return loop
        store = replaced(block.block.body, [axis.var for axis in block.block.iter_vars], block.iter_values)
        variables = [each.loop_var for each in loops]
        places = itertools.product(*(range(int(each.extent)) for each in loops))
        stores = [replaced(store, variables, [tirx.const(i, "int32") for i in place]) for place in places]
        straight: list[Any] = []
        for first in range(0, len(stores), shift.lanes):
            group = stores[first : first + shift.lanes]
            words = ir.Var("words", f"uint32x{shift.lanes}")
            straight.append(tirx.Bind(words, shift.sums([own_bits(each.value) for each in group])))
            for lane, each in enumerate(group):
                straight.append(tirx.BufferStore(each.buffer, tirx.Shuffle([words], [lane]), each.indices))
            if shift.fenced:
                straight.append(tirx.Evaluate(tirx.call_llvm_intrin("int32", "llvm.fake.use", words)))
        return tirx.SeqStmt(straight)

    def alone(call: Any) -> Any:
        if not gathers(call):
            return call
        return fence(tirx.call_llvm_pure_intrin("uint32", "llvm.vector.reduce.add", own_bits(call)))

    body = tvm_ffi.structural_map(function.body, (tirx.For, together), order="pre")
    return function.with_body(tvm_ffi.structural_map(body, (ir.Call, alone)))


def _gathers(call: Any) -> bool:
    """Whether a call is the reduction of `pack`."""
    from tvm import ir
    from tvm.target.codegen import llvm_get_intrinsic_name

    intrinsic = ir.Op.get("tirx.call_llvm_pure_intrin")
    return call.op.same_as(intrinsic) and llvm_get_intrinsic_name(int(call.args[0].value)) == _GATHER
