"""Convolution and the maximum over windows of its sums, in strips of rows that stay in a core's second cache.

A stem's sums are large and read once: 3.2 MB for 112x112x64, written and read by two kernels in 0.3 ms beside 1.7 of
products. A strip of pooled rows has its own rows of sums. What two windows share at the border of two strips is summed
twice, so strips are long. Windows keep the order of their taps, and sums theirs: results are those of two kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm_ops.ops import max_pool2d
from tvm_ops.ops.bitserial_conv2d import Geometry

BLOCK = "pooled_strips"
"""The TIR block of the maximum. Its annotation ``strip`` is the number of its rows that are made at a time."""

# Half of the 1 MB that a server's core with AVX-512 has at least. 224x224, 7x7 over 3 channels, 64 filters, 3x3 pooling
# of stride 2: 1.82 ms in strips of 14 rows (416 kB), 1.90 of 7, 1.86 of 28, 1.98 in two kernels (Cascade Lake, November
# 2026).
_STRIP_BYTES = 512 << 10
# Writing and reading a float costs what 20 products do: of sums that take many more, little is gained.
_MOST_PRODUCTS = 200
_MOST_REPEATED = 10  # products for each sum, of rows that are summed twice


def strip(pool: Geometry, filters: int, block: int, products: int) -> int:
    """Rows of the pooled map to make at a time; 0: two kernels are better, or this operator cannot.

    Args:
        block: filters that are summed and pooled before the next.
        products: of one sum; those of bytes count by instructions, of which each adds several.
    """
    rows, (kernel, _), (stride, _) = pool.output[0], pool.kernel, pool.strides
    row_bytes = 4 * block * pool.image[1]
    fitting = [s for s in range(1, rows) if rows % s == 0 and ((s - 1) * stride + kernel) * row_bytes <= _STRIP_BYTES]
    step = stride * max(fitting, default=0)
    refused = (
        pool.dilations != (1, 1)
        or filters % block
        or pool.image[0] * row_bytes <= _STRIP_BYTES  # it stays in that cache as it is
        or products > _MOST_PRODUCTS
        or (kernel - stride) * products > _MOST_REPEATED * step
        or step < max(pool.pads[::2])  # padding would reach the second strip
    )
    return 0 if refused else step // stride


def compute(
    conv: Geometry,
    pool: Geometry,
    rows: int,
    x: Any,
    sums: Callable[[Geometry, Any], Any],
    made: Callable[[Any, Any, Any, Any], Any],
) -> Any:
    """x: [N, H, W, C], and 0 around it. -> [N, OH, OW, O].

    Args:
        rows: of `strip`.
        sums: [N, H, W, C] -> [N, OH, OW, O], of a convolution without pads.
        made: what is pooled, as a TIR expression of a sum, its row and column in the map, and its filter.

    Raises:
        ValueError: as `max_pool2d.compute`.
    """
    from tvm import te, tirx

    max_pool2d.check(pool)
    (kh, kw), (sy, sx), (top, left, bottom, right) = pool.kernel, pool.strides, pool.pads
    count, sums_high = pool.output[0] // rows, (rows - 1) * sy + kh
    # Strip k needs the image from row k * step + first; what is beside the image is 0.
    step, first = rows * sy * conv.strides[0], -top * conv.strides[0] - conv.pads[0]
    high = (sums_high - 1) * conv.strides[0] + (conv.kernel[0] - 1) * conv.dilations[0] + 1
    wide = conv.image[1] + conv.pads[1] + conv.pads[3]

    def padded(n: Any, row: Any, column: Any, c: Any) -> Any:
        y, z = n % count * step + first + row, column - conv.pads[1]
        inside = tirx.all(y >= 0, y < conv.image[0], z >= 0, z < conv.image[1])
        return tirx.if_then_else(inside, x[n // count, y, z, c], tirx.const(0, x.dtype))

    # Of floats a copy with a test for the border in its loop is as fast. Of what quantises, LLVM would make no vectors.
    attributes = {"columns": [conv.pads[1], conv.image[1]]} if x.dtype == "uint8" else {}
    strips = te.compute((x.shape[0] * count, high, wide, x.shape[3]), padded, name="padded", attrs=attributes)
    found = sums(Geometry((high, wide), conv.kernel, conv.strides, dilations=conv.dilations), strips)

    def transformed(n: Any, i: Any, j: Any, c: Any) -> Any:
        at = n % count * rows * sy + i - top
        at = tirx.max(tirx.min(at, pool.image[0] - 1), 0) if top or bottom else at  # beside the map, nothing is read
        return made(found[n, i, j, c], at, j, c)

    pooled = te.compute(found.shape, transformed, name="transformed")
    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    last = pool.image[0] - 1 + top - (count - 1) * rows * sy

    def row(i: Any) -> Any:
        """As in `max_pool2d`, the nearest inside; by Select, so that TVM sees that a strip is all that it may be."""
        y, at = i * sy + ry - top, i % rows * sy + ry
        at = tirx.Select(y < 0, top, at) if top else at
        return tirx.Select(y >= pool.image[0], last, at) if bottom else at

    def column(j: Any) -> Any:
        at = j * sx + rx - left
        return tirx.max(tirx.min(at, pool.image[1] - 1), 0) if left or right else at

    return te.compute(
        (x.shape[0], *pool.output, found.shape[3]),
        lambda n, i, j, c: te.max(pooled[n * count + i // rows, row(i), column(j), c], axis=[ry, rx]),
        name=BLOCK,
        attrs={"strip": rows},
    )
