"""Products of bytes under a register tile (x86): a group of activations to all lanes, times a vector of weights.

The sums of a tile, some pixels x some vectors of filters, stay in registers: a group of activations is loaded once for
all filters, a vector of weights once for all pixels. It is a tensor intrinsic: `describe` is what the plain operator
does to a tile, `implement` is how.

    quads   sums += x w         32 bits, one instruction for four products a lane
    pairs   part += x w         16 bits, two instructions; then the parts of all groups to 32 bits
    words   sums += x w         32 bits, two instructions for two products
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from targets import ByteProduct
from tvm_ops.ops.byte_conv2d import Form

_STRAIGHT = 8  # groups of a row in straight code: loads and loops then cost little, and the code is a few KB


@dataclass(frozen=True)
class Tile:
    """What is multiplied at once: ``groups`` of each of some rows of the kernel, ``dilation`` rows apart, under
    ``columns`` pixels, ``step`` bytes or words apart, for so many filters."""

    form: Form
    filters: int
    columns: int
    step: int
    rows: int
    dilation: int
    groups: int

    @property
    def name(self) -> str:
        numbers = (self.filters, self.columns, self.step, self.rows, self.dilation, self.groups)
        return "_".join(map(str, (self.form.kind, *numbers)))


def register_those_in(text: str, product: ByteProduct) -> None:
    """Register the intrinsics of ``product`` that tuning records name, before TVM reads the records."""
    number = r"_(\d+)"
    for kind, *numbers in set(re.findall(rf"(quads|pairs|words){number * 6}_{product.name}\b", text)):
        intrinsic(product, Tile(Form(kind, product.lanes), *map(int, numbers)))


def intrinsic(product: ByteProduct, tile: Tile) -> str:
    """Register the intrinsic of a tile, and return its name."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import tirx as T

    name = f"{tile.name}_{product.name}"
    if TensorIntrin.get(name, allow_missing=True) is not None:
        return name
    form, columns, rows, groups = tile.form, tile.columns, tile.rows, tile.groups
    filters, group, (x_type, w_type) = tile.filters, form.group, form.types
    height, width = (rows - 1) * tile.dilation + 1, (columns - 1) * tile.step + groups * group

    @T.prim_func(s_tir=True)
    def describe(x: T.handle, w: T.handle, sums: T.handle) -> None:
        pixels = T.match_buffer(x, (height, width), x_type, offset_factor=1)
        weights = T.match_buffer(w, (rows, groups, filters * group), w_type, offset_factor=1)
        out = T.match_buffer(sums, (columns, filters), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(
                out[0:columns, 0:filters],
                pixels[0:height, 0:width],
                weights[0:rows, 0:groups, 0 : filters * group],
            )
            T.writes(out[0:columns, 0:filters])
            for c, r, g, o, i in T.grid(columns, rows, groups, filters, group):
                with T.sblock("update"):
                    _update(tile, pixels, weights, out, (c, r, g, o, i))

    @T.prim_func(s_tir=True)
    def implement(x: T.handle, w: T.handle, sums: T.handle) -> None:
        xy = T.int32()
        wy = T.int32()
        wg = T.int32()
        so = T.int32()
        pixels = T.match_buffer(x, (height, width), x_type, offset_factor=1, strides=[xy, 1])
        weights = T.match_buffer(w, (rows, groups, filters * group), w_type, offset_factor=1, strides=[wy, wg, 1])
        out = T.match_buffer(sums, (columns, filters), "int32", offset_factor=1, strides=[so, 1])
        with T.sblock("root"):
            T.reads(
                out[0:columns, 0:filters],
                pixels[0:height, 0:width],
                weights[0:rows, 0:groups, 0 : filters * group],
            )
            T.writes(out[0:columns, 0:filters])
            parts = T.alloc_buffer((columns, 2 * filters), "int16", scope="local")
            _multiply(product, tile, pixels, weights, out, parts)

    TensorIntrin.register(name, describe, implement)
    return name


def _update(tile: Tile, x: Any, w: Any, sums: Any, loops: tuple[Any, ...]) -> None:
    """The plain operator's inner statement, without the axes of extent 1 that TVM drops."""
    from tvm import tirx
    from tvm.script.ir_builder.tirx import axis, buffer_store

    column, row, reduced, lane, neighbour = loops
    filters, group = tile.filters, tile.form.group
    c = axis.spatial(tile.columns, column) if tile.columns > 1 else 0
    o = axis.spatial(filters, lane)
    r = axis.reduce(tile.rows, row) if tile.rows > 1 else 0
    g = axis.reduce(tile.groups, reduced) if tile.groups > 1 else 0
    i = axis.reduce(group, neighbour)
    pattern, weight = x[r * tile.dilation, c * tile.step + g * group + i], w[r, g, o * group + i]
    buffer_store(sums, sums[c, o] + tirx.Cast("int32", pattern) * tirx.Cast("int32", weight), [c, o])


def _multiply(product: ByteProduct, tile: Tile, x: Any, w: Any, sums: Any, parts: Any) -> None:
    """Add the products under the tile to ``sums``; ``parts`` is the memory of 16-bit sums."""
    from tvm import tirx
    from tvm.script.ir_builder.tirx import bind, buffer_store, serial

    form, lanes = tile.form, product.lanes
    x_type, group = form.types[0], form.group
    columns, vectors = range(tile.columns), range(tile.filters // lanes)
    whole = {(c, v): [c, tirx.Ramp(v * lanes, 1, lanes)] for c in columns for v in vectors}
    halves = {(c, v): [c, tirx.Ramp(2 * v * lanes, 1, 2 * lanes)] for c in columns for v in vectors}
    total, part = f"int32x{lanes}", f"int16x{2 * lanes}"
    x_vector, w_vector = (f"{of}x{lanes * group}" for of in form.types)

    def call(dtype: str, name: str, *operands: Any) -> Any:
        return tirx.call_llvm_pure_intrin(dtype, name, *operands)

    def add(buffer: Any, place: list[Any], value: Any) -> None:
        buffer_store(buffer, buffer[*place] + value, place)

    def step(r: Any, g: Any) -> None:
        """One group of every pixel and filter."""
        weights = [bind(w.vload([r, g, v * lanes * group], w_vector)) for v in vectors]
        for c in columns:
            found = x.vload([r * tile.dilation, c * tile.step + g * group], f"{x_type}x{group}")
            spread = bind(tirx.reinterpret(x_vector, tirx.Broadcast(tirx.reinterpret("int32", found), lanes)))
            for v, weight in enumerate(weights):
                if form.kind == "quads":
                    at = whole[c, v]
                    buffer_store(sums, call(total, product.quads, sums[*at], spread, weight), at)
                elif form.kind == "pairs":
                    add(parts, halves[c, v], call(part, product.pairs, spread, weight))
                else:
                    add(sums, whole[c, v], call(total, product.words, spread, weight))

    if form.kind == "pairs":
        for place in halves.values():
            buffer_store(parts, tirx.Broadcast(tirx.const(0, "int16"), 2 * lanes), place)
    straight = max(n for n in range(1, _STRAIGHT + 1) if tile.groups % n == 0)
    with serial(tile.rows) as r, serial(tile.groups // straight) as first:
        for n in range(straight):
            step(r, first * straight + n)
    if form.kind == "pairs":
        ones = tirx.Broadcast(tirx.const(1, "int16"), 2 * lanes)
        for at, place in halves.items():
            add(sums, whole[at], call(total, product.words, parts[*place], ones))
