"""The number format in NumPy, the oracle of everything integer: a quantised tensor is a weighted sum of bit planes.

    value = sum_p ratios[p] * bit_p + shift,    bit_p in {0, 1}

Signs are one plane (2 bit - 1); ternary values two, P - N; k-bit activations k, of ratios 1, 2, 4, ...; k-bit weights
k planes of signs. A word of zeros is the value ``shift``, so zeros around an image can be stored wherever that is 0.

Bits lie along the last axis, least significant bit first, and the tail of the last word is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32


@dataclass(frozen=True)
class Code:
    """How the bits of an element add up to its integer value.

    ratios: what the bit of every plane is worth. shift: the value of all bits zero.
    """

    ratios: tuple[int, ...]
    shift: int = 0

    def __post_init__(self) -> None:
        if not self.ratios or 0 in self.ratios:
            raise ValueError(f"ratios = {self.ratios}: give at least one plane, each worth something")

    @property
    def bits(self) -> int:
        """Planes, that is, bits that an element takes."""
        return len(self.ratios)

    @property
    def values(self) -> tuple[int, ...]:
        """Every value of the code, ascending."""
        patterns = product((0, 1), repeat=self.bits)
        return tuple(sorted({sum(r * b for r, b in zip(self.ratios, p, strict=True)) + self.shift for p in patterns}))

    @property
    def largest(self) -> int:
        """The largest magnitude of a value."""
        return max(abs(self.values[0]), abs(self.values[-1]))


def unsigned(bits: int) -> Code:
    """0, 1, ..., 2^bits - 1."""
    return Code(tuple(1 << p for p in range(bits)))


def odd(bits: int) -> Code:
    """The odd numbers from 1 - 2^bits to 2^bits - 1: planes of signs worth 1, 2, 4, ..."""
    return Code(tuple(2 << p for p in range(bits)), 1 - (1 << bits))


BINARY = odd(1)
TERNARY = Code((1, -1))


def encode(values: NDArray[Any], code: Code) -> NDArray[np.bool_]:
    """Values [...] -> planes bool [P, ...].

    Raises:
        ValueError: a value that the code lacks.
    """
    patterns: dict[int, tuple[bool, ...]] = {}
    for pattern in product((False, True), repeat=code.bits):
        patterns.setdefault(sum(r for r, bit in zip(code.ratios, pattern, strict=True) if bit) + code.shift, pattern)
    known = np.array(sorted(patterns))
    at = np.searchsorted(known, values).clip(0, len(known) - 1)
    if (wrong := known[at] != values).any():
        raise ValueError(f"{np.asarray(values)[wrong].flat[0]} is no value of {code}")
    return np.moveaxis(np.array([patterns[v] for v in known.tolist()])[at], -1, 0)


def decode(planes: NDArray[Any], code: Code) -> NDArray[np.int64]:
    """Planes [P, ...], a bit being what is > 0 -> values [...]."""
    return np.tensordot(np.array(code.ratios, np.int64), planes > 0, 1) + code.shift


def pack(bits: NDArray[Any], dtype: str = "<u4") -> NDArray[np.unsignedinteger]:
    """Bits or signs [..., K] -> words [..., ceil(K / bits of dtype)]; what is > 0 is a 1."""
    octets = np.packbits(bits > 0, axis=-1, bitorder="little")
    size = np.dtype(dtype).itemsize
    missing = -octets.shape[-1] % size
    octets = np.pad(octets, [(0, 0)] * (octets.ndim - 1) + [(0, missing)])
    return np.ascontiguousarray(octets).view(dtype)


def unpack(words: NDArray[np.unsignedinteger], count: int) -> NDArray[np.bool_]:
    """Words [..., W] -> the first ``count`` bits [..., count]."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=count, bitorder="little").astype(np.bool_)


def dot(
    a: NDArray[np.unsignedinteger],
    w: NDArray[np.unsignedinteger],
    count: int,
    a_code: Code = BINARY,
    w_code: Code = BINARY,
) -> NDArray[np.int64]:
    """The inner product of two coded vectors of ``count`` entries, by and and popcount alone.

    a: words [P, ..., W]. w: words [Q, ..., W]. -> int64 [...] (broadcast).

        <x, y> = sum_pq r_p r_q popcount(a_p & w_q) + shift_w sum_p r_p popcount(a_p)
               + shift_a sum_q r_q popcount(w_q) + count shift_a shift_w
    """
    result: NDArray[np.int64] = np.full((), count * a_code.shift * w_code.shift, np.int64)
    for p, x in zip(a_code.ratios, a, strict=True):
        result = result + p * w_code.shift * _ones(x)
        for q, y in zip(w_code.ratios, w, strict=True):
            result = result + p * q * _ones(x & y)
    for q, y in zip(w_code.ratios, w, strict=True):
        result = result + q * a_code.shift * _ones(y)
    return result


def _ones(words: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    return np.bitwise_count(words).sum(-1, dtype=np.int64)
