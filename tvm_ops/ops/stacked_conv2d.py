"""Convolution with stacked binary filters (SLBF), which stay a bank and packed indices in the library.

A filter is a stack of S out of a bank of M filters of D channels, of S D channels in all (arXiv 2010.02778). Two ways:

    expand   the words of all filters are gathered from the bank at every call, then convolved as any signs
    select   every segment of the activations is convolved with the bank, then S of the S M sums are added a filter

``select`` does M / O of the bit operations, but gathers O S sums a pixel, which no CPU vector does well; ``expand``
gathers once a call. `Stack.selects` weighs the two. Words of a segment are its own: where D fills no whole word,
activations are moved apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_ops import output_transform
from tvm_ops.bitplanes import WORD_BITS, pack
from tvm_ops.ops.bitserial_gemm import FRAGMENT_WORDS
from tvm_ops.ops.implicit_gemm import FILTERS
from tvm_ops.output_transform import Step

# Words that are counted in the time of one gathered sum. Cascade Lake, November 2026: 7x7x512, s = 4, rho = 8 takes
# 196 us by select and 513 by expand; 14x14x256, s = 4, rho = 4, at (1 - 1/4) 18 = 13.5, 429 and 446; 28x28x128 more.
_GATHER = 16


@dataclass(frozen=True, eq=False)
class Stack:
    """bank: +-1 [M, D, KH, KW]. indices: [O, S] into it."""

    bank: NDArray[Any]
    indices: NDArray[np.int64]

    @property
    def segments(self) -> int:
        """S."""
        return self.indices.shape[1]

    @property
    def channels(self) -> int:
        """D."""
        return self.bank.shape[1]

    @property
    def selects(self) -> bool:
        """Which way takes less: filters that need not be convolved with, in words a selection, against its gather."""
        filters, bank = len(self.indices), len(self.bank)
        words = -(-self.channels // WORD_BITS) * int(np.prod(self.bank.shape[2:]))
        return (1 - bank / filters) * words > _GATHER

    @property
    def index_bits(self) -> int:
        """Of an index as stored."""
        return index_bits(len(self.bank))

    def stream(self) -> NDArray[np.uint8]:
        """The indices as `pack_indices` writes them, and two bytes to read past the end."""
        return np.pad(pack_indices(self.indices, len(self.bank)), (0, 2))


def index_bits(bank: int) -> int:
    """Bits of an index into ``bank`` filters."""
    return max(1, (bank - 1).bit_length())


def pack_indices(indices: NDArray[np.integer], bank: int) -> NDArray[np.uint8]:
    """Indices [...] -> a stream of bytes, `index_bits` bits each, least significant bit first."""
    places = np.arange(index_bits(bank))
    return np.packbits((indices.reshape(-1, 1) >> places & 1).astype(np.uint8).ravel(), bitorder="little")


def unpack_indices(stream: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int64]:
    """The first ``count`` indices of a stream."""
    found = np.unpackbits(stream, count=count * bits, bitorder="little").reshape(count, bits)
    return found.astype(np.int64) @ (1 << np.arange(bits))


def _index(stream: Any, bits: int, number: Any) -> Any:
    """Index ``number`` of a stream as a TIR expression."""
    from tvm import tirx

    at = number * bits
    octets = [tirx.Cast("int32", stream[tirx.floordiv(at, 8) + i]) for i in range(3)]
    value = octets[0] + octets[1] * 256 + octets[2] * 65536
    return (value >> tirx.floormod(at, 8)) & ((1 << bits) - 1)


def split(x: Any, channels: int, segments: int) -> Any:
    """Every segment as an image of its own: uint32 [N, H, W, P, words] -> [S N, H, W, P, ceil(D / 32)]."""
    from tvm import te, tirx

    images, h, w, planes, words = (int(extent) for extent in x.shape)

    def word(i: Any, h: Any, w: Any, p: Any, k: Any) -> Any:
        first = tirx.floordiv(i, images) * channels + k * WORD_BITS
        at, shift = tirx.floordiv(first, WORD_BITS), tirx.Cast("uint64", tirx.floormod(first, WORD_BITS))
        low, high = (
            tirx.Cast("uint64", x[tirx.floormod(i, images), h, w, p, tirx.min(at + step, words - 1)]) for step in (0, 1)
        )
        both = (high << tirx.const(WORD_BITS, "uint64")) | low
        left = tirx.Cast("uint64", tirx.min(channels - k * WORD_BITS, WORD_BITS))
        one = tirx.const(1, "uint64")
        return tirx.Cast("uint32", (both >> shift) & ((one << left) - one))

    return te.compute((segments * images, h, w, planes, -(-channels // WORD_BITS)), word, name="split")


def join(parts: Any, segments: int) -> Any:
    """The segments of `split` behind each other: [S N, H, W, P, words] -> [N, H, W, P, S words]."""
    from tvm import te, tirx

    images, h, w, planes, own = (int(extent) for extent in parts.shape)
    n = images // segments

    def word(i: Any, h: Any, w: Any, p: Any, k: Any) -> Any:
        return parts[tirx.floordiv(k, own) * n + i, h, w, p, tirx.floormod(k, own)]

    return te.compute((n, h, w, planes, segments * own), word, name="joined")


def expand(stack: Stack, bank: Any, stream: Any, flip: Any) -> Any:
    """The words of all filters: uint32 [KH, KW, 1, S ceil(D / 32), filters].

    bank: uint32 [KH, KW, 1, ceil(D / 32), M]. flip: uint32 [filters], all ones where a filter is negated; those
    beyond O repeat the last.
    """
    from tvm import te, tirx

    kh, kw, _, own, _ = (int(extent) for extent in bank.shape)
    filters, last = int(flip.shape[0]), len(stack.indices) - 1
    valid = (1 << (stack.channels % WORD_BITS)) - 1 or (1 << WORD_BITS) - 1  # of a segment's last word

    def word(ry: Any, rx: Any, p: Any, k: Any, o: Any) -> Any:
        number = tirx.min(o, last) * stack.segments + tirx.floordiv(k, own)
        found = bank[ry, rx, p, tirx.floormod(k, own), _index(stream, stack.index_bits, number)]
        ends = tirx.floormod(k, own) == own - 1
        mask = tirx.Select(ends, tirx.const(valid, "uint32"), tirx.const((1 << WORD_BITS) - 1, "uint32"))
        return found ^ (flip[o] & mask)

    return te.compute((kh, kw, 1, stack.segments * own, filters), word, name="expanded")


def bank_rows(stack: Stack) -> NDArray[np.uint32]:
    """The bank's words for `expand_rows`: [M, taps, ceil(D / 32)]."""
    words = pack(stack.bank.transpose(0, 2, 3, 1))
    return np.ascontiguousarray(words.reshape(len(words), -1, words.shape[-1]))


def expand_rows(stack: Stack, bank: Any, stream: Any, flip: Any) -> Any:
    """`expand` for GPUs, as the rows of `bitserial_gemm`: uint32 [O, 1, taps S ceil(D / 32), filled up].

    bank: of `bank_rows`. flip: uint32 [O], all ones where a filter is negated.
    """
    from tvm import te, tirx

    _, taps, own = (int(extent) for extent in bank.shape)
    each, filters = stack.segments * own, len(stack.indices)
    depth = taps * each
    valid = (1 << (stack.channels % WORD_BITS)) - 1 or (1 << WORD_BITS) - 1  # of a segment's last word

    def word(o: Any, _: Any, k: Any) -> Any:
        part, at = tirx.floordiv(tirx.floormod(k, each), own), tirx.floormod(k, own)
        number = _index(stream, stack.index_bits, o * stack.segments + part)
        ends = at == own - 1
        mask = tirx.Select(ends, tirx.const(valid, "uint32"), tirx.const((1 << WORD_BITS) - 1, "uint32"))
        found = bank[number, tirx.floordiv(k, each), at] ^ (flip[o] & mask)
        return tirx.if_then_else(k < depth, found, tirx.const(0, "uint32"))

    filled = -(-depth // FRAGMENT_WORDS) * FRAGMENT_WORDS
    return te.compute((filters, 1, filled), word, name=FILTERS)


def select(
    stack: Stack,
    steps: Sequence[Step],
    maps: Any,
    stream: Any,
    *constants: Any,
    finish: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """The sums of the selected maps through the steps and ``finish``: [N, OH, OW, O].

    maps: float32 [S N, OH, OW, M], segment after segment.
    """
    from tvm import te

    images, oh, ow, _ = (int(extent) for extent in maps.shape)
    n, filters = images // stack.segments, len(stack.indices)
    indices = te.compute(
        stack.indices.shape,
        lambda o, s: _index(stream, stack.index_bits, o * stack.segments + s),
        name="indices",
    )

    def value(i: Any, h: Any, w: Any, o: Any) -> Any:
        total = maps[i, h, w, indices[o, 0]]
        for s in range(1, stack.segments):
            total = total + maps[s * n + i, h, w, indices[o, s]]
        return finish(output_transform.emit(steps, constants, total, o))

    return te.compute((n, oh, ow, filters), value, name="selected")
