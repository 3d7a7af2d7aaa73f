"""Counting bits without a vector popcount: full adders first, then one table look-up for many words.

Where a vector popcount is a nibble table (x86 without VPOPCNTDQ), it is worth summing words before counting: a full
adder takes three words of bits to one of sums and one of carries, so the n words of a window become about log2(n)
words, whose bytes are counted, weighted 1, 2, 4, ... and summed across each 32-bit lane:

    sum_i popcount(x_i ^ w_i) = sum_level 2^level popcount(word of level)

Bytes hold the sum of up to 31 words. Weights in words give a vector a filter for every 32 bits, and counts are summed
across those; weights in bytes (`bitserial_conv2d.octets`) give it four times the filters, so that a window has four
times the vectors, the table look-ups are shared by four times as many, and counts are left as they are, in 16 bits.

A full adder that already has a word a and takes two differences d = x ^ w makes the sum a ^ d_1 ^ d_2 and a carry. With
x_1 ^ x_2 and w_1 ^ w_2 stored in place of x_2 and w_2 (`bitserial_conv2d.with_sum`), the sum takes one operation of
three operands, and the carry follows from it, a and d_1: three operations for two words, where four were needed.

Pairs of planes share a network, each beginning at the level of its factor.

It is a tensor intrinsic: `describe` is what the plain operator does to one pixel and one vector of filters, and the
network is how.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from targets import ByteCounter
from tvm_ops.ops.bitserial_conv2d import Planes, counted_octets, octet, octet_everywhere, with_sum

MOST_WORDS = 255 // 8
MOST_OCTET_WORDS = 36  # beyond it the code is long and the gain small
_MOST_LEVELS = 10  # that 16 bits hold, two bytes of five
_ONE_A_LEVEL = 16 * (MOST_WORDS + 1)  # a sum from which on the first byte has to take five levels
_MOST_NETWORKS = 16  # beyond that many pairs of planes the code no longer fits the instruction cache


@dataclass(frozen=True)
class Window:
    """The words of one pixel that are summed at once: taps of the kernel x words of channels, the dilation, planes."""

    PATTERN: ClassVar[str] = r"(popcounts|octets)_(\d+)x(\d+)x(\d+)" + r"_(\d+)" * 6
    """The regular expression of a `name`; `named` takes its groups."""

    height: int
    width: int
    words: int
    dilations: tuple[int, int]
    planes: Planes
    octets: bool = False

    @classmethod
    def named(cls, kind: str, *numbers: str) -> Window:
        """The window whose name has these groups."""
        height, width, words, dy, dx, x, w, x_masked, w_masked = map(int, numbers)
        return cls(height, width, words, (dy, dx), Planes(x, w, bool(x_masked), bool(w_masked)), kind == "octets")

    @property
    def name(self) -> str:
        planes, (dy, dx) = self.planes, self.dilations
        meeting = f"{planes.x}_{planes.w}_{planes.x_masked:d}_{planes.w_masked:d}"
        kind = "octets" if self.octets else "popcounts"
        return f"{kind}_{self.height}x{self.width}x{self.words}_{dy}_{dx}_{meeting}"

    @property
    def vectors(self) -> int:
        """Vectors of weights of a plane."""
        return self.height * self.width * self.words * (4 if self.octets else 1)

    @property
    def most(self) -> int:
        """The largest sum of a network: of all pairs of planes, if it counts them together, or of one."""
        return self.vectors * (sum(self.planes.factors) if self.joint else 1)

    @property
    def joint(self) -> bool:
        """Whether one network counts all pairs of planes."""
        factors = self.planes.factors
        return self.octets and min(factors) > 0 and (self.vectors * sum(factors)).bit_length() <= _MOST_LEVELS

    @property
    def word(self) -> str:
        """The type of one weight."""
        return "uint8" if self.octets else "uint32"


def window(
    kernel: tuple[int, int], words: int, dilations: tuple[int, int], planes: Planes, most: int, octets: bool = False
) -> Window | None:
    """The largest window of whole kernel rows of at most ``most`` words; None for a longer row of taps, or for more
    planes than are worth it."""
    height, width = kernel if kernel[0] * kernel[1] <= most else (1, kernel[1])
    if width > most or planes.x * planes.w > _MOST_NETWORKS:
        return None
    deep = max(d for d in range(1, words + 1) if words % d == 0 and (d == 1 or d * height * width <= most))
    return Window(height, width, deep, dilations, planes, octets)


def register_those_in(text: str, counter: ByteCounter) -> None:
    """Register the intrinsics of ``counter`` that tuning records name, before TVM reads the records."""
    for groups in set(re.findall(rf"{Window.PATTERN}_{counter.name}\b", text)):
        intrinsic(counter, Window.named(*groups))
    for words, summable in set(re.findall(r"\bspread_octets_(\d+)_([01])\b", text)):
        spread(int(words), summable == "1")


def intrinsic(counter: ByteCounter, window: Window) -> str:
    """Register the intrinsic of a window for ``counter``'s vectors, and return its name."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import tirx as T

    name = f"{window.name}_{counter.name}"
    if TensorIntrin.get(name, allow_missing=True) is not None:
        return name
    kh, kw, words = window.height, window.width, window.words
    lanes = counter.octets if window.octets else counter.lanes
    dy, dx = window.dilations
    height, width = (kh - 1) * dy + 1, (kw - 1) * dx + 1
    px, pw = window.planes.stored
    depth, sum_type = (4 * words, window.planes.octet_sums) if window.octets else (words, "int32")
    stored = (words, kh, kw, pw, 4, lanes) if window.octets else (kh, kw, pw, words, lanes)
    levels = window.most.bit_length()

    @T.prim_func(s_tir=True)
    def describe(x: T.handle, w: T.handle, sums: T.handle) -> None:
        pixel = T.match_buffer(x, (height, width, px, depth), "uint32", offset_factor=1)
        filters = T.match_buffer(w, stored, window.word, offset_factor=1)
        out = T.match_buffer(sums, (lanes,), sum_type, offset_factor=1)
        with T.sblock("root"):
            T.reads(out[0:lanes], pixel[0:height, 0:width, 0:px, 0:depth], _all(filters))
            T.writes(out[0:lanes])
            for i, j, k, o in T.grid(kh, kw, words, lanes):
                with T.sblock("update"):
                    _update(window, lanes, pixel, filters, out, (i, j, k, o))

    @T.prim_func(s_tir=True)
    def implement(x: T.handle, w: T.handle, sums: T.handle) -> None:
        xy = T.int32()
        xx = T.int32()
        xp = T.int32()
        pixel = T.match_buffer(x, (height, width, px, depth), "uint32", offset_factor=1, strides=[xy, xx, xp, 1])
        filters = _strided(w, stored, window.word)
        out = T.match_buffer(sums, (lanes,), sum_type, offset_factor=1)
        with T.sblock("root"):
            T.reads(out[0:lanes], pixel[0:height, 0:width, 0:px, 0:depth], _all(filters))
            T.writes(out[0:lanes])
            bits = T.alloc_buffer((levels, 3, counter.lanes), "uint32", scope="local")
            _count(counter, window, pixel, filters, out, bits)

    TensorIntrin.register(name, describe, implement)
    return name


def spread(words: int, summable: bool) -> str:
    """Register the intrinsic that makes vectors of the bytes of ``words`` words, and return its name."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import tirx as T

    name = f"spread_octets_{words}_{summable:d}"
    if TensorIntrin.get(name, allow_missing=True) is not None:
        return name

    @T.prim_func(s_tir=True)
    def describe(x: T.handle, y: T.handle) -> None:
        source = T.match_buffer(x, (words,), "uint32", offset_factor=1)
        copy = T.match_buffer(y, (4 * words,), "uint32", offset_factor=1)
        with T.sblock("root"):
            T.reads(source[0:words])
            T.writes(copy[0 : 4 * words])
            for i in T.serial(4 * words):
                with T.sblock("update"):
                    v = T.axis.spatial(4 * words, i)
                    copy[v] = octet_everywhere(source[v // 4], v % 4, summable)

    @T.prim_func(s_tir=True)
    def implement(x: T.handle, y: T.handle) -> None:
        source = T.match_buffer(x, (words,), "uint32", offset_factor=1)
        copy = T.match_buffer(y, (4 * words,), "uint32", offset_factor=1)
        with T.sblock("root"):
            T.reads(source[0:words])
            T.writes(copy[0 : 4 * words])
            _spread(source, copy, words, summable)

    TensorIntrin.register(name, describe, implement)
    return name


def _spread(source: Any, copy: Any, words: int, summable: bool) -> None:
    """All words, at most four, in each 128 bits first: then one shuffle of bytes inside these is left."""
    from tvm import tirx
    from tvm.script.ir_builder.tirx import buffer_store

    def chosen(vector: Any, places: list[int]) -> Any:
        copies = [vector] * (len(places) // int(vector.ty.dtype.lanes))  # TVM wants as many lanes to choose from
        return tirx.Shuffle(copies, [tirx.const(place, "int32") for place in places])

    lanes = 4 * words
    if words == 1:
        everywhere = tirx.Broadcast(source[0], lanes)
    else:
        everywhere = chosen(source[tirx.Ramp(0, 1, words)], [i % words for _ in range(words) for i in range(4)])
    if summable:
        everywhere = with_sum(everywhere, lambda value: tirx.Broadcast(tirx.const(value, "uint32"), lanes))
    octets = tirx.reinterpret(f"uint8x{4 * lanes}", everywhere)
    octets = chosen(octets, [i // 16 * (16 + 4) + i % 16 // 4 for i in range(4 * lanes)])  # of the i // 16th word
    buffer_store(copy, tirx.reinterpret(f"uint32x{lanes}", octets), [tirx.Ramp(0, 1, lanes)])


def _all(buffer: Any) -> Any:
    """The region of a whole buffer."""
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]


def _strided(handle: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A parameter's buffer, part of a larger one: any strides but of the last axis."""
    from tvm.script import tirx as T

    strides = [T.int32() for _ in shape[:-1]]
    return T.match_buffer(handle, shape, dtype, offset_factor=1, strides=[*strides, 1])


def _update(window: Window, lanes: int, x: Any, w: Any, sums: Any, loops: tuple[Any, Any, Any, Any]) -> None:
    """The plain operator's inner statement. TVM drops a reduction axis of extent 1, so it must not be there either."""
    from tvm.script.ir_builder.tirx import axis, buffer_store

    *reduced, lane = loops
    o = axis.spatial(lanes, lane)
    extents = (window.height, window.width, window.words)
    i, j, k = (axis.reduce(extent, loop) if extent > 1 else 0 for extent, loop in zip(extents, reduced, strict=True))
    dy, dx = window.dilations
    if window.octets:
        ones = counted_octets(
            window.planes,
            lambda plane, byte: x[i * dy, j * dx, plane, 4 * k + byte].astype("uint8"),
            lambda plane, byte: w[k, i, j, plane, byte, octet(o, lanes)],
        )
    else:
        ones = window.planes.count(lambda plane: x[i * dy, j * dx, plane, k], lambda plane: w[i, j, plane, k, o])
    buffer_store(sums, sums[o] + ones, [o])


def _count(counter: ByteCounter, window: Window, x: Any, w: Any, sums: Any, bits: Any) -> None:
    """Add what the planes' terms count in a window to ``sums``; ``bits`` is memory for the network."""
    from tvm import tirx
    from tvm.script.ir_builder.tirx import buffer_store

    word, octets = f"uint32x{counter.lanes}", f"uint8x{counter.octets}"
    dy, dx = window.dilations
    w = _anew(w) if window.octets else w

    def weights(i: int, j: int, plane: int, k: int) -> Any:
        if window.octets:
            return tirx.reinterpret(word, w.vload([k // 4, i, j, plane, k % 4, 0], octets))
        return w.vload([i, j, plane, k, 0], word)

    taps = [
        window.planes.terms(
            lambda plane, i=i, j=j, k=k: tirx.Broadcast(x[i * dy, j * dx, plane, k], counter.lanes),  # type: ignore[misc]
            lambda plane, i=i, j=j, k=k: weights(i, j, plane, k),  # type: ignore[misc]
        )
        for k in range(int(x.shape[-1]))
        for i in range(window.height)
        for j in range(window.width)
    ]
    kind, lanes = ("int16", 2 * counter.lanes) if window.octets else ("int32", counter.lanes)
    terms = [(term[0][0], [word for _, word in term]) for term in zip(*taps, strict=True)]
    totals: dict[int, Any] = {}
    for factor, together in [(1, terms)] if window.joint else [(factor, [(1, words)]) for factor, words in terms]:
        levels = _levels(counter, window, together, bits)
        for first, ones in (_interleaved if window.octets else _summed)(counter, levels):
            ones = ones if factor == 1 else ones * tirx.Broadcast(tirx.const(factor, kind), lanes)
            totals[first] = totals[first] + ones if first in totals else ones
    for first, ones in totals.items():
        at = [tirx.Ramp(first, 1, lanes)]
        buffer_store(sums, sums[*at] + tirx.Cast(f"{sums.dtype}x{lanes}", ones), at)


def _anew(weights: Any) -> Any:
    """Weights at the same place, of which LLVM knows neither that it stays nor what it is made of.

    LLVM would copy a loop's weights to the stack before the loop, as if they stayed in registers, and an operand whose
    address adds two registers takes a place of its own in the front end. TVM tells LLVM that different buffers never
    overlap, so this is for what a function does not write.
    """
    from tvm import tirx
    from tvm.script import tirx as T
    from tvm.script.ir_builder.tirx import bind

    place = tirx.address_of(weights[(0,) * len(weights.shape)])
    place = tirx.call_llvm_pure_intrin(place.ty, "llvm.launder.invariant.group", place)
    aligned = tirx.const(-int(weights.shape[-1]), "int64")  # as it is: a vector's bytes
    place = bind(tirx.call_llvm_pure_intrin(place.ty, "llvm.ptrmask", place, aligned))  # TVM's CSE forgets uses below
    return T.decl_buffer(weights.shape, weights.dtype, data=place, strides=weights.strides)


def _levels(
    counter: ByteCounter, window: Window, terms: list[tuple[int, list[Any]]], bits: Any
) -> list[tuple[int, Any]]:
    """Words whose ones are as many as those of terms, [(power of two, words)]: [(its logarithm, word)].

    Of two words that are left at a level, a half adder makes two words again: two operations for nothing, unless its
    carry makes three of two soon. But sums that need all 16 bits need one word a level, and behind masks networks are
    no faster without (sums of 14x14x256 7 % slower, bits 2 % faster, Cascade Lake, November 2026).

    A word goes in as soon as it is made, and a carry as soon as three meet, so that few wait in registers. They wait
    in ``bits``, which LLVM takes apart again: TVM's analysis of a long chain of bound variables takes exponential time.
    """
    from tvm import tirx
    from tvm.script.ir_builder.tirx import bind, buffer_store

    waiting = [0] * int(bits.shape[0])

    def place(level: int, slot: int) -> list[Any]:
        return [level, slot, tirx.Ramp(0, 1, counter.lanes)]

    def take(level: int, most: int) -> list[Any]:
        left = max(0, waiting[level] - most)
        taken = [bind(bits[*place(level, slot)]) for slot in range(left, waiting[level])]
        waiting[level] = left
        return taken

    def add(word: Any, level: int) -> None:
        buffer_store(bits, word, place(level, waiting[level]))
        waiting[level] += 1
        if waiting[level] == 3:
            a, b, c = take(level, 3)
            total = bind(_sum(counter, a, b, c))
            add(total, level)
            add(bind(_carry(counter, b, c, total)), level + 1)

    leveled = [(factor.bit_length() - 1, words) for factor, words in terms]
    taps = window.height * window.width
    if window.octets and window.planes.summable:
        for of_word in range(0, 4 * window.words * taps, 2 * taps):
            for at, (level, words) in itertools.product(range(of_word, of_word + taps), leveled):
                total, carry = _pair(counter, take(level, 1), bind(words[at]), words[at + taps])
                add(total, level)
                add(carry, level + 1)
    else:
        for at, (level, words) in itertools.product(range(len(leveled[0][1])), leveled):
            add(words[at], level)
    one_a_level = window.most >= _ONE_A_LEVEL or not window.planes.summable
    for level, left in enumerate(waiting):  # which grows while it is read
        if left == 2 and (one_a_level or 2 in waiting[level + 1 : level + 3]):
            a, b = take(level, 2)
            add(a ^ b, level)
            add(a & b, level + 1)
    return [(level, bits[*place(level, slot)]) for level, left in enumerate(waiting) for slot in range(left)]


def _logic(counter: ByteCounter, a: Any, b: Any, c: Any, table: int) -> Any:
    from tvm import tirx

    bits = tirx.const(table, "int32")
    return tirx.call_llvm_pure_intrin(f"uint32x{counter.lanes}", counter.ternary_logic, a, b, c, bits)


def _sum(counter: ByteCounter, a: Any, b: Any, c: Any) -> Any:
    """The sums of three words' bits."""
    return _logic(counter, a, b, c, 0x96) if counter.ternary_logic else b ^ c ^ a  # as `_carry` has it of b and c


def _carry(counter: ByteCounter, a: Any, b: Any, total: Any) -> Any:
    """The carries of three words' bits, of two and the sums: a where a = b, else not the sum.

    The third is not needed: its register may have taken the sum, and it need never have been.
    """
    if counter.ternary_logic:
        return _logic(counter, a, b, total, 0xD4)
    return (a & b) | ((a ^ b) & ~total)


def _pair(counter: ByteCounter, waiting: list[Any], first: Any, both: Any) -> tuple[Any, Any]:
    """The sums and carries of at most one ``waiting`` word's bits and those of two, of whose sum and first."""
    from tvm.script.ir_builder.tirx import bind

    if not waiting:
        both = bind(both)
        return both, bind(first & ~both)
    (a,) = waiting
    if counter.ternary_logic:
        total = bind(a ^ both)  # which is x ^ w: one instruction
        return total, bind(_carry(counter, a, first, total))
    both = bind(both)
    return bind(a ^ both), bind(first ^ ((first ^ a) & both))


def _in_bytes(counter: ByteCounter, levels: list[tuple[int, Any]]) -> Any:
    """The ones of levels, byte by byte, as multiples of the first: nibbles look them up, in a table for each level."""
    from tvm import tirx
    from tvm.script.ir_builder.tirx import bind

    octets = f"uint8x{counter.octets}"
    nibble = tirx.Broadcast(tirx.const(0x0F0F0F0F, "uint32"), counter.lanes)
    four = tirx.Broadcast(tirx.const(4, "uint32"), counter.lanes)
    numbers = tirx.Ramp(tirx.const(0, "uint8"), tirx.const(1, "uint8"), counter.octets)
    total = None
    for level, bits in levels:
        fifteen, weight = (
            tirx.Broadcast(tirx.const(n, "uint8"), counter.octets) for n in (15, 1 << level - levels[0][0])
        )
        table = tirx.popcount(numbers & fifteen) * weight
        for half in (bits, bits >> four):
            index = tirx.reinterpret(octets, half & nibble)
            ones = tirx.call_llvm_pure_intrin(octets, counter.look_up, table, index)
            total = ones if total is None else total + ones
    return bind(total)


def _summed(counter: ByteCounter, levels: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The ones of levels, summed across words."""
    from tvm.script.ir_builder.tirx import bind

    return [(0, bind(counter.sum_bytes(_in_bytes(counter, levels))))]


def _interleaved(counter: ByteCounter, levels: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The ones of levels, a byte a filter: the halves of each 128 bits make two vectors of 16-bit sums."""
    from tvm import tirx
    from tvm.script.ir_builder.tirx import bind

    octets, lanes = counter.octets, 2 * counter.lanes
    weights = itertools.accumulate(1 << level for level, _ in levels)
    first = sum(weight <= MOST_WORDS for weight in weights)  # so many fit the first byte, whatever is one
    rest = levels[first:]
    assert sum(1 << level - rest[0][0] for level, _ in rest) <= MOST_WORDS, "a byte would overflow"
    low, high = _in_bytes(counter, levels[:first]), _in_bytes(counter, rest) if rest else None
    zeros = tirx.Broadcast(tirx.const(0, "uint8"), octets)
    found = []
    for half in (0, 8):
        pairs = [
            tirx.const(lane + half + i + octets * which, "int32")
            for lane in range(0, octets, 16)
            for i in range(8)
            for which in (0, 1)
        ]
        both = tirx.Shuffle([low, zeros if high is None else high], pairs)
        if high is None:
            ones = tirx.reinterpret(f"int16x{lanes}", both)
        else:
            factors = tirx.Broadcast(tirx.const(1 + (256 << rest[0][0]), "int16"), lanes)
            factors = tirx.reinterpret(f"int8x{octets}", factors)
            ones = tirx.call_llvm_pure_intrin(f"int16x{lanes}", counter.pair_sum, both, factors)
        found.append((half * octets // 16, bind(ones)))
    return found
