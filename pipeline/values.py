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
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tvm import relax, te, tirx

from tvm_ops import output_transform
from tvm_ops.bitplanes import WORD_BITS, pack
from tvm_ops.ops import binary_max_pool2d, bitpack, bitserial_conv2d
from tvm_ops.ops.bitserial_conv2d import Geometry
from tvm_ops.output_transform import Step

# TVM's OpPatternKind: what follows may be fused to it; nothing may.
OUT_ELEMENTWISE_FUSABLE, OPAQUE = 4, 8

Shape = tuple[int, ...]
Array = NDArray[Any]


@dataclass
class Emitter:
    """Emits kernels into a Relax function."""

    builder: relax.BlockBuilder

    def te(self, kind: str, compute: Callable[..., Any], *args: relax.Expr | Array, **attributes: int) -> relax.Expr:
        """One kernel; arrays become constants of the library.

        ``attributes`` tell TVM what it cannot see in a packing: op_pattern to FuseOps, estimated_flops to MetaSchedule.
        """
        tensors = [relax.const(a) if isinstance(a, np.ndarray) else a for a in args]
        return self.builder.emit_te(compute, *tensors, primfunc_name_hint=kind, primfunc_attrs=attributes)

    def op(self, expr: relax.Expr) -> relax.Expr:
        """A Relax operator."""
        return self.builder.emit(self.builder.normalize(expr))


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
        threshold = output_transform.float_threshold(steps, self.shape[1])
        return self.emitter.te("bitpack", bitpack.compute, self.expr, *bitpack.constants(threshold), op_pattern=OPAQUE)

    def stepped(self, steps: Sequence[Step]) -> relax.Expr:
        if not steps:
            return self.expr

        def compute(x: Any, *constants: Any) -> Any:
            return te.compute(
                x.shape, lambda *i: output_transform.emit(steps, constants, x[i], i[-1]), name="transformed"
            )

        return self.emitter.te("transform", compute, self.expr, *(step.value for step in steps))


@dataclass(frozen=True, eq=False)
class Sum:
    """The integer sums of a convolution of codes with +-1 weights, signs [O, C, KH, KW]."""

    emitter: Emitter
    codes: Signs
    signs: Array
    geometry: Geometry
    shape: Shape

    def words(self, steps: Sequence[Step]) -> relax.Expr:
        weight, edge, most = bitserial_conv2d.bit_weight(self.signs, self.geometry, steps)

        def compute(*tensors: Any) -> Any:
            return bitserial_conv2d.compute_bits(self.geometry, edge, *tensors)

        operations = 2 * self.signs[0].size * int(np.prod(self.shape))
        words = self.codes.words()
        return self.emitter.te(
            "bitserial_conv2d_bits", compute, words, weight, most, op_pattern=OPAQUE, estimated_flops=operations
        )

    def stepped(self, steps: Sequence[Step]) -> relax.Expr:
        edge = bitserial_conv2d.border(self.signs, self.geometry)
        weight = bitserial_conv2d.pack_weight(self.signs)
        constants = bitserial_conv2d.float_constants(edge, steps)

        def compute(*tensors: Any) -> Any:
            return bitserial_conv2d.compute_float(self.geometry, edge, steps, *tensors)

        words = self.codes.words()
        out = self.emitter.te(
            "bitserial_conv2d", compute, words, weight, *constants, op_pattern=OUT_ELEMENTWISE_FUSABLE
        )
        return self.emitter.op(relax.op.reshape(out, self.shape)) if len(self.shape) == 2 else out


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

    def stepped(self, steps: Sequence[Step]) -> relax.Expr:
        g = self.geometry
        pooled = relax.op.nn.max_pool2d(
            self.of.real(), g.kernel, g.strides, list(g.pads), g.dilations, layout="NHWC", out_layout="NHWC"
        )
        out = self.emitter.op(pooled)
        return Real(self.emitter, out, self.shape).stepped(steps)


@dataclass(frozen=True, eq=False)
class Channelwise:
    """A base and the per-channel steps behind it."""

    base: Real | Sum | MaxPool
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


@dataclass(eq=False)
class Signs:
    """The +-1 codes of a tensor. Its words are uint32 [N, H, W, ceil(C / 32)]."""

    emitter: Emitter
    of: Channelwise
    _words: list[relax.Expr] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        return self.of.shape

    def words(self) -> relax.Expr:
        if not self._words:
            words = self.of.words()
            if len(self.shape) == 2:  # a dense layer is a convolution of a 1x1 image
                words = self.emitter.op(relax.op.reshape(words, (self.shape[0], 1, 1, -(-self.shape[1] // WORD_BITS))))
            self._words.append(words)
        return self._words[0]

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
