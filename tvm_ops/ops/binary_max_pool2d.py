"""Max pooling of bits: an or over the window.

Pooling before a sign commutes with it where what stands between ascends (an or of bits) and turns into a minimum
where it descends (an and, which is the complement of the or of complements): ``invert`` has a 1 for those channels.
"""

from __future__ import annotations

from typing import Any

from tvm_ops.ops.bitserial_conv2d import Geometry


def compute(geometry: Geometry, x: Any, invert: Any) -> Any:
    """x: uint32 [N, H, W, 1, words]. invert: uint32 [words]. -> uint32 [N, OH, OW, 1, words]; padding never wins."""
    from tvm import te, tirx, topi

    zero = tirx.const(0, "uint32")
    words = te.compute(x.shape, lambda n, h, w, p, k: x[n, h, w, p, k] ^ invert[k], name="ascending")
    top, left, bottom, right = geometry.pads
    if any(geometry.pads):
        words = topi.nn.pad(words, [0, top, left, 0, 0], [0, bottom, right, 0, 0], pad_value=zero, name="padded")
    ry, rx = te.reduce_axis((0, geometry.kernel[0]), "ry"), te.reduce_axis((0, geometry.kernel[1]), "rx")
    (sy, sx), (dy, dx) = geometry.strides, geometry.dilations
    union = te.comm_reducer(lambda a, b: a | b, lambda dtype: tirx.const(0, dtype), name="union")
    pooled = te.compute(
        (x.shape[0], *geometry.output, 1, x.shape[4]),
        lambda n, h, w, p, k: union(words[n, h * sy + ry * dy, w * sx + rx * dx, p, k], axis=[ry, rx]),
        name="pooled",
    )
    return te.compute(pooled.shape, lambda n, h, w, p, k: pooled[n, h, w, p, k] ^ invert[k], name="words")
