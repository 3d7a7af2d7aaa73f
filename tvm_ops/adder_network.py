"""Counting bits without a vector popcount: full adders first, then one table look-up for many words.

Where a vector popcount is a nibble table (x86 without VPOPCNTDQ), it is worth summing words before counting: a full
adder takes three words of bits to one of sums and one of carries, so the n words of a window become about log2(n)
words, whose bytes are counted, weighted 1, 2, 4, ... and summed across each 32-bit lane:

    sum_i popcount(x_i ^ w_i) = sum_level 2^level popcount(word of level)

Bytes hold the sum of up to 31 words. It is a tensor intrinsic: `describe` is what the plain operator does to one pixel
and one vector of filters, and the network is how.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from targets import ByteCounter
from tvm_ops.ops.bitserial_conv2d import Planes

MOST_WORDS = 255 // 8
_MOST_NETWORKS = 16  # beyond that many pairs of planes the code no longer fits the instruction cache


@dataclass(frozen=True)
class Window:
    """The words of one pixel that are summed at once: taps of the kernel x words of channels, the dilation, planes."""

    height: int
    width: int
    words: int
    dilations: tuple[int, int]
    planes: Planes

    @property
    def name(self) -> str:
        planes, (dy, dx) = self.planes, self.dilations
        meeting = f"{planes.x}_{planes.w}_{planes.x_masked:d}_{planes.w_masked:d}"
        return f"popcounts_{self.height}x{self.width}x{self.words}_{dy}_{dx}_{meeting}"


def window(
    kernel: tuple[int, int], words: int, dilations: tuple[int, int], planes: Planes, most: int = MOST_WORDS
) -> Window | None:
    """The largest window of whole kernel rows of at most ``most`` words; None for a longer row of taps, or for more
    planes than are worth it."""
    height, width = kernel if kernel[0] * kernel[1] <= most else (1, kernel[1])
    if width > most or planes.x * planes.w > _MOST_NETWORKS:
        return None
    deep = max(d for d in range(1, words + 1) if words % d == 0 and (d == 1 or d * height * width <= most))
    return Window(height, width, deep, dilations, planes)


def register_those_in(text: str, counter: ByteCounter) -> None:
    """Register the intrinsics of ``counter`` that tuning records name, before TVM reads the records."""
    number = r"_(\d+)"
    for numbers in set(re.findall(rf"popcounts_(\d+)x(\d+)x(\d+){number * 6}_{counter.name}\b", text)):
        kh, kw, words, dy, dx, x, w, x_masked, w_masked = map(int, numbers)
        intrinsic(counter, Window(kh, kw, words, (dy, dx), Planes(x, w, bool(x_masked), bool(w_masked))))


def intrinsic(counter: ByteCounter, window: Window) -> str:
    """Register the intrinsic of a window for ``counter``'s vectors, and return its name."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import tirx as T

    name = f"{window.name}_{counter.name}"
    if TensorIntrin.get(name, allow_missing=True) is not None:
        return name
    kh, kw, words, lanes = window.height, window.width, window.words, counter.lanes
    dy, dx = window.dilations
    height, width = (kh - 1) * dy + 1, (kw - 1) * dx + 1
    px, pw = window.planes.stored
    vector = f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def describe(x: T.handle, w: T.handle, sums: T.handle) -> None:
        pixel = T.match_buffer(x, (height, width, px, words), "uint32", offset_factor=1)
        filters = T.match_buffer(w, (kh, kw, pw, words, lanes), "uint32", offset_factor=1)
        out = T.match_buffer(sums, (lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(out[0:lanes], pixel[0:height, 0:width, 0:px, 0:words], filters[0:kh, 0:kw, 0:pw, 0:words, 0:lanes])
            T.writes(out[0:lanes])
            for i, j, k, o in T.grid(kh, kw, words, lanes):
                with T.sblock("update"):
                    _update(window, lanes, pixel, filters, out, (i, j, k, o))

    @T.prim_func(s_tir=True)
    def implement(x: T.handle, w: T.handle, sums: T.handle) -> None:
        xy = T.int32()
        xx = T.int32()
        xp = T.int32()
        wy = T.int32()
        wx = T.int32()
        wp = T.int32()
        wk = T.int32()
        pixel = T.match_buffer(x, (height, width, px, words), "uint32", offset_factor=1, strides=[xy, xx, xp, 1])
        filters = T.match_buffer(w, (kh, kw, pw, words, lanes), "uint32", offset_factor=1, strides=[wy, wx, wp, wk, 1])
        out = T.match_buffer(sums, (lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(out[0:lanes], pixel[0:height, 0:width, 0:px, 0:words], filters[0:kh, 0:kw, 0:pw, 0:words, 0:lanes])
            T.writes(out[0:lanes])
            out.vstore([0], out.vload([0], vector) + _count(counter, window, pixel, filters))

    TensorIntrin.register(name, describe, implement)
    return name


def _update(window: Window, lanes: int, x: Any, w: Any, sums: Any, loops: tuple[Any, Any, Any, Any]) -> None:
    """The plain operator's inner statement. TVM drops a reduction axis of extent 1, so it must not be there either."""
    from tvm.script.ir_builder.tirx import axis, buffer_store

    *reduced, lane = loops
    o = axis.spatial(lanes, lane)
    extents = (window.height, window.width, window.words)
    i, j, k = (axis.reduce(extent, loop) if extent > 1 else 0 for extent, loop in zip(extents, reduced, strict=True))
    dy, dx = window.dilations
    ones = window.planes.count(lambda plane: x[i * dy, j * dx, plane, k], lambda plane: w[i, j, plane, k, o])
    buffer_store(sums, sums[o] + ones, [o])


def _count(counter: ByteCounter, window: Window, x: Any, w: Any) -> Any:
    """What the planes' terms count in a window, as an expression of ``lanes`` int32."""
    from tvm import tirx
    from tvm.script.ir_builder.tirx import bind

    word = f"uint32x{counter.lanes}"
    dy, dx = window.dilations
    taps = [
        window.planes.terms(
            lambda plane, i=i, j=j, k=k: tirx.Broadcast(x[i * dy, j * dx, plane, k], counter.lanes),  # type: ignore[misc]
            lambda plane, i=i, j=j, k=k: w.vload([i, j, plane, k, 0], word),  # type: ignore[misc]
        )
        for k in range(window.words)
        for i in range(window.height)
        for j in range(window.width)
    ]
    total = None
    for terms in zip(*taps, strict=True):
        (factor, _), *_ = terms
        ones = bind(_ones(counter, [bind(found) for _, found in terms]))
        ones = ones if factor == 1 else ones * tirx.Broadcast(tirx.const(factor, "int32"), counter.lanes)
        total = ones if total is None else total + ones
    return total


def _ones(counter: ByteCounter, level: list[Any]) -> Any:
    """The ones of many words, lane by lane."""
    from tvm import tirx
    from tvm.script.ir_builder.tirx import bind

    def logic(a: Any, b: Any, c: Any, table: int) -> Any:
        table = tirx.const(table, "int32")
        return tirx.call_llvm_pure_intrin(f"uint32x{counter.lanes}", counter.ternary_logic, a, b, c, table)

    def full_adder(a: Any, b: Any, c: Any) -> tuple[Any, Any]:
        if counter.ternary_logic:
            return bind(logic(a, b, c, 0x96)), bind(logic(a, b, c, 0xE8))  # a ^ b ^ c, majority
        either = bind(a ^ b)
        return bind(either ^ c), bind((a & b) | (c & either))

    levels = []
    while level:
        carries: list[Any] = []
        while len(level) > 2:
            total, carry = full_adder(*level[:3])
            level, carries = [*level[3:], total], [*carries, carry]
        if len(level) == 2:
            a, b = level
            level, carries = [bind(a ^ b)], [*carries, bind(a & b)]
        levels.append(level[0])
        level = carries
    total = None
    for bits in reversed(levels):
        ones = tirx.popcount(tirx.reinterpret(f"uint8x{4 * counter.lanes}", bits))
        total = ones if total is None else total + total + ones
    return counter.sum_bytes(total)
