"""Convolution and matrix product of floats, channels innermost, weights in blocks of filters.

A tile of a schedule reads the weights of its filters tap by tap. Behind each other in memory, as [blocks, KH, KW, C,
filters of a block], those are one stream; as [KH, KW, C, O] each tap lies O floats further, and from 256 filters on
that misses the cache and its translations (3x3, 256 channels, 14x14 on Cascade Lake: 4.7 ms instead of 1.9, November
2026).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_ops.ops.bitserial_conv2d import Geometry

BLOCK = "float_sums"
"""The TIR block of the sum, by which schedules know it."""

FILTERS = 32
"""Of a block: whole vectors of every CPU, and two of the widest."""

_MOST_UNEVEN = 128  # filters up to which filling them up to whole blocks is not worth its memory


def pack_weight(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """[O, C, KH, KW] -> [blocks, KH, KW, C, filters of a block], zeros after the last filter.

    An O that is small and no multiple of a block makes one block of its own size.
    """
    filters = len(values)
    block = FILTERS if filters % FILTERS == 0 or filters > _MOST_UNEVEN else filters
    whole = np.pad(values, [(0, -filters % block), (0, 0), (0, 0), (0, 0)])
    blocks = whole.reshape(-1, block, *values.shape[1:]).transpose(0, 3, 4, 2, 1)
    return np.ascontiguousarray(blocks)


def compute(geometry: Geometry, filters: int, x: Any, weight: Any) -> Any:
    """x: float32 [N, H, W, C]. weight: of `pack_weight`. -> float32 [N, OH, OW, O]."""
    from tvm import te, tirx, topi

    top, left, bottom, right = geometry.pads
    if any(geometry.pads):
        zero = tirx.const(0, "float32")
        x = topi.nn.pad(x, [0, top, left, 0], [0, bottom, right, 0], pad_value=zero, name="padded")
    blocks, kh, kw, channels, block = weight.shape
    ry, rx, rc = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx"), te.reduce_axis((0, channels), "rc")
    (sy, sx), (dy, dx) = geometry.strides, geometry.dilations
    sums = te.compute(
        (x.shape[0], *geometry.output, int(blocks) * int(block)),
        lambda n, h, w, o: te.sum(
            x[n, h * sy + ry * dy, w * sx + rx * dx, rc] * weight[o // block, ry, rx, rc, o % block], axis=[ry, rx, rc]
        ),
        name=BLOCK,
    )
    return _without_filling(sums, filters)


def compute_dense(filters: int, x: Any, weight: Any) -> Any:
    """x: float32 [N, C]. weight: of `pack_weight`. -> float32 [N, O]."""
    from tvm import te

    blocks, _, _, channels, block = weight.shape
    rc = te.reduce_axis((0, channels), "rc")
    sums = te.compute(
        (x.shape[0], int(blocks) * int(block)),
        lambda n, o: te.sum(x[n, rc] * weight[o // block, 0, 0, rc, o % block], axis=rc),
        name=BLOCK,
    )
    return _without_filling(sums, filters)


def _without_filling(sums: Any, filters: int) -> Any:
    from tvm import te

    if int(sums.shape[-1]) == filters:
        return sums
    return te.compute((*sums.shape[:-1], filters), lambda *i: sums[i], name="filters")
