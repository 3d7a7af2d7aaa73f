"""Convolution as a matrix product whose left side, the windows, is never stored, for GPUs.

Rows are output pixels, columns filters, the depth taps x channels. Weights are [O, depth], for both sides are read
along the depth. What follows the sum is computed where the sum is. `tvm_ops.cuda.gemm` writes the code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_ops import output_transform
from tvm_ops.bitplanes import WORD_BITS
from tvm_ops.ops import bitweight_conv2d
from tvm_ops.ops.bitserial_conv2d import Geometry
from tvm_ops.output_transform import Step

BLOCK = "products"
"""The TIR block of the sum. Its annotation ``vector`` says how many neighbours of the depth lie together in memory."""

PATCHES = "patches"
"""The TIR block of the windows, never a whole tensor."""

FILTERS = "filters"
"""The TIR block of weights that are stored otherwise, never a whole tensor."""


def vector(channels: int) -> int:
    """How many neighbours of the depth, up to 4, always belong to one tap."""
    return math.gcd(channels, 4)


def patches(x: Any, geometry: Geometry, depth: int) -> Any:
    """Windows [pixels, P, depth] of x [N, H, W, (P,) C], zeros around the image and beyond the last tap."""
    from tvm import te, tirx

    n, height, width, *planes, channels = (int(extent) for extent in x.shape)
    (oh, ow), (kh, kw) = geometry.output, geometry.kernel
    (sy, sx), (dy, dx), (top, left, _, _) = geometry.strides, geometry.dilations, geometry.pads

    def at(m: Any, i: Any, k: Any) -> Any:
        tap, c = tirx.floordiv(k, channels), tirx.floormod(k, channels)
        y = tirx.floormod(tirx.floordiv(m, ow), oh) * sy - top + tirx.floordiv(tap, kw) * dy
        z = tirx.floormod(m, ow) * sx - left + tirx.floormod(tap, kw) * dx
        value = x[(tirx.floordiv(m, oh * ow), y, z, *([i] if planes else []), c)]
        inside = [k < kh * kw * channels] if depth > kh * kw * channels else []
        if any(geometry.pads):
            inside += [y >= 0, y < height, z >= 0, z < width]
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, x.dtype)) if inside else value

    return te.compute((n * oh * ow, *(planes or [1]), depth), at, name=PATCHES)


def pixels(value: Callable[..., Any], images: Any, geometry: Geometry, filters: int) -> Any:
    """[N, OH, OW, O] of value(m, n, h, w, o), m being the number of the pixel."""
    from tvm import te

    oh, ow = geometry.output
    return te.compute(
        (images, oh, ow, filters), lambda n, h, w, o: value((n * oh + h) * ow + w, n, h, w, o), name="transformed"
    )


def rows(weight: NDArray[Any]) -> NDArray[Any]:
    """Float weights [O, C, KH, KW] -> [O, depth], filled up to whole vectors."""
    flat = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    return np.ascontiguousarray(np.pad(flat, [(0, 0), (0, -flat.shape[1] % 4)]))


def _sums(x: Any, geometry: Geometry, filters: int, depth: int, weight: Callable[..., Any]) -> Any:
    from tvm import te

    windows = patches(x, geometry, depth)
    k = te.reduce_axis((0, depth), "k")
    attributes = {"operation": "", "x": [1], "w": [1], "counts": [0], "vector": vector(int(x.shape[-1]))}
    shape = (windows.shape[0], filters)
    return te.compute(
        shape, lambda m, o: te.sum(windows[m, 0, k] * weight(o, k), axis=[k]), name=BLOCK, attrs=attributes
    )


def compute(
    geometry: Geometry,
    steps: Sequence[Step],
    x: Any,
    weight: Any,
    *constants: Any,
    finish: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """x: float32 [N, H, W, C]. weight: `rows`. -> [N, OH, OW, O], the sums through steps and ``finish``."""
    filters, depth = (int(extent) for extent in weight.shape)
    sums = _sums(x, geometry, filters, depth, lambda o, k: weight[o, k])
    return _finished(sums, x, geometry, steps, constants, finish)


def few_bit_words(weights: bitweight_conv2d.Weights) -> NDArray[np.uint32]:
    """The planes, 32 neighbours of the depth a word: [O, planes, words]."""
    from tvm_ops.bitplanes import pack

    planes = weights.planes.transpose(1, 0, 3, 4, 2)
    return pack(planes.reshape(*planes.shape[:2], -1))


def compute_few_bits(
    geometry: Geometry,
    weights: bitweight_conv2d.Weights,
    steps: Sequence[Step],
    x: Any,
    words: Any,
    *constants: Any,
    finish: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """x: float32 [N, H, W, C]. words: `few_bit_words`. -> [N, OH, OW, O], the sums through steps and ``finish``."""
    from tvm import te, tirx

    depth = weights.planes[0, 0].size

    def unpacked(o: Any, _: Any, k: Any) -> Any:
        word = tirx.floordiv(k, WORD_BITS)
        return weights.unpacked(lambda plane: words[o, plane, word], tirx.floormod(k, WORD_BITS))

    floats = te.compute((weights.filters, 1, depth), unpacked, name=FILTERS)
    sums = _sums(x, geometry, weights.filters, depth, lambda o, k: floats[o, 0, k])
    return _finished(sums, x, geometry, steps, constants, finish)


def _finished(
    sums: Any,
    x: Any,
    geometry: Geometry,
    steps: Sequence[Step],
    constants: Sequence[Any],
    finish: Callable[[Any], Any],
) -> Any:
    def value(m: Any, n: Any, h: Any, w: Any, o: Any) -> Any:
        return finish(output_transform.emit(steps, constants, sums[m, o], o))

    return pixels(value, x.shape[0], geometry, sums.shape[1])
