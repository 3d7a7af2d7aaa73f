"""Convolution of integer codes of many bits by products of bytes, zeros around the image, channels innermost.

Where both codes have one bit, a xor does the work of 32 products; an 8-bit image with 1-bit weights takes 8 planes, and
its 3 channels fill a tenth of a word. Here activations are the patterns p of their code (`quantize`), x = r p + shift:

    dot = border - r S     border = shift * sum of w inside     S = sum of p * -w

A padded p is 0, and ``border`` gives back its shift, as in `bitserial_conv2d`, whose thresholds and transforms serve
here too: weights are stored negated because those subtract their sum.

A row of a kernel is one run of bytes in an image whose channels lie innermost: KW C of them, filled up to whole groups
by weights of 0. A group goes to all lanes of a vector (4 bytes, or 2 words of 16 bits), and a lane is a filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from targets import ByteProduct
from tvm_ops.bitplanes import TERNARY
from tvm_ops.ops.bitserial_conv2d import Product

BLOCK = "byte_products"
"""The TIR block of the sum, by which schedules know it."""

ROWS = "rows"
"""That of the rows of an image, padded or not."""

_LEAST_PLANES = 8  # pairs of planes; with fewer, xor and popcount are no slower and weights a fraction of the size
_BLOCK_VECTORS = 4


@dataclass(frozen=True)
class Form:
    """How operands lie and meet.

    Attributes:
        kind: 'quads' adds four products of bytes to 32 bits; 'pairs' adds sums of two to 16 bits, and those later to
            32; 'words' multiplies 16-bit words, for weights that no byte holds.
        lanes: filters of a vector.
        most: groups that 16 bits surely hold; 0: all sums have 32.
    """

    kind: Literal["quads", "pairs", "words"]
    lanes: int
    most: int = 0

    @property
    def group(self) -> int:
        """Neighbours that meet in a lane."""
        return 2 if self.kind == "words" else 4

    @property
    def instructions(self) -> int:
        """For a group."""
        return 1 if self.kind == "quads" else 2

    @property
    def types(self) -> tuple[str, str]:
        """Of activations and of weights."""
        return ("int16", "int16") if self.kind == "words" else ("uint8", "int8")


def form(product: Product, filters: int, instructions: ByteProduct | None) -> Form | None:
    """How a CPU multiplies the codes of ``product`` for so many filters; None: better, or only, by planes."""
    (_, kw), (_, dilation) = product.geometry.kernel, product.geometry.dilations
    if instructions is None or product.x == TERNARY or filters % instructions.lanes or (kw > 1 and dilation > 1):
        return None
    if product.planes.x * product.planes.w < _LEAST_PLANES:
        return None
    lanes, largest = instructions.lanes, product.w.largest
    most = 0x7FFF // (2 * ((1 << product.x.bits) - 1) * largest)
    if largest > 0x7F or not (instructions.quads or most):
        return Form("words", lanes)
    return Form("quads", lanes) if instructions.quads else Form("pairs", lanes, most)


def pack_weight(values: NDArray[Any], form: Form, vectors: int = _BLOCK_VECTORS) -> NDArray[Any]:
    """[O, C, KH, KW] -> -w [blocks, KH, groups, filters of a block * neighbours of a group].

    vectors: of filters in a block, at most.
    """
    filters, channels, kh, kw = values.shape
    block = form.lanes * gcd(filters // form.lanes, vectors)
    rows = -values.transpose(2, 0, 3, 1).reshape(kh, filters, kw * channels)
    rows = np.pad(rows, [(0, 0), (0, 0), (0, -kw * channels % form.group)]).astype(form.types[1])
    blocks = rows.reshape(kh, filters // block, block, -1, form.group).transpose(1, 0, 3, 2, 4)
    return np.ascontiguousarray(blocks.reshape(*blocks.shape[:3], -1))


def _rows(x: Any, product: Product, form: Form, length: int) -> Any:
    """[N, H, W, C] with zeros around, row by row: [N, H', W' C], of whole pixels and at least ``length``."""
    from tvm import te, tirx

    images, height, width, channels = (int(extent) for extent in x.shape)
    top, left, bottom, right = product.geometry.pads
    high, wide = top + height + bottom, max(left + width + right, -(-length // channels))

    def padded(n: Any, row: Any, column: Any, c: Any) -> Any:
        y, z = row - top, column - left
        inside = tirx.all(y >= 0, y < height, z >= 0, z < width)
        return tirx.if_then_else(inside, x[n, y, z, c], tirx.const(0, x.dtype))

    if (high, wide) != (height, width):
        x = te.compute((images, high, wide, channels), padded, name="padded", attrs={"columns": [left, width]})

    def value(n: Any, h: Any, i: Any) -> Any:
        return tirx.Cast(form.types[0], x[n, h, i // channels, i % channels])

    return te.compute((images, high, wide * channels), value, name=ROWS)


def sums(x: Any, weight: Any, product: Product, form: Form) -> Any:
    """S of every window: int32 [N, OH, OW, O], of patterns uint8 [N, H, W, C] and of `pack_weight`."""
    from tvm import te, tirx

    blocks, kh, groups, width = (int(extent) for extent in weight.shape)
    (sy, sx), (dy, _), group = product.geometry.strides, product.geometry.dilations, form.group
    block = width // group
    step = sx * int(x.shape[3])
    oh, ow = product.geometry.output
    rows = _rows(x, product, form, (ow - 1) * step + groups * group)
    ry, rg, ri = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, groups), "rg"), te.reduce_axis((0, group), "ri")

    def multiplied(n: Any, h: Any, w: Any, o: Any) -> Any:
        pattern = rows[n, h * sy + ry * dy, w * step + rg * group + ri]
        value = weight[o // block, ry, rg, o % block * group + ri]
        return te.sum(tirx.Cast("int32", pattern) * tirx.Cast("int32", value), axis=[ry, rg, ri])

    attributes = {"kind": form.kind, "filters": block, "most": form.most, "step": step, "dilation": dy}
    return te.compute((x.shape[0], oh, ow, blocks * block), multiplied, name=BLOCK, attrs=attributes)
