"""What a tensor is known to be while a network is imported, before any code exists for it.

A convolution of codes is first only a `Sum`; scales, biases, batch norms and ReLUs pile up behind it as steps; and
what is emitted is decided by who asks. A float consumer asks ``real()`` and gets one kernel, sum and steps. A sign
asks ``words()`` and gets one kernel that compares the integer sum with a threshold: no float tensor is ever made.
This is where batch norm + scale + sign become integer thresholds; nothing has to be matched or rewritten.

Real tensors of rank 4 lie channels last (NHWC); shapes here are the file's (NCHW).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, te, tirx, topi

from targets import Target
from tvm_ops import output_transform
from tvm_ops.bitplanes import BINARY, TERNARY, WORD_BITS, Code, pack
from tvm_ops.ops import (
    binary_max_pool2d,
    bitpack,
    bitserial_conv2d,
    bitserial_gemm,
    bitweight_conv2d,
    byte_conv2d,
    float_conv2d,
    implicit_gemm,
    max_pool2d,
    pooled_conv2d,
    stacked_conv2d,
)
from tvm_ops.ops.bitserial_conv2d import Border, Geometry, Product
from tvm_ops.ops.stacked_conv2d import Stack
from tvm_ops.output_transform import Step

# TVM's OpPatternKind: what follows may be fused to it; nothing may.
OUT_ELEMENTWISE_FUSABLE, OPAQUE = 4, 8

_POOLED_VECTORS = 2  # of filters of `ByteSum.pooled`: as many as a block of floats has

Shape = tuple[int, ...]
Array = NDArray[Any]
Finish = Callable[..., Any]  # a last expression of a kernel, such as the pattern of a code


def _as_it_is(value: Any) -> Any:
    return value


@dataclass
class Emitter:
    """Emits kernels for a target into a Relax function."""

    builder: relax.BlockBuilder
    target: Target

    def te(self, kind: str, compute: Callable[..., Any], *args: relax.Expr | Array, **attributes: int) -> relax.Expr:
        """One kernel; arrays become constants of the library.

        ``attributes`` tell TVM what it cannot see in a packing: op_pattern to FuseOps, estimated_flops to MetaSchedule;
        and joins to `compiler.fuse_packings`.
        """
        tensors = [relax.const(a) if isinstance(a, np.ndarray) else a for a in args]
        return self.builder.emit_te(compute, *tensors, primfunc_name_hint=kind, primfunc_attrs=attributes)

    def op(self, expr: relax.Expr) -> relax.Expr:
        """A Relax operator."""
        return self.builder.emit(self.builder.normalize(expr))

    def source(self, x: relax.Expr) -> tuple[relax.Expr, Finish]:
        """What a kernel reads to have a tensor [N, H, W, C], and how it makes that: of planes, if `op` did."""
        made = self.builder.lookup_binding(x) if isinstance(x, relax.Var) else None
        transposition = tvm.ir.Op.get("relax.permute_dims")
        if isinstance(made, relax.Call) and made.op == transposition and list(made.attrs.axes) == [0, 2, 3, 1]:
            return made.args[0], lambda planes: topi.transpose(planes, [0, 2, 3, 1])
        return x, _as_it_is


class Value(Protocol):
    """A tensor of the network."""

    @property
    def shape(self) -> Shape:
        """The file's."""

    def real(self) -> relax.Expr:
        """The float tensor, emitted once."""


@dataclass(frozen=True, eq=False)
class Real:
    """A float tensor that exists."""

    emitter: Emitter
    expr: relax.Expr
    shape: Shape

    def real(self) -> relax.Expr:
        return self.expr

    def words(self, steps: Sequence[Step]) -> relax.Expr:
        """The bits of its sign after ``steps``."""
        target = self.emitter.target
        threshold = output_transform.float_threshold(steps, self.shape[1])
        compute = bitpack.compute if target.gpu is None else bitpack.compute_by_lanes
        # Where a comparison gives a bit a lane (AVX-512), two are a word. AVX2 narrows four to bytes, which takes as
        # long beside other work as in a kernel of its own.
        joins = {"joins": 1} if target.sign_bits and 2 * target.lanes == WORD_BITS else {}
        bounds = bitpack.constants(threshold)
        return self.emitter.te("bitpack", compute, self.expr, *bounds, op_pattern=OPAQUE, **joins)

    def stepped(self, steps: Sequence[Step], finish: Finish = _as_it_is) -> relax.Expr:
        if not steps and finish is _as_it_is:
            return self.expr

        def compute(x: Any, *constants: Any) -> Any:
            return te.compute(
                x.shape, lambda *i: finish(output_transform.emit(steps, constants, x[i], i[-1])), name="transformed"
            )

        return self.emitter.te("transform", compute, self.expr, *(step.value for step in steps))


@dataclass(frozen=True, eq=False)
class Sum:
    """The integer sums of a convolution of codes with weights, integers [O, C, KH, KW] of ``code``.

    Raises:
        ValueError: sums that float32 cannot hold.
    """

    emitter: Emitter
    codes: Codes
    weights: Array
    code: Code
    geometry: Geometry
    shape: Shape

    def __post_init__(self) -> None:
        limit = self.product.limit(self.weights[0].size)
        if limit >= 1 << 24:
            raise ValueError(f"its sums may reach {limit}, and float32 holds integers only to 2^24: use fewer bits")

    @property
    def product(self) -> Product:
        return Product(self.geometry, self.codes.code, self.code)

    _kind: ClassVar[str] = "bitserial_conv2d"

    def _border(self, values: Array, product: Product) -> Border:
        return bitserial_conv2d.border(values, product)

    def _sums(self, x: Any, weight: Any) -> Any:
        return bitserial_conv2d.popcounts(x, weight, self.product)

    def words(self, steps: Sequence[Step]) -> relax.Expr:
        if self.emitter.target.gpu is not None:
            return self._words_by_gemm(steps)
        flip, edge, bounds = bitserial_conv2d.bit_threshold(self.weights, self.product, steps, self._border)
        weight, unpack = self._weight(flip, bounds.shape[-1])
        most = bitserial_conv2d.octet_thresholds(bounds, self.product) if weight[0].dtype == np.uint8 else bounds

        def compute(x: Any, *tensors: Any) -> Any:
            stored, rest = tensors[: len(weight)], tensors[len(weight) :]
            return bitserial_conv2d.compute_bits(self.product, edge, self._sums(x, unpack(*stored)), *rest)

        x, rest = self._operands()
        kind = f"{self._kind}_bits"
        return self.emitter.te(kind, compute, x, *weight, *rest, most, op_pattern=OPAQUE, estimated_flops=self._flops)

    @property
    def _flops(self) -> int:
        return 2 * self.weights[0].size * int(np.prod(self.shape))

    def stepped(self, steps: Sequence[Step], finish: Finish = _as_it_is) -> relax.Expr:
        if self.emitter.target.gpu is not None:
            return self._stepped_by_gemm(steps, finish)
        edge = self._border(self.weights, self.product)
        filters = len(self.weights)
        weight, unpack = self._weight(np.ones(filters, np.int8), filters)
        constants = bitserial_conv2d.float_constants(edge, steps)

        def compute(x: Any, *tensors: Any) -> Any:
            stored, rest = tensors[: len(weight)], tensors[len(weight) :]
            sums = self._sums(x, unpack(*stored))
            return bitserial_conv2d.compute_float(self.product, edge, steps, sums, *rest, finish=finish)

        x, rest = self._operands()
        out = self.emitter.te(self._kind, compute, x, *weight, *rest, *constants, op_pattern=OUT_ELEMENTWISE_FUSABLE)
        return _from_pixels(self.emitter, out, self.shape)

    def _words_by_gemm(self, steps: Sequence[Step]) -> relax.Expr:
        gemm, flip, least = bitserial_gemm.bit_threshold(self.weights, self.product, self._operation, steps)
        rows, unpack = self._rows(gemm, flip)

        def compute(x: Any, *tensors: Any) -> Any:
            return bitserial_gemm.compute_bits(gemm, x, unpack(*tensors[:-1]), tensors[-1])

        return self.emitter.te(
            "bitserial_gemm_bits",
            compute,
            self._words(),
            *rows,
            least,
            op_pattern=OPAQUE,
            estimated_flops=self._flops,
        )

    def _stepped_by_gemm(self, steps: Sequence[Step], finish: Finish) -> relax.Expr:
        gemm = bitserial_gemm.Gemm(self.product, self._operation, self.weights)
        rows, unpack = self._rows(gemm, np.ones(len(self.weights), np.int8))
        constants = gemm.float_constants(steps)

        def compute(x: Any, *tensors: Any) -> Any:
            stored, rest = tensors[: len(rows)], tensors[len(rows) :]
            return bitserial_gemm.compute_float(gemm, steps, x, unpack(*stored), *rest, finish=finish)

        out = self.emitter.te(
            "bitserial_gemm", compute, self._words(), *rows, *constants, op_pattern=OUT_ELEMENTWISE_FUSABLE
        )
        return _from_pixels(self.emitter, out, self.shape)

    @property
    def _operation(self) -> Any:
        pixels = self.shape[0] * int(np.prod(self.geometry.output))
        return bitserial_gemm.operation(self.emitter.target, pixels)

    def _rows(self, gemm: bitserial_gemm.Gemm, flip: Array) -> tuple[list[Array], Finish]:
        """What is stored of the weights of a GPU's kernel, and how it makes their words of it."""
        return [gemm.words()], lambda weight: weight

    def _weight(self, flip: Array, filters: int) -> tuple[list[Array], Finish]:
        """What is stored of the weights, negated where ``flip`` < 0 and filled up to ``filters``, and how kernels make
        their words of it."""
        words = bitserial_conv2d.pack_weight(self.weights * flip.reshape(-1, 1, 1, 1), self.code)
        words = np.pad(words, [*[(0, 0)] * 4, (0, filters - len(flip))])
        counter = self.emitter.target.byte_counter
        fits = bitserial_conv2d.fits_octets(self.product, self.weights[0].size)
        if counter is None or filters % counter.octets or not fits:
            return [words], lambda weight: weight
        return [bitserial_conv2d.octets(words, counter.octets, self.product.planes)], lambda weight: weight

    def _words(self) -> relax.Expr:
        return self.codes.words()

    def _operands(self) -> tuple[relax.Expr, list[relax.Expr]]:
        """The words, and what of them is not 0 where that matters."""
        words = self._words()
        if not self.product.nonzeros:
            return words, []

        def compute(x: Any) -> Any:
            return bitserial_conv2d.nonzeros(x, self.product)

        return words, [self.emitter.te("nonzeros", compute, words)]


@dataclass(frozen=True, eq=False)
class ByteSum(Sum):
    """The same sums by products of bytes."""

    form: byte_conv2d.Form

    _kind: ClassVar[str] = "byte_conv2d"

    def _border(self, values: Array, product: Product) -> Border:
        return bitserial_conv2d.shifted(values, product)

    def _sums(self, x: Any, weight: Any) -> Any:
        return byte_conv2d.sums(x, weight, self.product, self.form)

    def _weight(self, flip: Array, filters: int) -> tuple[list[Array], Finish]:
        values = self.weights * flip.reshape(-1, 1, 1, 1)
        values = np.pad(values, [(0, filters - len(flip)), (0, 0), (0, 0), (0, 0)])
        return [byte_conv2d.pack_weight(values, self.form)], lambda weight: weight

    def _words(self) -> relax.Expr:
        return _as_map(self.emitter, self.codes.patterns(), self.codes.shape)

    def pooled(self, steps: Sequence[Step], pool: Geometry) -> relax.Expr | None:
        """As `FloatSum.pooled`. The steps come last: filters of which they descend are stored negated."""
        flip = np.where(output_transform.direction(steps, len(self.weights)) < 0, -1, 1).astype(np.int8)
        weights = self.weights * flip.reshape(-1, 1, 1, 1)
        packed = byte_conv2d.pack_weight(weights, self.form, _POOLED_VECTORS)
        _, kh, groups, width = packed.shape
        instructions = kh * groups * self.form.instructions
        rows = _strip(self.emitter.target, pool, len(flip), width // self.form.group, instructions)
        if not rows or not output_transform.finite(steps, self.product.limit(weights[0].size)):
            return None
        edge = self._border(weights, self.product)
        x, image = self._image()

        def compute(x: Any, weight: Any, table: Any) -> Any:
            def sums(window: Geometry, strips: Any) -> Any:
                return byte_conv2d.sums(strips, weight, replace(self.product, geometry=window), self.form)

            def dot(value: Any, row: Any, column: Any, channel: Any) -> Any:
                return (edge.at(table, row, column, channel) - self.product.factor * value).astype("float32")

            return pooled_conv2d.compute(self.geometry, pool, rows, image(x), sums, dot)

        table = edge.values.astype(np.int32)
        out = self.emitter.te("pooled_byte_conv2d", compute, x, packed, table, op_pattern=OUT_ELEMENTWISE_FUSABLE)
        unflip = [Step("mul", flip.astype(np.float32))] if (flip < 0).any() else []
        return Real(self.emitter, out, (*self.shape[:2], *pool.output)).stepped([*unflip, *steps])

    def _image(self) -> tuple[relax.Expr, Finish]:
        """What a kernel reads to have the patterns, and how it makes them: of floats that exist, without a kernel."""
        codes, base = self.codes, self.codes.of.base
        if codes.of.steps or not isinstance(base, Real):
            return codes.patterns(), _as_it_is
        x, image = self.emitter.source(base.expr)

        def patterns(x: Any) -> Any:
            floats = image(x)
            return te.compute(floats.shape, lambda *i: codes.pattern(floats[i]), name="patterns")

        return x, patterns


@dataclass(frozen=True, eq=False)
class StackedSum(Sum):
    """The sums of a convolution with stacked filters, ``weights`` being what they expand to; stored is the stack."""

    stack: Stack

    def words(self, steps: Sequence[Step]) -> relax.Expr:
        if self.stack.selects:
            return Real(self.emitter, self.stepped(()), self.shape).words(steps)
        return super().words(steps)

    def stepped(self, steps: Sequence[Step], finish: Finish = _as_it_is) -> relax.Expr:
        if not self.stack.selects:
            return super().stepped(steps, finish)
        stack, codes = self.stack, self.codes
        parts = replace(codes, _words=[self._split()])
        images = (stack.segments * self.shape[0], len(stack.bank), *self.shape[2:])
        maps = Sum(self.emitter, parts, stack.bank.astype(np.int64), BINARY, self.geometry, images).stepped(())

        def compute(*tensors: Any) -> Any:
            return stacked_conv2d.select(stack, steps, *tensors, finish=finish)

        return self.emitter.te("select", compute, maps, stack.stream(), *(step.value for step in steps))

    def _split(self) -> relax.Expr:
        def compute(x: Any) -> Any:
            return stacked_conv2d.split(x, self.stack.channels, self.stack.segments)

        return self.emitter.te("split", compute, self.codes.words())

    def _weight(self, flip: Array, filters: int) -> tuple[list[Array], Finish]:
        stack = self.stack
        words = np.zeros(filters, np.uint32)
        words[: len(flip)] = np.where(flip < 0, 0xFFFFFFFF, 0)
        arrays: list[Array] = [bitserial_conv2d.pack_weight(stack.bank), stack.stream(), words]
        return arrays, lambda bank, stream, flipped: stacked_conv2d.expand(stack, bank, stream, flipped)

    def _rows(self, gemm: bitserial_gemm.Gemm, flip: Array) -> tuple[list[Array], Finish]:
        stack = self.stack
        words = np.where(flip < 0, 0xFFFFFFFF, 0).astype(np.uint32)
        arrays: list[Array] = [stacked_conv2d.bank_rows(stack), stack.stream(), words]
        return arrays, lambda bank, stream, flipped: stacked_conv2d.expand_rows(stack, bank, stream, flipped)

    def _words(self) -> relax.Expr:
        """Every segment in words of its own."""
        if self.stack.channels % WORD_BITS == 0:
            return self.codes.words()

        def compute(parts: Any) -> Any:
            return stacked_conv2d.join(parts, self.stack.segments)

        return self.emitter.te("join", compute, self._split())


@dataclass(frozen=True, eq=False)
class RealSum:
    """The float sums of a convolution of real activations with weights of a few bits."""

    emitter: Emitter
    of: Value
    weights: bitweight_conv2d.Weights
    geometry: Geometry
    shape: Shape

    def words(self, steps: Sequence[Step]) -> relax.Expr:
        return Real(self.emitter, self.stepped(()), self.shape).words(steps)

    def stepped(self, steps: Sequence[Step], finish: Finish = _as_it_is) -> relax.Expr:
        x = _as_map(self.emitter, self.of.real(), self.of.shape)
        out = self._sums(x, steps, finish) if self.emitter.target.gpu is None else self._gemm(x, steps, finish)
        return _from_pixels(self.emitter, out, self.shape)

    def _gemm(self, x: relax.Expr, steps: Sequence[Step], finish: Finish) -> relax.Expr:
        def compute(*tensors: Any) -> Any:
            return implicit_gemm.compute_few_bits(self.geometry, self.weights, steps, *tensors, finish=finish)

        words, constants = implicit_gemm.few_bit_words(self.weights), [step.value for step in steps]
        return self.emitter.te("bitweight_gemm", compute, x, words, *constants, op_pattern=OUT_ELEMENTWISE_FUSABLE)

    def _sums(self, x: relax.Expr, steps: Sequence[Step], finish: Finish) -> relax.Expr:
        missing = -self.weights.filters % WORD_BITS

        def compute(*tensors: Any) -> Any:
            return bitweight_conv2d.compute(self.geometry, self.weights, steps, *tensors, finish=finish)

        constants = [np.pad(step.value, (0, missing)) for step in steps]
        out = self.emitter.te(
            "bitweight_conv2d", compute, x, self.weights.words(), *constants, op_pattern=OUT_ELEMENTWISE_FUSABLE
        )
        if missing:
            out = self.emitter.op(relax.op.strided_slice(out, [3], [0], [self.weights.filters]))
        return out


@dataclass(frozen=True, eq=False)
class FloatSum:
    """The float sums of a convolution, or of [N, C] of a matrix product, with float weights [O, C, KH, KW]."""

    emitter: Emitter
    of: Value
    weights: Array
    geometry: Geometry
    shape: Shape

    def words(self, steps: Sequence[Step]) -> relax.Expr:
        return Real(self.emitter, self.stepped(()), self.shape).words(steps)

    def stepped(self, steps: Sequence[Step], finish: Finish = _as_it_is) -> relax.Expr:
        if self.emitter.target.gpu is None:
            return Real(self.emitter, self._sums, self.shape).stepped(steps, finish)

        def compute(*tensors: Any) -> Any:
            return implicit_gemm.compute(self.geometry, steps, *tensors, finish=finish)

        x = _as_map(self.emitter, self.of.real(), self.of.shape)
        rows, constants = implicit_gemm.rows(self.weights), [step.value for step in steps]
        out = self.emitter.te("gemm", compute, x, rows, *constants, op_pattern=OUT_ELEMENTWISE_FUSABLE)
        return _from_pixels(self.emitter, out, self.shape)

    @cached_property
    def _sums(self) -> relax.Expr:
        dense = len(self.shape) == 2

        def compute(*tensors: Any) -> Any:
            if dense:
                return float_conv2d.compute_dense(self.shape[1], *tensors)
            return float_conv2d.compute(self.geometry, self.shape[1], *tensors)

        kind, packed = "dense" if dense else "conv2d", float_conv2d.pack_weight(self.weights)
        return self.emitter.te(kind, compute, self.of.real(), packed, op_pattern=OUT_ELEMENTWISE_FUSABLE)

    def pooled(self, steps: Sequence[Step], pool: Geometry) -> relax.Expr | None:
        """The maximum over windows of what ``steps`` make of the sums, in one kernel; None: two are better."""
        filters = len(self.weights)
        rows = _strip(self.emitter.target, pool, filters, float_conv2d.FILTERS, self.weights[0].size)
        if not rows:
            return None
        x, image = self.emitter.source(self.of.real())

        def compute(x: Any, weight: Any, *constants: Any) -> Any:
            def sums(window: Geometry, strips: Any) -> Any:
                return float_conv2d.compute(window, filters, strips, weight)

            def made(value: Any, _row: Any, _column: Any, channel: Any) -> Any:
                return output_transform.emit(steps, constants, value, channel)

            return pooled_conv2d.compute(self.geometry, pool, rows, image(x), sums, made)

        packed, constants = float_conv2d.pack_weight(self.weights), [step.value for step in steps]
        return self.emitter.te("pooled_conv2d", compute, x, packed, *constants, op_pattern=OUT_ELEMENTWISE_FUSABLE)


def _strip(target: Target, pool: Geometry, filters: int, block: int, products: int) -> int:
    """`pooled_conv2d.strip` where it was measured: on CPUs with AVX-512. AVX2 sums half as fast, and what is summed
    twice costs what is gained."""
    measured = target.sign_bits and target.vector_bits == 512
    return pooled_conv2d.strip(pool, filters, block, products) if measured else 0


def _as_map(emitter: Emitter, x: relax.Expr, shape: Shape) -> relax.Expr:
    """[N, C] as a map of one pixel; a map as it is."""
    return emitter.op(relax.op.reshape(x, (shape[0], 1, 1, shape[1]))) if len(shape) == 2 else x


def _from_pixels(emitter: Emitter, out: relax.Expr, shape: Shape) -> relax.Expr:
    """A map as a tensor of ``shape``: as it is, or one of 1x1 pixels as [N, C]."""
    return emitter.op(relax.op.reshape(out, shape)) if len(shape) == 2 else out


@dataclass(frozen=True, eq=False)
class MaxPool:
    """The maximum over windows of a tensor that has not been asked for yet."""

    emitter: Emitter
    of: Channelwise
    geometry: Geometry
    shape: Shape

    def words(self, steps: Sequence[Step]) -> relax.Expr:
        """Signs first, 32 channels a word, then the maximum of signs."""
        descends = output_transform.direction(steps, self.shape[1]) < 0
        words = replace(self.of, steps=(*self.of.steps, *steps)).words()
        invert = pack(descends)

        def compute(x: Any, mask: Any) -> Any:
            return binary_max_pool2d.compute(self.geometry, x, mask)

        return self.emitter.te("binary_max_pool2d", compute, words, invert)

    def stepped(self, steps: Sequence[Step], finish: Finish = _as_it_is) -> relax.Expr:
        return Real(self.emitter, self._pooled, self.shape).stepped(steps, finish)

    @cached_property
    def _pooled(self) -> relax.Expr:
        base, steps = self.of.base, self.of.steps
        with_sums = base.pooled(steps, self.geometry) if isinstance(base, FloatSum | ByteSum) else None
        if with_sums is not None:
            return with_sums
        return self.emitter.te("max_pool2d", lambda x: max_pool2d.compute(self.geometry, x), self.of.real())


@dataclass(frozen=True, eq=False)
class Channelwise:
    """A base and the per-channel steps behind it."""

    base: Real | Sum | RealSum | FloatSum | MaxPool
    steps: tuple[Step, ...] = ()

    @property
    def shape(self) -> Shape:
        return self.base.shape

    def then(self, *steps: Step) -> Channelwise:
        return replace(self, steps=(*self.steps, *steps))

    def real(self) -> relax.Expr:
        return self._real

    @cached_property
    def _real(self) -> relax.Expr:
        return self.base.stepped(self.steps)

    def words(self) -> relax.Expr:
        return self.base.words(self.steps)

    def finished(self, finish: Finish) -> relax.Expr:
        """Another tensor of the same shape: ``finish`` of every element."""
        return self.base.stepped(self.steps, finish)


@dataclass(eq=False)
class Codes:
    """The integer codes of a tensor, by ``pattern``. Its words are uint32 [N, H, W, P, ceil(C / 32)].

    pattern: a float -> the uint8 whose bit p goes to plane p, see `tvm_ops.ops.quantize`.
    """

    emitter: Emitter
    of: Channelwise
    code: Code
    pattern: Finish
    _words: list[relax.Expr] = field(default_factory=list)
    _patterns: list[relax.Expr] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        return self.of.shape

    def words(self) -> relax.Expr:
        if not self._words:
            words = self._packed()
            if len(self.shape) == 2:  # a dense layer is a convolution of a 1x1 image
                words_of = -(-self.shape[1] // WORD_BITS)
                words = self.emitter.op(relax.op.reshape(words, (self.shape[0], 1, 1, self.code.bits, words_of)))
            self._words.append(words)
        return self._words[0]

    def patterns(self) -> relax.Expr:
        """uint8, in the shape of the floats."""
        if not self._patterns:
            self._patterns.append(self.of.finished(self.pattern))
        return self._patterns[0]

    def _packed(self) -> relax.Expr:
        def compute(x: Any) -> Any:
            pack = bitpack.compute_planes if self.emitter.target.gpu is None else bitpack.compute_planes_by_lanes
            return pack(x, self.code.bits)

        return self.emitter.te("bitpack_planes", compute, self.patterns(), op_pattern=OPAQUE)

    def real(self) -> relax.Expr:
        """The integers as floats, for a layer whose weights are none."""

        def value(x: Any) -> Any:
            bits = self.pattern(x)
            if self.code == TERNARY:
                plus, minus, zero = (tirx.const(v, "float32") for v in (1.0, -1.0, 0.0))
                return tirx.Select(bits == 3, plus, tirx.Select(bits == 2, minus, zero))
            ratio = tirx.const(float(self.code.ratios[0]), "float32")
            return tirx.Cast("float32", bits) * ratio + tirx.const(float(self.code.shift), "float32")

        return self.of.finished(value)

    def like(self, of: Channelwise) -> Codes:
        """The codes of another tensor."""
        return Codes(self.emitter, of, self.code, self.pattern)


@dataclass(eq=False)
class Signs(Codes):
    """The +-1 codes of a tensor, by threshold: BN, scale and sign behind an integer sum are one comparison."""

    code: Code = BINARY
    pattern: Finish = _as_it_is

    def _packed(self) -> relax.Expr:
        return self.of.words()

    def like(self, of: Channelwise) -> Codes:
        return Signs(self.emitter, of)

    def real(self) -> relax.Expr:
        """+-1 as floats, for a layer whose weights are not +-1."""

        def compute(x: Any) -> Any:
            one = tirx.const(1.0, "float32")
            return te.compute(x.shape, lambda *i: tirx.if_then_else(x[i] >= 0.0, one, -one), name="sign")

        return self.emitter.te("sign", compute, self.of.real())


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor known now."""

    array: Array

    @property
    def shape(self) -> Shape:
        return self.array.shape

    def real(self) -> relax.Expr:
        lying = self.array.transpose(0, 2, 3, 1) if self.array.ndim == 4 else self.array
        return relax.const(np.ascontiguousarray(lying))


@dataclass(frozen=True, eq=False)
class Stacked(Constant):
    """Signs that are stacked filters."""

    stack: Stack
