"""From a sum to what the next layer reads: a float, or one bit.

Between a layer's sum and the next quantiser stand per-channel steps: scale, bias, batch norm, ReLU, clip. A float
consumer gets them applied, one rounding each. A sign consumer needs only to know where the composition crosses zero:
every step is monotone, in float32 arithmetic as in the reals, so the bit is

    ascending channel    bit = value >= t        the smallest value whose float32 result is >= 0
    descending channel   bit = -value >= t
    constant channel     t is the lowest finite value or NaN: always, never

and t is found by bisection over *every* value the input can take, integers or float32 numbers, evaluating the very
formula that ONNX Runtime evaluates. The bits are therefore exact, not exact up to rounding. (An infinite activation
in a channel with scale 0, whose result would be NaN, counts as finite.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
_NUMPY: dict[str, Callable[[F32, F32], F32]] = {
    "mul": np.multiply,
    "div": np.divide,
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
}


@dataclass(frozen=True, eq=False)
class Step:
    """One float32 operation with a constant per channel, ``value`` [C]."""

    op: Literal["mul", "div", "add", "max", "min"]
    value: F32


def apply(steps: Sequence[Step], x: F32) -> F32:
    """The steps on float32 [..., C], one rounding each."""
    with np.errstate(all="ignore"):
        for step in steps:
            x = _NUMPY[step.op](x, step.value)
    return x


def direction(steps: Sequence[Step], channels: int) -> NDArray[np.int8]:
    """+1 where the composition ascends, -1 where it descends, 0 where a factor 0 makes it constant. [C]"""
    sign = np.ones(channels, np.int8)
    for step in steps:
        if step.op == "mul":
            sign = sign * np.sign(step.value).astype(np.int8)
        elif step.op == "div":
            sign = sign * np.copysign(1, step.value).astype(np.int8)  # x / -0.0 descends too
    return sign


def finite(steps: Sequence[Step], limit: int) -> bool:
    """Whether no integer in [-limit, limit] becomes infinite or NaN on its way, so that every step keeps its order."""
    ends = np.array([[-limit], [limit]], np.float32)
    return all(np.isfinite(apply(steps[: n + 1], ends)).all() for n in range(len(steps)))


@dataclass(frozen=True, eq=False)
class Threshold:
    """bit = flip * value >= at, per channel.

    flip: int8 [C], +1 or -1. at: [C], int64 for integer sums, float32 for floats (NaN: never).
    """

    flip: NDArray[np.int8]
    at: NDArray[Any]


def integer_threshold(steps: Sequence[Step], channels: int, limit: int) -> Threshold:
    """The threshold for integers in [-limit, limit]; ``at`` is limit + 1 where no value gives a 1.

    Raises:
        ValueError: float32 cannot represent every integer up to the limit.
    """
    if limit >= 1 << 24:
        raise ValueError(f"a sum may reach {limit}, and float32 holds integers only to 2^24: split the layer")
    flip = np.where(direction(steps, channels) < 0, -1, 1).astype(np.int8)

    def is_one(value: NDArray[np.int64]) -> NDArray[np.bool_]:
        return apply(steps, (flip * value).astype(np.float32)) >= 0

    return Threshold(flip, _first(is_one, -limit, limit, channels))


def float_threshold(steps: Sequence[Step], channels: int) -> Threshold:
    """The threshold for float32 values."""
    flip = np.where(direction(steps, channels) < 0, -1, 1).astype(np.int8)
    infinity = int(np.array(np.inf, np.float32).view(np.int32))

    def is_one(rank: NDArray[np.int64]) -> NDArray[np.bool_]:
        return apply(steps, flip * _float_of_rank(rank)) >= 0

    first = _first(is_one, -infinity - 1, infinity, channels)
    at = np.where(first > infinity, np.float32(np.nan), _float_of_rank(np.minimum(first, infinity)))
    return Threshold(flip, at.astype(np.float32))


def _float_of_rank(rank: NDArray[np.int64]) -> F32:
    """Float32 numbers in ascending order, counted from +0 = 0 and -0 = -1, to inf and to -inf."""
    bits = np.where(rank >= 0, rank, (-rank - 1) | 0x80000000)
    return bits.astype(np.uint32).view(np.float32)


def _first(
    is_one: Callable[[NDArray[np.int64]], NDArray[np.bool_]], low: int, high: int, channels: int
) -> NDArray[np.int64]:
    """The smallest value in [low, high] that ascends to 1, by bisection; high + 1 where there is none. [C]"""
    below, above = np.full(channels, low - 1, np.int64), np.full(channels, high + 1, np.int64)
    while (open_ := above - below > 1).any():
        middle = np.clip((below + above) // 2, low, high)
        one = is_one(middle)
        above, below = np.where(open_ & one, middle, above), np.where(open_ & ~one, middle, below)
    return above


def emit(steps: Sequence[Step], constants: Sequence[Any], x: Any, channel: Any) -> Any:
    """The steps as a TIR expression on the float32 ``x``; ``constants`` are their values as TE tensors [C]."""
    from tvm import tirx

    for step, constant in zip(steps, constants, strict=True):
        value = constant[channel]
        if step.op == "mul":
            x = product(x, value)
        elif step.op == "div":
            x = x / value
        elif step.op == "add":
            x = x + value
        else:  # the compiled comparison returns its second operand where one is a NaN: so a NaN stays one
            x = (tirx.max if step.op == "max" else tirx.min)(value, x)
    return x


def product(a: Any, b: Any) -> Any:
    """a * b, rounded.

    LLVM would contract a product and the sum after it to one fused multiply-add, which rounds once where ONNX Runtime
    rounds twice; a sign after it could then differ. The fence costs no instruction.
    """
    from tvm import tirx

    return tirx.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence", a * b)
