"""Convolution of integer codes as a matrix product of bits, for GPUs.

Rows are output pixels, columns filters, and the depth is a window's words: taps x words of channels. Weights are stored
as they are coded, w = sum_j u_j b_j + s_w with bits b, and so are activations, x = sum_i r_i c_i + s_x (ternary ones as
sign and mask, 2 sign - mask). Over a window whose words outside the image are zero,

    dot = sum_ij r_i u_j popc(c_i & b_j) + s_w sum_i r_i popc(c_i) + border       border = s_x * sum of w inside

which is what the tensor cores of compute capability 8 and 9 count. Others count c ^ b, and then, since
popc(c & b) = (popc(c) + popc(b) - popc(c ^ b)) / 2, and sum_j u_j = -2 s_w for every code of weights,

    2 dot = sum_i r_i sum_j u_j popc(b_j) - sum_ij r_i u_j popc(c_i ^ b_j) + 2 border

The part that varies is `products`, the rest is a constant of the filter and of the window's place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from targets import Target
from tvm_ops import output_transform
from tvm_ops.bitplanes import TERNARY, encode, pack
from tvm_ops.ops import bitpack, implicit_gemm
from tvm_ops.ops.bitserial_conv2d import Border, Product, shifted
from tvm_ops.output_transform import Step

FRAGMENT_WORDS = 8
"""The depth is filled up to whole fragments of the largest tensor core instruction, 256 bits."""

_ALWAYS_LESS = 1 << 30  # more than any sum that float32 holds


MIN_FRAGMENT_ROWS = 16
"""With fewer output pixels, a row of fragments of the tensor cores would be mostly empty."""


def operation(target: Target, pixels: int) -> Literal["and", "xor"]:
    """What a product of so many rows does to pairs of words before it counts."""
    assert target.gpu is not None
    return "and" if target.gpu.bit_product == "and" and pixels >= MIN_FRAGMENT_ROWS else "xor"


@dataclass(frozen=True)
class Form:
    """How a product is counted: sum_ij x[i] w[j] popc(c_i op b_j) + sum_i counts[i] popc(c_i), and half of it if
    ``halved``."""

    operation: Literal["and", "xor"]
    x: tuple[int, ...]
    w: tuple[int, ...]
    counts: tuple[int, ...]
    halved: bool


@dataclass(frozen=True, eq=False)
class Gemm:
    """The product of codes ``product`` with weights [O, C, KH, KW] of its code ``w``."""

    product: Product
    operation: Literal["and", "xor"]
    weights: NDArray[Any]

    @cached_property
    def form(self) -> Form:
        r = (2, -1) if self.product.x == TERNARY else self.product.x.ratios
        u, shift = self.product.w.ratios, self.product.w.shift
        if self.operation == "and":
            return Form("and", r, u, tuple(ratio * shift for ratio in r), False)
        even = all(value % 2 == 0 for value in u)
        return Form("xor", r, tuple(-value // 2 if even else -value for value in u), (0,) * len(r), not even)

    @cached_property
    def border(self) -> Border:
        """What is added to `Form`'s sum; in its halves where it is halved."""
        inside = shifted(self.weights, self.product)
        if self.operation == "and":
            return inside
        planes = encode(self.weights, self.product.w).sum((2, 3, 4), dtype=np.int64)  # popc(b_j) of a filter
        ones = sum(self.form.x) * (np.array(self.product.w.ratios) @ planes)
        twice = 2 * inside.values + ones
        return Border(twice if self.form.halved else twice // 2, inside.rows, inside.columns)

    def words(self) -> NDArray[np.uint32]:
        """[O, planes, depth], a tap's channels together, filled up with zeros to whole fragments."""
        planes = pack(encode(self.weights, self.product.w).transpose(1, 0, 3, 4, 2))
        flat = planes.reshape(*planes.shape[:2], -1)
        return np.pad(flat, [(0, 0), (0, 0), (0, -flat.shape[-1] % FRAGMENT_WORDS)])

    def float_constants(self, steps: Sequence[Step]) -> list[NDArray[Any]]:
        """What `compute_float` takes after the weights."""
        return [self.border.values.astype(np.int32), *(step.value for step in steps)]

    def products(self, x: Any, weight: Any) -> Any:
        """`Form`'s sum: int32 [pixels, O]."""
        from tvm import te, tirx

        form, channel_words = self.form, int(x.shape[-1])
        depth = int(weight.shape[-1])
        patches = implicit_gemm.patches(x, self.product.geometry, depth)
        k = te.reduce_axis((0, depth), "k")

        def counted(m: Any, o: Any) -> Any:
            def ones(word: Any) -> Any:
                return tirx.Cast("int32", tirx.popcount(word))

            total: Any = 0
            for i, r in enumerate(form.x):
                for j, u in enumerate(form.w):
                    c, b = patches[m, i, k], weight[o, j, k]
                    total = total + ones(c & b if form.operation == "and" else c ^ b) * (r * u)
                if form.counts[i]:
                    total = total + ones(patches[m, i, k]) * form.counts[i]
            return te.sum(total, axis=[k])

        attributes = {
            "operation": form.operation,
            "x": list(form.x),
            "w": list(form.w),
            "counts": list(form.counts),
            "vector": implicit_gemm.vector(channel_words),
        }
        shape = (patches.shape[0], weight.shape[0])
        return te.compute(shape, counted, name=implicit_gemm.BLOCK, attrs=attributes)


def compute_float(
    gemm: Gemm,
    steps: Sequence[Step],
    x: Any,
    weight: Any,
    table: Any,
    *constants: Any,
    finish: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """The sums through the steps and ``finish``: [N, OH, OW, O]. x: uint32 [N, H, W, P, words]."""
    sums = gemm.products(x, weight)

    def value(m: Any, n: Any, h: Any, w: Any, o: Any) -> Any:
        dot = sums[m, o] + gemm.border.at(table, h, w, o)
        dot = dot >> 1 if gemm.form.halved else dot
        return finish(output_transform.emit(steps, constants, dot.astype("float32"), o))

    return implicit_gemm.pixels(value, x.shape[0], gemm.product.geometry, len(gemm.weights))


def bit_threshold(
    values: NDArray[Any], product: Product, operation: Literal["and", "xor"], steps: Sequence[Step]
) -> tuple[Gemm, NDArray[np.int8], NDArray[np.int32]]:
    """The product with the filters that are stored negated (-1), which those are, and the least sums of a 1.

    bit = flip * dot >= at, and a negated filter negates its dot; the border stands on the thresholds' side.
    """
    threshold = output_transform.integer_threshold(steps, len(values), product.limit(values[0].size))
    gemm = Gemm(product, operation, values * threshold.flip.reshape(-1, 1, 1, 1))
    at = threshold.at * (2 if gemm.form.halved else 1)
    least = np.minimum(at - gemm.border.values, _ALWAYS_LESS)
    return gemm, threshold.flip, least.astype(np.int32)


def compute_bits(gemm: Gemm, x: Any, weight: Any, least: Any) -> Any:
    """The next layer's bits, uint32 [N, OH, OW, 1, ceil(O / 32)]. least: of `bit_threshold`."""
    sums = gemm.products(x, weight)
    geometry = gemm.product.geometry

    def bit(n: Any, h: Any, w: Any, _: Any, o: Any) -> Any:
        m = (n * geometry.output[0] + h) * geometry.output[1] + w
        return sums[m, o] >= gemm.border.at(least, h, w, o)

    return bitpack.by_lanes(bit, (int(x.shape[0]), *geometry.output), 1, len(gemm.weights))
