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

MOST_WORDS = 255 // 8


@dataclass(frozen=True)
class Window:
    """The words of one pixel that are summed at once: taps of the kernel x words of channels, and the dilation."""

    height: int
    width: int
    words: int
    dilations: tuple[int, int]

    @property
    def name(self) -> str:
        return f"popcounts_{self.height}x{self.width}x{self.words}_{self.dilations[0]}_{self.dilations[1]}"


def window(kernel: tuple[int, int], words: int, dilations: tuple[int, int]) -> Window | None:
    """The largest window of whole kernel rows that bytes can count; None for a row of more than 31 taps."""
    height, width = kernel if kernel[0] * kernel[1] <= MOST_WORDS else (1, kernel[1])
    if width > MOST_WORDS:
        return None
    deep = max(d for d in range(1, words + 1) if words % d == 0 and (d == 1 or d * height * width <= MOST_WORDS))
    return Window(height, width, deep, dilations)


def register_those_in(text: str, counter: ByteCounter) -> None:
    """Register the intrinsics of ``counter`` that tuning records name, before TVM reads the records."""
    for kh, kw, words, dy, dx in set(re.findall(rf"popcounts_(\d+)x(\d+)x(\d+)_(\d+)_(\d+)_{counter.name}\b", text)):
        intrinsic(counter, Window(int(kh), int(kw), int(words), (int(dy), int(dx))))


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
    vector = f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def describe(x: T.handle, w: T.handle, sums: T.handle) -> None:
        pixel = T.match_buffer(x, (height, width, words), "uint32", offset_factor=1)
        filters = T.match_buffer(w, (kh, kw, words, lanes), "uint32", offset_factor=1)
        out = T.match_buffer(sums, (lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(out[0:lanes], pixel[0:height, 0:width, 0:words], filters[0:kh, 0:kw, 0:words, 0:lanes])
            T.writes(out[0:lanes])
            for i, j, k, o in T.grid(kh, kw, words, lanes):
                with T.sblock("update"):
                    _update(window, lanes, pixel, filters, out, (i, j, k, o))

    @T.prim_func(s_tir=True)
    def implement(x: T.handle, w: T.handle, sums: T.handle) -> None:
        sxy = T.int32()
        sx = T.int32()
        swy = T.int32()
        swx = T.int32()
        swk = T.int32()
        pixel = T.match_buffer(x, (height, width, words), "uint32", offset_factor=1, strides=[sxy, sx, 1])
        filters = T.match_buffer(w, (kh, kw, words, lanes), "uint32", offset_factor=1, strides=[swy, swx, swk, 1])
        out = T.match_buffer(sums, (lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(out[0:lanes], pixel[0:height, 0:width, 0:words], filters[0:kh, 0:kw, 0:words, 0:lanes])
            T.writes(out[0:lanes])
            out.vstore([0], out.vload([0], vector) + _count(counter, window, pixel, filters))

    TensorIntrin.register(name, describe, implement)
    return name


def _update(window: Window, lanes: int, x: Any, w: Any, sums: Any, loops: tuple[Any, Any, Any, Any]) -> None:
    """The plain operator's inner statement. TVM drops a reduction axis of extent 1, so it must not be there either."""
    from tvm import tirx
    from tvm.script.ir_builder.tirx import axis, buffer_store

    *reduced, lane = loops
    o = axis.spatial(lanes, lane)
    extents = (window.height, window.width, window.words)
    i, j, k = (axis.reduce(extent, loop) if extent > 1 else 0 for extent, loop in zip(extents, reduced, strict=True))
    word = x[i * window.dilations[0], j * window.dilations[1], k] ^ w[i, j, k, o]
    buffer_store(sums, sums[o] + tirx.Cast("int32", tirx.popcount(word)), [o])


def _count(counter: ByteCounter, window: Window, x: Any, w: Any) -> Any:
    """The popcounts of a window's words as an expression of ``lanes`` int32."""
    from tvm import tirx
    from tvm.script.ir_builder.tirx import bind

    word = f"uint32x{counter.lanes}"

    def logic(a: Any, b: Any, c: Any, table: int) -> Any:
        return tirx.call_llvm_pure_intrin(word, counter.ternary_logic, a, b, c, tirx.const(table, "int32"))

    def full_adder(a: Any, b: Any, c: Any) -> tuple[Any, Any]:
        if counter.ternary_logic:
            return bind(logic(a, b, c, 0x96)), bind(logic(a, b, c, 0xE8))  # a ^ b ^ c, majority
        either = bind(a ^ b)
        return bind(either ^ c), bind((a & b) | (c & either))

    dy, dx = window.dilations
    level = [
        bind(tirx.Broadcast(x[i * dy, j * dx, k], counter.lanes) ^ w.vload([i, j, k, 0], word))
        for k in range(window.words)
        for i in range(window.height)
        for j in range(window.width)
    ]
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
