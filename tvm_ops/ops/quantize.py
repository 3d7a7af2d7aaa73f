"""Floats to the bit patterns of codes, by the very float32 formulas of the domain's bodies (`opset`).

A pattern is a uint8 whose bit p goes to plane p; `bitpack.compute_planes` packs it.
"""

from __future__ import annotations

from typing import Any


def unit(x: Any, bits: int) -> Any:
    """``QuantizeUnit``: the integer itself."""
    from tvm import tirx

    zero, one = tirx.const(0.0, "float32"), tirx.const(1.0, "float32")
    level = tirx.nearbyint(tirx.min(x, one) * tirx.const((1 << bits) - 1, "float32"))
    return tirx.Cast("uint8", tirx.Select(x >= zero, level, zero))


def symmetric(x: Any, bits: int) -> Any:
    """``QuantizeSymmetric``: (value + 2^bits - 1) / 2, the planes of an odd code."""
    from tvm import tirx

    zero, one = tirx.const(0.0, "float32"), tirx.const(1.0, "float32")
    level = tirx.nearbyint((tirx.min(x, one) + one) * tirx.const(((1 << bits) - 1) / 2, "float32"))
    return tirx.Cast("uint8", tirx.Select(x >= -one, level, zero))


def ternary(x: Any, threshold: float) -> Any:
    """``Ternarize``: bit 0 is the sign (1: +1), bit 1 the mask (1: not 0)."""
    from tvm import tirx

    at, plus, minus, zero = tirx.const(threshold, "float32"), *(tirx.const(v, "uint8") for v in (3, 2, 0))
    return tirx.Select(x >= at, plus, tirx.Select(x <= -at, minus, zero))
