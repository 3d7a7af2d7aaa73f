"""The number format in NumPy, the oracle of everything integer: a quantised tensor is a sum of +-1 bit planes.

    x = scale * (sum_p ratios[p] * s_p + shift),    s_p = +-1

Binary is one plane; ternary has ratios (1, 1); a k-bit activation has ratios (1, 2, 4, ...) and shift 2^k - 1.
Bits lie along the last axis, least significant bit first, 1 means +1, and the tail of the last word is zero: two
zero tails xor to nothing, so K - 2 popcount(a ^ w) holds for any K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32


@dataclass(frozen=True)
class BitCode:
    """How planes add up to an integer code.

    ratios: the weight of every plane. shift: what is added to their sum.
    """

    ratios: tuple[int, ...] = (1,)
    shift: int = 0

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) < 1:
            raise ValueError(f"ratios = {self.ratios}: give at least one plane, each with a positive weight")

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a value of the code, that is, whether a padded position can be stored."""
        sums = {0}
        for ratio in self.ratios:
            sums = {s + sign * ratio for s in sums for sign in (-1, 1)}
        return -self.shift in sums


BINARY = BitCode()


def decode(planes: NDArray[np.int8], code: BitCode) -> NDArray[np.int64]:
    """+-1 planes [P, ...] -> integer codes [...]."""
    ratios = np.asarray(code.ratios, np.int64).reshape(-1, *[1] * (planes.ndim - 1))
    return (planes * ratios).sum(0) + code.shift


def pack(signs: NDArray[Any], dtype: str = "<u4") -> NDArray[np.unsignedinteger]:
    """Signs [..., K] -> words [..., ceil(K / bits of dtype)]; what is > 0 is a 1."""
    octets = np.packbits(signs > 0, axis=-1, bitorder="little")
    size = np.dtype(dtype).itemsize
    missing = -octets.shape[-1] % size
    octets = np.pad(octets, [(0, 0)] * (octets.ndim - 1) + [(0, missing)])
    return np.ascontiguousarray(octets).view(dtype)


def unpack(words: NDArray[np.unsignedinteger], count: int) -> NDArray[np.int8]:
    """Words [..., W] -> the first ``count`` signs +-1 [..., count]."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, count=count, bitorder="little")
    return bits.astype(np.int8) * 2 - 1


def dot(
    a: NDArray[np.unsignedinteger],
    w: NDArray[np.unsignedinteger],
    count: int,
    a_code: BitCode = BINARY,
    w_code: BitCode = BINARY,
) -> NDArray[np.int64]:
    """The inner product of two coded vectors of ``count`` entries, by xor and popcount alone.

    a: words [P, ..., W]. w: words [Q, ..., W]. -> int64 [...] (broadcast).

        <x, y> = sum_pq r_p r_q (K - 2 popcount(a_p ^ w_q)) + shift_a sum(y) + shift_w sum(x) - K shift_a shift_w
    """

    def weighted_sums(words: NDArray[np.unsignedinteger], code: BitCode) -> NDArray[np.int64]:
        ones = np.bitwise_count(words).sum(-1, dtype=np.int64)
        ratios = np.asarray(code.ratios, np.int64).reshape(-1, *[1] * (ones.ndim - 1))
        return (ratios * (2 * ones - count)).sum(0) + count * code.shift

    total: NDArray[np.int64] = np.zeros((), np.int64)
    for plane_a, ratio_a in zip(a, a_code.ratios, strict=True):
        for plane_w, ratio_w in zip(w, w_code.ratios, strict=True):
            differing = np.bitwise_count(plane_a ^ plane_w).sum(-1, dtype=np.int64)
            total = total + ratio_a * ratio_w * (count - 2 * differing)
    cross = a_code.shift * weighted_sums(w, w_code) + w_code.shift * weighted_sums(a, a_code)
    return total + cross - count * a_code.shift * w_code.shift
