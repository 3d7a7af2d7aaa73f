"""Max pooling of floats, channels innermost.

Padding never wins, so a tap beside the image reads the nearest one inside instead: that one is in the window too.
"""

from __future__ import annotations

from typing import Any

from tvm_ops.ops.bitserial_conv2d import Geometry


def check(geometry: Geometry) -> None:
    """Refuse what no maximum is defined for.

    Raises:
        ValueError: dilated windows with padding, or windows that lie in the padding.
    """
    if any(geometry.pads) and geometry.dilations != (1, 1):
        raise ValueError("max pooling with dilations and padding is not supported: pad with a Pad node before it")
    if not all(geometry.inside(axis).any(1).all() for axis in (0, 1)):
        raise ValueError(f"max pooling with pads {list(geometry.pads)}: a window lies beside the image")


def compute(geometry: Geometry, x: Any) -> Any:
    """x: float32 [N, H, W, C] -> [N, OH, OW, C].

    Raises:
        ValueError: of `check`.
    """
    from tvm import te, tirx

    check(geometry)
    (h, w), (kh, kw), (sy, sx), (dy, dx) = geometry.image, geometry.kernel, geometry.strides, geometry.dilations
    top, left, *_ = geometry.pads
    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")

    def inside(at: Any, extent: int, padded: bool) -> Any:
        return tirx.max(tirx.min(at, extent - 1), 0) if padded else at

    rows, columns = any(geometry.pads[::2]), any(geometry.pads[1::2])
    return te.compute(
        (x.shape[0], *geometry.output, x.shape[3]),
        lambda n, i, j, c: te.max(
            x[n, inside(i * sy + ry * dy - top, h, rows), inside(j * sx + rx * dx - left, w, columns), c], axis=[ry, rx]
        ),
        name="pooled",
    )
