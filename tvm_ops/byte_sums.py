"""Counting bits where the vector popcount counts bytes (NEON): xor, count, and add pairs of bytes to 16-bit sums.

That is three instructions for 128 bits, where 32-bit sums take four or five. The sums of a tile, some pixels x some
vectors of filters, stay in registers over all words of a window, which is at most what their lanes can hold: a word of
activations is loaded once for all filters, a vector of filters once for all pixels. It is a tensor intrinsic:
`describe` is what the plain operator does to a tile, `implement` is how.

A word of activations goes to every lane. Cores pay for that (a vector operation beside the load, and no address
offset), so `spread` stores each word four times before, in a copy with a stride of four, and the tile loads vectors.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

from targets import BytePopcount
from tvm_ops.adder_network import Window

LANES = 4


@dataclass(frozen=True)
class Tile:
    """What is counted at once: a window under ``columns`` pixels, ``stride`` apart, for ``vectors`` x 4 filters."""

    window: Window
    columns: int
    stride: int
    vectors: int

    @property
    def name(self) -> str:
        return f"{self.window.name}_{self.columns}_{self.stride}_{self.vectors}"


def register_those_in(text: str, popcount: BytePopcount) -> None:
    """Register the intrinsics of ``popcount`` that tuning records name, before TVM reads the records."""
    spread()
    pattern = rf"{Window.PATTERN}_(\d+)_(\d+)_(\d+)_{popcount.name}\b"
    for *window, columns, stride, vectors in set(re.findall(pattern, text)):
        intrinsic(popcount, Tile(Window.named(*window), int(columns), int(stride), int(vectors)))


def intrinsic(popcount: BytePopcount, tile: Tile) -> str:
    """Register the intrinsic of a tile, and return its name."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import tirx as T

    name = f"{tile.name}_{popcount.name}"
    if TensorIntrin.get(name, allow_missing=True) is not None:
        return name
    window, columns, lanes = tile.window, tile.columns, LANES * tile.vectors
    kh, kw, words = window.height, window.width, window.words
    dy, dx = window.dilations
    height, width = (kh - 1) * dy + 1, (columns - 1) * tile.stride + (kw - 1) * dx + 1
    px, pw = window.planes.stored
    bits = popcount.lane_bits

    @T.prim_func(s_tir=True)
    def describe(x: T.handle, w: T.handle, sums: T.handle) -> None:
        pixels = T.match_buffer(x, (height, width, px, words, 1), "uint32", offset_factor=1)
        filters = T.match_buffer(w, (kh, kw, pw, words, lanes), "uint32", offset_factor=1)
        out = T.match_buffer(sums, (columns, lanes), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(
                out[0:columns, 0:lanes],
                pixels[0:height, 0:width, 0:px, 0:words, 0:1],
                filters[0:kh, 0:kw, 0:pw, 0:words, 0:lanes],
            )
            T.writes(out[0:columns, 0:lanes])
            for c, i, j, k, o in T.grid(columns, kh, kw, words, lanes):
                with T.sblock("update"):
                    _update(tile, pixels, filters, out, (c, i, j, k, o))

    @T.prim_func(s_tir=True)
    def implement(x: T.handle, w: T.handle, sums: T.handle) -> None:
        xy = T.int32()
        xx = T.int32()
        xp = T.int32()
        xk = T.int32()
        wy = T.int32()
        wx = T.int32()
        wp = T.int32()
        wk = T.int32()
        so = T.int32()
        pixels = T.match_buffer(
            x, (height, width, px, words, 1), "uint32", offset_factor=1, strides=[xy, xx, xp, xk, 1]
        )
        filters = T.match_buffer(w, (kh, kw, pw, words, lanes), "uint32", offset_factor=1, strides=[wy, wx, wp, wk, 1])
        out = T.match_buffer(sums, (columns, lanes), "int32", offset_factor=1, strides=[so, 1])
        with T.sblock("root"):
            T.reads(
                out[0:columns, 0:lanes],
                pixels[0:height, 0:width, 0:px, 0:words, 0:1],
                filters[0:kh, 0:kw, 0:pw, 0:words, 0:lanes],
            )
            T.writes(out[0:columns, 0:lanes])
            count = T.alloc_buffer((columns, lanes * 32 // bits), f"uint{bits}", scope="local")
            _count(popcount, tile, pixels, filters, out, count)

    TensorIntrin.register(name, describe, implement)
    return name


def spread() -> str:
    """Register the intrinsic that stores a word in every lane of a vector, and return its name."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import tirx as T

    name = f"spread_{LANES}"
    if TensorIntrin.get(name, allow_missing=True) is not None:
        return name

    @T.prim_func(s_tir=True)
    def describe(x: T.handle, y: T.handle) -> None:
        source = T.match_buffer(x, (1,), "uint32", offset_factor=1)
        copy = T.match_buffer(y, (1, 1), "uint32", offset_factor=1)
        with T.sblock("root"):
            T.reads(source[0])
            T.writes(copy[0, 0])
            for _ in T.serial(1):
                with T.sblock("update"):
                    copy[0, 0] = source[0]

    @T.prim_func(s_tir=True)
    def implement(x: T.handle, y: T.handle) -> None:
        stride = T.int32()
        source = T.match_buffer(x, (1,), "uint32", offset_factor=1)
        copy = T.match_buffer(y, (1, 1), "uint32", offset_factor=1, strides=[stride, 1])
        with T.sblock("root"):
            T.reads(source[0])
            T.writes(copy[0, 0])
            copy.vstore([0, 0], T.broadcast(source[0], LANES))

    TensorIntrin.register(name, describe, implement)
    return name


def _update(tile: Tile, x: Any, w: Any, sums: Any, loops: tuple[Any, ...]) -> None:
    """The plain operator's inner statement, without the axes of extent 1 that TVM drops."""
    from tvm.script.ir_builder.tirx import axis, buffer_store

    window, (column, *reduced, lane) = tile.window, loops
    c = axis.spatial(tile.columns, column) if tile.columns > 1 else 0
    o = axis.spatial(LANES * tile.vectors, lane)
    extents = (window.height, window.width, window.words)
    i, j, k = (axis.reduce(extent, loop) if extent > 1 else 0 for extent, loop in zip(extents, reduced, strict=True))
    dy, dx = window.dilations
    at = c * tile.stride + j * dx
    ones = window.planes.count(lambda plane: x[i * dy, at, plane, k, 0], lambda plane: w[i, j, plane, k, o])
    buffer_store(sums, sums[c, o] + ones, [c, o])


def _fence(value: Any) -> Any:
    """A use of ``value`` that is no instruction, and that LLVM's scheduler moves nothing across.

    In long straight code it would start so much at once that registers spill: 56x56x64 took 2.28 cycles a step instead
    of 1.73 in the Cortex-A76's model (November 2026).
    """
    from tvm import tirx

    return tirx.call_llvm_intrin("int32", "llvm.fake.use", value)


def _count(popcount: BytePopcount, tile: Tile, x: Any, w: Any, sums: Any, count: Any) -> None:
    """Add what the planes' terms count under the tile to ``sums``; ``count`` is the memory of the accumulators."""
    from tvm import tirx
    from tvm.script.ir_builder.tirx import bind, buffer_store, evaluate, serial

    window = tile.window
    dy, dx = window.dilations
    word, octet = f"uint32x{LANES}", f"uint8x{4 * LANES}"
    lanes = 128 // popcount.lane_bits
    each = [(c, v) for c in range(tile.columns) for v in range(tile.vectors)]
    accumulators = {(c, v): [c, tirx.Ramp(lanes * v, 1, lanes)] for c, v in each}
    words = itertools.count(1)

    def step(term: int, i: Any, j: Any, k: Any) -> None:
        """One word of every pixel and filter."""
        loaded: dict[tuple[str, int, int], Any] = {}

        def pixel(plane: int, c: int) -> Any:
            if ("x", plane, c) not in loaded:
                loaded["x", plane, c] = bind(x.vload([i * dy, c * tile.stride + j * dx, plane, k, 0], word))
            return loaded["x", plane, c]

        def vector(plane: int, v: int) -> Any:
            if ("w", plane, v) not in loaded:
                loaded["w", plane, v] = bind(w.vload([i, j, plane, k, LANES * v], word))
            return loaded["w", plane, v]

        for c, v in each:
            terms = window.planes.terms(lambda plane, c=c: pixel(plane, c), lambda plane, v=v: vector(plane, v))  # type: ignore[misc]
            ones = tirx.popcount(tirx.reinterpret(octet, terms[term][1]))
            at = accumulators[c, v]
            buffer_store(count, popcount.accumulate(count[*at], ones), at)
        if popcount.fenced and next(words) % popcount.fenced == 0:
            evaluate(_fence(count[*accumulators[0, 0]]))

    def loop(term: int, extents: list[int], at: list[Any]) -> None:
        """All words of the window: loops outside, straight code for the innermost words."""
        if len(at) == 3:
            return step(term, *at)
        extent, inside = extents[len(at)], math.prod(extents[len(at) + 1 :])
        straight = max(
            n for n in range(1, extent + 1) if extent % n == 0 and (n == 1 or n * inside <= popcount.straight)
        )
        if straight == extent:
            for n in range(extent):
                loop(term, extents, [*at, n])
        else:
            with serial(extent // straight) as first:
                for n in range(straight):
                    loop(term, extents, [*at, first * straight + n])

    for term, factor in enumerate(window.planes.factors):
        for at in accumulators.values():
            buffer_store(count, tirx.Broadcast(tirx.const(0, f"uint{popcount.lane_bits}"), lanes), at)
        loop(term, [window.height, window.width, window.words], [])
        for (c, v), at in accumulators.items():
            ones = popcount.total(count[*at])
            ones = ones if factor == 1 else ones * tirx.Broadcast(tirx.const(factor, "int32"), LANES)
            place = [c, tirx.Ramp(LANES * v, 1, LANES)]
            buffer_store(sums, sums[*place] + ones, place)
