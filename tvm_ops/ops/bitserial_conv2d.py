"""Convolution of integer codes by xor and popcount, zeros around the image, channels innermost.

Weights are planes of signs, w = sum_j 2^j t_j with t_j = +-1 (`bitplanes.odd`), or ternary, one such plane behind a
mask. Activations are planes of bits, x = sum_i r_i c_i + shift (`bitplanes.odd`, `unsigned`), or ternary too. For a
bit c and a sign t with bit b, c t = b - (c ^ b), so over a window

    linear x     dot = border - r_0 S     border = sum_i r_i * (ones of all t_j, 2^j each) + shift * sum of w inside
    ternary x    dot = (2^l - 1) D - 2 S  D = how many activations are not 0; one popcount for both planes
    both ternary dot = -S                 S counts 2 where signs differ, less 1 where both are not 0

where S sums 2^(i+j) popcount((c_i ^ t_j) & masks). A padded word is 0: for a code without shift that is the value 0;
otherwise ``border`` gives back what it wrongly counts. All interior rows have the same taps, and all interior columns:
``border`` has one entry for them and one for every row and column beside (3 x 3 entries for a 3x3 kernel with padding
1). A dense layer is the 1x1 convolution of a 1x1 image.

Activations are [N, H, W, P, words] and weights [KH, KW, P, words, O], output channel innermost: a lane is a filter, an
activation word is broadcast, and nothing is summed across lanes. Ternary planes are the sign (1: +1) and the mask (1:
not 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_ops import output_transform
from tvm_ops.bitplanes import BINARY, TERNARY, WORD_BITS, Code, encode, pack
from tvm_ops.ops import bitpack
from tvm_ops.output_transform import Step

BLOCK = "popcounts"
"""The TIR block of the sum, by which schedules know it."""

SPREAD = "spread"
"""The TIR block that makes vectors of a sum's activations, where its weights are `octets`."""

_NEVER = -(1 << 30)  # less than any sum that float32 holds


@dataclass(frozen=True)
class Geometry:
    """A window over an image. Pairs are (height, width); pads are (top, left, bottom, right)."""

    image: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the output."""
        h, w = (
            (self.image[i] + self.pads[i] + self.pads[i + 2] - self.dilations[i] * (self.kernel[i] - 1) - 1)
            // self.strides[i]
            + 1
            for i in (0, 1)
        )
        return h, w

    def inside(self, axis: int) -> NDArray[np.bool_]:
        """Whether a tap lies in the image: bool [outputs, taps] along one axis."""
        first = np.arange(self.output[axis])[:, None] * self.strides[axis] - self.pads[axis]
        at = first + np.arange(self.kernel[axis]) * self.dilations[axis]
        return (at >= 0) & (at < self.image[axis])


@dataclass(frozen=True)
class Interior:
    """The outputs ``first`` to ``last`` of an axis, whose windows have the same taps inside the image."""

    first: int
    last: int

    def entry(self, index: Any) -> Any:
        """Where an output's constants stand: one entry for the interior, one for every output outside it."""
        from tvm import tirx

        return tirx.min(index, self.first) + tirx.max(index - self.last, 0)


def interior(inside: NDArray[np.bool_]) -> Interior:
    """The longest run of equal rows of [outputs, taps]."""
    starts = [0, *(np.flatnonzero((inside[1:] != inside[:-1]).any(1)) + 1).tolist(), len(inside)]
    first, after = max(pairwise(starts), key=lambda run: run[1] - run[0])
    return Interior(first, after - 1)


@dataclass(frozen=True)
class Planes:
    """The planes of signs or bits that meet, without the masks that follow them in memory.

    x, w: how many of activations and of weights. x_masked, w_masked: whether a mask follows.
    """

    x: int = 1
    w: int = 1
    x_masked: bool = False
    w_masked: bool = False

    @property
    def stored(self) -> tuple[int, int]:
        """Planes in memory."""
        return self.x + self.x_masked, self.w + self.w_masked

    @property
    def factors(self) -> list[int]:
        """Those of `terms`."""
        both = self.x_masked and self.w_masked
        return [*(1 << (i + j + both) for i in range(self.x) for j in range(self.w)), *([-1] if both else [])]

    @property
    def summable(self) -> bool:
        """Whether nothing but xor happens to words before they are counted, so that sums of words can be stored."""
        return not (self.x_masked or self.w_masked)

    @property
    def octet_sums(self) -> str:
        """The type of sums where weights are `octets`: of 16 bits, if all that is done to them is to compare."""
        return "int32" if self.x_masked and not self.w_masked else "int16"

    def terms(self, x: Callable[[int], Any], w: Callable[[int], Any]) -> list[tuple[int, Any]]:
        """What S sums for a word: [(factor, word whose ones count)]; x(i) and w(j) are the words of a plane."""
        masks = ([x(self.x)] if self.x_masked else []) + ([w(self.w)] if self.w_masked else [])
        both = self.x_masked and self.w_masked
        found = []
        for i in range(self.x):
            for j in range(self.w):
                word = x(i) ^ w(j)
                for mask in masks:
                    word = word & mask
                found.append((1 << (i + j + both), word))
        return [*found, (-1, masks[0] & masks[1])] if both else found

    def count(self, x: Callable[[int], Any], w: Callable[[int], Any], dtype: str = "int32") -> Any:
        """The same as a TIR expression."""
        from tvm import tirx

        total = None
        for factor, word in self.terms(x, w):
            ones = tirx.Cast(dtype, tirx.popcount(word))
            ones = ones if factor == 1 else ones * tirx.const(factor, dtype)
            total = ones if total is None else total + ones
        return total


@dataclass(frozen=True)
class Product:
    """A convolution of codes ``x`` with weights of codes ``w``.

    Raises:
        ValueError: weights that are neither planes of signs nor ternary.
    """

    geometry: Geometry
    x: Code = BINARY
    w: Code = BINARY

    def __post_init__(self) -> None:
        if self.w != TERNARY and self.w.shift != 1 - (1 << self.w.bits):
            raise ValueError(f"{self.w} is no code of weights: use bitplanes.odd or TERNARY")

    @property
    def planes(self) -> Planes:
        x_masked, w_masked = self.x == TERNARY, self.w == TERNARY
        return Planes(1 if x_masked else self.x.bits, 1 if w_masked else self.w.bits, x_masked, w_masked)

    @property
    def factor(self) -> int:
        """What S is multiplied by."""
        if self.x != TERNARY:
            return self.x.ratios[0]
        return 1 if self.w == TERNARY else 2

    @property
    def nonzeros(self) -> int:
        """What D is multiplied by; 0: it is not needed."""
        return (1 << self.w.bits) - 1 if self.x == TERNARY != self.w else 0

    def limit(self, weights: int) -> int:
        """The largest sum of ``weights`` products."""
        return weights * self.x.largest * self.w.largest


@dataclass(frozen=True, eq=False)
class Border:
    """The constant of the sum: values int64 [entries of rows, of columns, O]."""

    values: NDArray[np.int64]
    rows: Interior
    columns: Interior

    def at(self, table: Any, h: Any, w: Any, o: Any) -> Any:
        """The constant of one output in ``table``, a TE tensor of the shape of ``values``."""
        row, column = self.values.shape[:2]
        return table[self.rows.entry(h) if row > 1 else 0, self.columns.entry(w) if column > 1 else 0, o]


def pack_weight(values: NDArray[Any], code: Code = BINARY) -> NDArray[np.uint32]:
    """Codes [O, C, KH, KW] -> words uint32 [KH, KW, P, ceil(C / 32), O]."""
    planes = encode(values, code)
    if code == TERNARY:
        planes = np.stack([planes[0], planes[0] | planes[1]])
    return np.ascontiguousarray(pack(planes.transpose(3, 4, 0, 1, 2)).transpose(0, 1, 2, 4, 3))


def octets(words: NDArray[np.uint32], block: int, planes: Planes) -> NDArray[np.uint8]:
    """Words [KH, KW, P, W, O] as bytes, least significant first, a block of filters behind the other: [O / block, W,
    KH, KW, P, 4, block]. What one vector of filters needs is then one stream in the order of use.

    Every second byte is the sum of two (`with_sum`), and the filters of a block are reordered (`octet`).
    """
    kh, kw, count, depth, filters = words.shape
    words = with_sum(words) if planes.summable else words
    parts = np.stack([words >> shift & 255 for shift in (0, 8, 16, 24)], axis=4).astype(np.uint8)
    blocks = parts.reshape(kh, kw, count, depth, 4, filters // block, block).transpose(5, 3, 0, 1, 2, 4, 6)
    stored = np.empty_like(blocks, order="C")
    stored[..., octet(np.arange(block), block)] = blocks
    return stored


def octet(filter_: Any, block: int) -> Any:
    """Where a filter of a block lies in `octets`: the first eight, eight from half a block further, the next eight, ...

    Interleaving the halves of each 128 bits of two vectors then gives the filters in their order. An array or a TIR
    expression.
    """
    return filter_ % 8 + filter_ // 8 % (block // 16) * 16 + filter_ // (block // 2) * 8


def fits_octets(product: Product, weights: int) -> bool:
    """Whether the 16-bit sums of `octets` hold what ``weights`` products make."""
    return weights * sum(f for f in product.planes.factors if f > 0) < 1 << 15


def octet_thresholds(most: NDArray[np.int32], product: Product) -> NDArray[Any]:
    """Thresholds of `bit_threshold` as `compute_bits` takes them with `octets`: 16 bits, where sums alone meet them."""
    return most if product.nonzeros else most.clip(-(1 << 15), (1 << 15) - 1).astype(np.int16)


def with_sum(words: Any, constant: Callable[[int], Any] = int) -> Any:
    """Words whose second byte is the sum modulo 2 (xor) of the first two, and whose fourth is that of the last two; of
    an array or a TIR expression.

    constant: a number as what ``words`` are combined with, for TIR's vectors one of their own.

    The sum of two differences is the difference of such sums, so a full adder finds its sum with one operation, and
    the second difference is never needed (`adder_network`).
    """
    return words ^ ((words & constant(0x00FF00FF)) << constant(8))


def counted_octets(planes: Planes, x: Callable[[int, int], Any], w: Callable[[int, int], Any]) -> Any:
    """What S sums for a word in `octets`: x(plane, byte) and w(plane, byte) are the bytes."""

    def byte(of: Callable[[int, int], Any], number: int) -> Callable[[int], Any]:
        if number % 2 and planes.summable:
            return lambda plane: of(plane, number - 1) ^ of(plane, number)
        return lambda plane: of(plane, number)

    first, *rest = (planes.count(byte(x, number), byte(w, number), planes.octet_sums) for number in range(4))
    return sum(rest, first)


def shifted(values: NDArray[Any], product: Product) -> Border:
    """What the activations' shift contributes, shift * sum of w inside the image, of weights [O, C, KH, KW]."""
    geometry = product.geometry
    rows_inside, columns_inside = geometry.inside(0), geometry.inside(1)
    if product.x.shift == 0:  # zeros around the image are zeros of the code
        rows_inside, columns_inside = rows_inside[:1], columns_inside[:1]
    rows, columns = interior(rows_inside), interior(columns_inside)
    kept = [
        np.delete(inside, np.s_[run.first + 1 : run.last + 1], axis=0).astype(np.int64)
        for inside, run in ((rows_inside, rows), (columns_inside, columns))
    ]
    inside = kept[0][:, None, :, None] * kept[1][None, :, None, :]
    sums = product.x.shift * np.einsum("rcyx,oyx->rco", inside, values.sum(1, dtype=np.int64))
    return Border(sums, rows, columns)


def border(values: NDArray[Any], product: Product) -> Border:
    """The border constants of weights [O, C, KH, KW]."""
    if product.w == TERNARY:
        ones = (values > 0).sum((1, 2, 3), dtype=np.int64)
    else:  # sum_j 2^j b_j = (w + 2^l - 1) / 2
        ones = (values.sum((1, 2, 3), dtype=np.int64) - product.w.shift * values[0].size) // 2
    found = shifted(values, product)
    return replace(found, values=found.values + (0 if product.x == TERNARY else sum(product.x.ratios)) * ones)


def _padded(x: Any, pads: tuple[int, int, int, int]) -> Any:
    from tvm import tirx, topi

    if not any(pads):
        return x
    top, left, bottom, right = pads
    zero = tirx.const(0, "uint32")
    return topi.nn.pad(x, [0, top, left, 0, 0], [0, bottom, right, 0, 0], pad_value=zero, name="padded")


def _spread(x: Any, planes: Planes) -> Any:
    """The bytes of words, as `octets` has them, each in all four bytes of a word: uint32 [..., W] -> [..., 4 W]."""
    from tvm import te

    def four(*at: Any) -> Any:
        return octet_everywhere(x[(*at[:-1], at[-1] // 4)], at[-1] % 4, planes.summable)

    return te.compute((*x.shape[:-1], 4 * x.shape[-1]), four, name=SPREAD, attrs={"summable": int(planes.summable)})


def octet_everywhere(word: Any, byte: Any, summable: bool) -> Any:
    """A byte of a word in all four bytes, as a TIR expression."""
    from tvm import tirx

    parts = tirx.shift_right(with_sum(word) if summable else word, tirx.Cast("uint32", byte * 8))
    return (parts & tirx.const(0xFF, "uint32")) * tirx.const(0x01010101, "uint32")


def popcounts(x: Any, weight: Any, product: Product) -> Any:
    """S of every window, [N, OH, OW, O], of packed activations and weights: int32, or ``octet_sums`` of `octets`."""
    from tvm import te, tirx

    geometry, planes = product.geometry, product.planes
    x = _padded(x, geometry.pads)
    in_bytes = weight.dtype == "uint8"
    words, block, (kh, kw) = x.shape[-1], weight.shape[-1], geometry.kernel
    if in_bytes:
        x = _spread(x, planes)
    filters = int(weight.shape[0]) * int(block) if in_bytes else block
    ry, rx, rk = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx"), te.reduce_axis((0, words), "rk")
    (sy, sx), (dy, dx) = geometry.strides, geometry.dilations

    def differing(n: Any, h: Any, w: Any, o: Any) -> Any:
        pixel = (n, h * sy + ry * dy, w * sx + rx * dx)
        if in_bytes:
            ones = counted_octets(
                planes,
                lambda plane, byte: tirx.Cast("uint8", x[(*pixel, plane, 4 * rk + byte)]),
                lambda plane, byte: weight[o // block, rk, ry, rx, plane, byte, octet(o % block, block)],
            )
        else:
            ones = planes.count(lambda plane: x[(*pixel, plane, rk)], lambda plane: weight[ry, rx, plane, rk, o])
        return te.sum(ones, axis=[ry, rx, rk])

    attributes = {
        "dilations": list(geometry.dilations),
        "strides": list(geometry.strides),
        "planes": [planes.x, planes.w, int(planes.x_masked), int(planes.w_masked)],
    } | ({"octets": int(block)} if in_bytes else {})
    return te.compute((x.shape[0], *geometry.output, filters), differing, name=BLOCK, attrs=attributes)


def nonzeros(x: Any, product: Product) -> Any:
    """(2^l - 1) D, D being how many of the ternary activations under a window are not 0: int32 [N, OH, OW]."""
    from tvm import te, tirx

    geometry = product.geometry
    x = _padded(x, geometry.pads)
    (kh, kw), (sy, sx), (dy, dx) = geometry.kernel, geometry.strides, geometry.dilations
    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    rk = te.reduce_axis((0, x.shape[-1]), "rk")

    def ones(n: Any, h: Any, w: Any) -> Any:
        mask = x[n, h * sy + ry * dy, w * sx + rx * dx, 1, rk]
        return te.sum(tirx.Cast("int32", tirx.popcount(mask)) * product.nonzeros, axis=[ry, rx, rk])

    return te.compute((x.shape[0], *geometry.output), ones, name="nonzeros")


def float_constants(edge: Border, steps: Sequence[Step]) -> list[NDArray[Any]]:
    """What `compute_float` takes after the weights."""
    return [edge.values.astype(np.int32), *(step.value for step in steps)]


def compute_float(
    product: Product,
    edge: Border,
    steps: Sequence[Step],
    sums: Any,
    *rest: Any,
    finish: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """S of `popcounts`, or of another operator, through the steps and ``finish``: [N, OH, OW, O].

    rest: `nonzeros` where ``product.nonzeros``, then the constants of `float_constants`.
    """
    from tvm import te, tirx

    counts, (table, *values) = (rest[:1], rest[1:]) if product.nonzeros else ([], rest)

    def value(n: Any, h: Any, w: Any, o: Any) -> Any:
        dot = edge.at(table, h, w, o) - product.factor * tirx.Cast("int32", sums[n, h, w, o])
        for count in counts:
            dot = dot + count[n, h, w]
        return finish(output_transform.emit(steps, values, dot.astype("float32"), o))

    return te.compute(sums.shape, value, name="transformed")


def bit_threshold(
    values: NDArray[Any],
    product: Product,
    steps: Sequence[Step],
    edge_of: Callable[[NDArray[Any], Product], Border] = border,
) -> tuple[NDArray[np.int8], Border, NDArray[np.int32]]:
    """Which filters are stored negated (-1), and the border and the thresholds of `compute_bits` for those.

    bit = flip * dot >= at. A negated filter negates its dot, and dot >= at is S <= (border - at) / factor, or
    factor S <= border - at + nonzeros D. Thresholds go on to whole words of filters, with some whose bit is never 1.
    """
    filters = len(values)
    threshold = output_transform.integer_threshold(steps, filters, product.limit(values[0].size))
    edge = edge_of(values * threshold.flip.reshape(-1, 1, 1, 1), product)
    most = edge.values - threshold.at
    most = most if product.nonzeros else most // product.factor
    most = np.pad(most, [(0, 0), (0, 0), (0, -filters % WORD_BITS)], constant_values=_NEVER)
    return threshold.flip, edge, most.astype(np.int32)


def compute_bits(product: Product, edge: Border, sums: Any, *rest: Any) -> Any:
    """The next layer's bits, uint32 [N, OH, OW, 1, O / 32].

    sums: S of weights with the flips of `bit_threshold`, filled up to whole words. rest: `nonzeros` where
    ``product.nonzeros``, then the thresholds; `octet_thresholds` where the weights are `octets`.
    """
    from tvm import te

    *counts, most = rest
    n, oh, ow, filters = sums.shape

    def word(n: Any, h: Any, w: Any, _: Any, k: Any) -> Any:
        def bits(first: int, count: int) -> Any:
            lanes = bitpack.ramp(k * WORD_BITS + first, count)
            total, limit = sums[n, h, w, lanes], edge.at(most, h, w, lanes)
            if not counts:
                return total <= limit
            total, limit = (bitpack.as_vector(v, "int32", count) for v in (total, limit))
            return total + total <= limit + counts[0][n, h, w]

        return bitpack.pack(bits, k, int(filters))

    return te.compute((n, oh, ow, 1, filters // WORD_BITS), word, name=bitpack.BLOCK)
