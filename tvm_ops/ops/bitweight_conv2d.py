"""Convolution of real activations with weights of a few bits, which stay packed in the library and in memory.

    w = shift + sum_p worth_p * bit_p

Words hold the bits of 32 neighbouring filters: [ceil(O / 32), KH, KW, P, C]. A vector of filters tests its bits of a
word and selects the weights. For few pixels that happens in registers, so a dense layer (the 1x1 convolution of a 1x1
image) reads 1 bit a weight where a float one reads 32; for many, once for 32 filters, into a buffer in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_ops import output_transform
from tvm_ops.bitplanes import TERNARY, WORD_BITS, Code, encode, odd, pack
from tvm_ops.ops.bitserial_conv2d import Geometry
from tvm_ops.output_transform import Step

BLOCK = "bit_weighted"
"""The TIR block of the sum, by which schedules know that its channels come in whole words."""

UNPACKED = "unpacked"
"""The TIR block of the weights as floats, never a whole tensor: schedules make it in registers, or a tile in cache."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights [O, C, KH, KW] as planes bool [P, O, C, KH, KW], what the bit of each is worth, and the shift."""

    planes: NDArray[np.bool_]
    worth: tuple[float, ...]
    shift: float

    @property
    def filters(self) -> int:
        """O."""
        return self.planes.shape[1]

    def words(self) -> NDArray[np.uint32]:
        """[ceil(O / 32), KH, KW, P, C]."""
        return np.ascontiguousarray(pack(self.planes.transpose(3, 4, 0, 2, 1)).transpose(4, 0, 1, 2, 3))

    def unpacked(self, word: Callable[[int], Any], lane: Any) -> Any:
        """One weight as a float32 expression: its bit of plane p is bit ``lane`` of ``word(p)``."""
        from tvm import tirx

        def chosen(plane: int, one: float, zero: float) -> Any:
            bit = (word(plane) >> tirx.Cast("uint32", lane)) & tirx.const(1, "uint32")
            low, high = tirx.const(zero, "float32"), tirx.const(one, "float32")
            return tirx.Select(bit != tirx.const(0, "uint32"), high, low)

        total = chosen(0, self.shift + self.worth[0], self.shift)
        for plane, worth in enumerate(self.worth[1:], 1):
            total = total + chosen(plane, worth, 0.0)
        return total


def few_bits(array: NDArray[np.float32]) -> Weights | None:
    """Float weights as planes, if they are those of some method; else None.

    Signs, ternary and odd integers (`bitplanes.odd`, scaled later), or -n, 0 and +p of a layer (TTQ).
    """
    code = integer_code(array)
    if code is not None:
        return Weights(encode(array, code), tuple(map(float, code.ratios)), float(code.shift))
    below, above = array < 0, array > 0
    for side in (below, above):
        values = array[side]
        if values.size and (values != values[0]).any():
            return None
    worth = tuple(float(array[side][0]) if side.any() else 0.0 for side in (above, below))
    return Weights(np.stack([above, below]), worth, 0.0)


def integer_code(array: NDArray[np.float32]) -> Code | None:
    """The code of weights that are integers of one; else None."""
    largest = int(np.abs(array).max(initial=0)) if np.isfinite(array).all() else 256
    if largest > 255 or (array != np.rint(array)).any():
        return None
    if (array % 2 == 1).all():
        return odd(largest.bit_length())
    return TERNARY if largest <= 1 else None


def compute(
    geometry: Geometry,
    weights: Weights,
    steps: Sequence[Step],
    x: Any,
    words: Any,
    *constants: Any,
    finish: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """x: float32 [N, H, W, C]. words: `Weights.words`. constants: of the steps, filled up to whole words.

    -> [N, OH, OW, ceil(O / 32) * 32], the sums through the steps and ``finish``.
    """
    from tvm import te, tirx, topi

    top, left, bottom, right = geometry.pads
    if any(geometry.pads):
        x = topi.nn.pad(x, [0, top, left, 0], [0, bottom, right, 0], pad_value=0.0, name="padded")
    (kh, kw), (sy, sx), (dy, dx) = geometry.kernel, geometry.strides, geometry.dilations
    ry, rx, rc = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx"), te.reduce_axis((0, x.shape[3]), "rc")

    def unpacked(word: Any, row: Any, column: Any, c: Any, lane: Any) -> Any:
        return weights.unpacked(lambda plane: words[word, row, column, plane, c], lane)

    floats = te.compute((words.shape[0], kh, kw, x.shape[3], WORD_BITS), unpacked, name=UNPACKED)

    def product(n: Any, h: Any, w: Any, o: Any) -> Any:
        weight = floats[tirx.floordiv(o, WORD_BITS), ry, rx, rc, tirx.floormod(o, WORD_BITS)]
        return te.sum(x[n, h * sy + ry * dy, w * sx + rx * dx, rc] * weight, axis=[ry, rx, rc])

    sums = te.compute((x.shape[0], *geometry.output, words.shape[0] * WORD_BITS), product, name=BLOCK)

    def value(n: Any, h: Any, w: Any, o: Any) -> Any:
        return finish(output_transform.emit(steps, constants, sums[n, h, w, o], o))

    return te.compute(sums.shape, value, name="transformed")
