"""Convolution of +-1 codes by xor and popcount, zeros around the image, channels innermost.

    dot = sum over the taps inside the image of (C - 2 popcount(x ^ w))
        = border - 2 popcounts,    border = C * taps inside + 2 * sum over the taps outside of popcount(w)

A padded word is 0, so a tap outside counts popcount(w), which ``border`` gives back. All interior rows have the same
taps, and all interior columns: ``border`` has one entry for them and one for every row and column beside (3 x 3
entries for a 3x3 kernel with padding 1). A dense layer is the 1x1 convolution of a 1x1 image.

Weights are [KH, KW, words, O], output channel innermost: a lane is a filter, an activation word is broadcast, and
nothing is summed across lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_ops import output_transform
from tvm_ops.bitplanes import WORD_BITS, pack
from tvm_ops.ops import bitpack
from tvm_ops.output_transform import Step

BLOCK = "popcounts"
"""The TIR block of the sum, by which schedules know it."""


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


def pack_weight(signs: NDArray[Any]) -> NDArray[np.uint32]:
    """Signs [O, C, KH, KW] -> words uint32 [KH, KW, ceil(C / 32), O]."""
    return np.ascontiguousarray(pack(signs.transpose(2, 3, 0, 1)).transpose(0, 1, 3, 2))


def border(signs: NDArray[Any], geometry: Geometry) -> Border:
    """The border constants of weights [O, C, KH, KW]."""
    rows_inside, columns_inside = geometry.inside(0), geometry.inside(1)
    rows, columns = interior(rows_inside), interior(columns_inside)
    kept = [
        np.delete(inside, np.s_[run.first + 1 : run.last + 1], axis=0).astype(np.int64)
        for inside, run in ((rows_inside, rows), (columns_inside, columns))
    ]
    inside = kept[0][:, None, :, None] * kept[1][None, :, None, :]
    ones = (signs > 0).sum(1, dtype=np.int64)
    outside = np.einsum("rcyx,oyx->rco", 1 - inside, ones)
    return Border(signs.shape[1] * inside.sum((2, 3))[:, :, None] + 2 * outside, rows, columns)


def popcounts(x: Any, weight: Any, geometry: Geometry) -> Any:
    """Differing bits under every window.

    x: uint32 [N, H, W, words]. weight: uint32 [KH, KW, words, O]. -> int32 [N, OH, OW, O].
    """
    from tvm import te, tirx, topi

    top, left, bottom, right = geometry.pads
    if any(geometry.pads):
        zero = tirx.const(0, "uint32")
        x = topi.nn.pad(x, [0, top, left, 0], [0, bottom, right, 0], pad_value=zero, name="padded")
    kh, kw, words, filters = weight.shape
    ry, rx, rk = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx"), te.reduce_axis((0, words), "rk")
    (sy, sx), (dy, dx) = geometry.strides, geometry.dilations

    def differing(n: Any, h: Any, w: Any, o: Any) -> Any:
        word = x[n, h * sy + ry * dy, w * sx + rx * dx, rk] ^ weight[ry, rx, rk, o]
        return te.sum(tirx.popcount(word).astype("int32"), axis=[ry, rx, rk])

    attributes = {"dilations": list(geometry.dilations)}
    return te.compute((x.shape[0], *geometry.output, filters), differing, name=BLOCK, attrs=attributes)


def float_constants(edge: Border, steps: Sequence[Step]) -> list[NDArray[Any]]:
    """What `compute_float` takes after the weights."""
    return [edge.values.astype(np.int32), *(step.value for step in steps)]


def compute_float(geometry: Geometry, edge: Border, steps: Sequence[Step], x: Any, weight: Any, *constants: Any) -> Any:
    """The sums through the steps: float32 [N, OH, OW, O]; ``constants`` are those of `float_constants`."""
    from tvm import te

    sums = popcounts(x, weight, geometry)
    table, *values = constants

    def value(n: Any, h: Any, w: Any, o: Any) -> Any:
        dot = edge.at(table, h, w, o) - 2 * sums[n, h, w, o]
        return output_transform.emit(steps, values, dot.astype("float32"), o)

    return te.compute(sums.shape, value, name="transformed")


def bit_weight(
    signs: NDArray[Any], geometry: Geometry, steps: Sequence[Step]
) -> tuple[NDArray[np.uint32], Border, NDArray[np.int32]]:
    """Weights, border and thresholds of `compute_bits`.

    bit = flip * dot >= at. A flipped filter is stored complemented, which negates its dot, and dot >= at is
    popcounts <= (border - at) / 2. Filters are filled up to whole words with some whose bit is never 1.
    """
    filters = len(signs)
    threshold = output_transform.integer_threshold(steps, filters, signs[0].size)
    signs = signs * threshold.flip.reshape(-1, 1, 1, 1)
    edge = border(signs, geometry)
    most = (edge.values - threshold.at) // 2
    missing = -filters % WORD_BITS
    most = np.pad(most, [(0, 0), (0, 0), (0, missing)], constant_values=-1)
    weight = np.pad(pack_weight(signs), [(0, 0), (0, 0), (0, 0), (0, missing)])
    return weight, edge, most.astype(np.int32)


def compute_bits(geometry: Geometry, edge: Border, x: Any, weight: Any, most: Any) -> Any:
    """The next layer's bits, uint32 [N, OH, OW, O / 32]; ``weight`` and ``most`` are those of `bit_weight`."""
    from tvm import te

    sums = popcounts(x, weight, geometry)
    n, oh, ow, filters = sums.shape

    def word(n: Any, h: Any, w: Any, k: Any) -> Any:
        def bits(first: int, count: int) -> Any:
            lanes = bitpack.ramp(k * WORD_BITS + first, count)
            return sums[n, h, w, lanes] <= edge.at(most, h, w, lanes)

        return bitpack.pack(bits, k, int(filters))

    return te.compute((n, oh, ow, filters // WORD_BITS), word, name=bitpack.BLOCK)
