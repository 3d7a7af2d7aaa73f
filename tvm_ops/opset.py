"""Our ONNX domain: small operators, each with a body of standard operators.

Any runtime that knows local functions runs the files we write, and is the oracle of what we compile. Quantising and
unpacking are operators of their own, followed by a standard Conv or Gemm: n + m operators serve n x m methods.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript import FLOAT, UINT8, script
from onnxscript import opset20 as op
from onnxscript.values import Opset

DOMAIN = "ai.crossbit"
VERSION = 2
OPSET = 20
IR_VERSION = 10

_domain = Opset(DOMAIN, VERSION)


@script(_domain, default_opset=op)
def BinarySign(x: FLOAT) -> FLOAT:
    """+1 where x >= 0, else -1 (also for NaN)."""
    zero = op.Constant(value_float=0.0)
    return op.Where(op.GreaterOrEqual(x, zero), op.Constant(value_float=1.0), op.Constant(value_float=-1.0))


@script(_domain, default_opset=op)
def Ternarize(x: FLOAT, threshold: FLOAT) -> FLOAT:
    """+1 where x >= threshold, -1 where x <= -threshold, else 0 (also for NaN); threshold [1] >= 0."""
    zero, one = op.Constant(value_float=0.0), op.Constant(value_float=1.0)
    below = op.Where(op.LessOrEqual(x, op.Neg(threshold)), op.Constant(value_float=-1.0), zero)
    return op.Where(op.GreaterOrEqual(x, threshold), one, below)


@script(_domain, default_opset=op)
def QuantizeUnit(x: FLOAT, bits: int) -> FLOAT:
    """[0, 1] to the integers 0 ... 2^bits - 1, half to even, clipped; a NaN is 0."""
    zero, one = op.Constant(value_float=0.0), op.Constant(value_float=1.0)
    most = op.Sub(op.Pow(op.Constant(value_float=2.0), op.Cast(op.Constant(value_int=bits), to=1)), one)
    return op.Where(op.GreaterOrEqual(x, zero), op.Round(op.Mul(op.Min(x, one), most)), zero)


@script(_domain, default_opset=op)
def QuantizeSymmetric(x: FLOAT, bits: int) -> FLOAT:
    """[-1, 1] to the odd integers 1 - 2^bits ... 2^bits - 1, half to even, clipped; a NaN is the lowest."""
    one, two, low = op.Constant(value_float=1.0), op.Constant(value_float=2.0), op.Constant(value_float=-1.0)
    most = op.Sub(op.Pow(two, op.Cast(op.Constant(value_int=bits), to=1)), one)
    level = op.Round(op.Mul(op.Add(op.Min(x, one), one), op.Div(most, two)))
    return op.Where(op.GreaterOrEqual(x, low), op.Sub(op.Mul(level, two), most), op.Neg(most))


@script(_domain, default_opset=op)
def UnpackCodes(words: UINT8, channels: int, ratios: Sequence[int], shift: int) -> FLOAT:
    """Planes of words [P, O, T, ceil(C / 8)], least significant bit first -> integers [O, C, T], see `bitplanes.Code`.

    value = sum_p ratios[p] * bit_p + shift
    """
    shifts = op.Cast(op.Constant(value_ints=[0, 1, 2, 3, 4, 5, 6, 7]), to=2)
    one = op.Cast(op.Constant(value_int=1), to=2)
    last = op.Constant(value_ints=[-1])
    bits = op.BitwiseAnd(op.BitShift(op.Unsqueeze(words, last), shifts, direction="RIGHT"), one)
    padded = op.Reshape(bits, op.Constant(value_ints=[0, 0, 0, -1]))
    count = op.Reshape(op.Constant(value_int=channels), op.Constant(value_ints=[1]))
    kept = op.Slice(padded, op.Constant(value_ints=[0]), count, op.Constant(value_ints=[3]))
    worth = op.Cast(op.Unsqueeze(op.Constant(value_ints=ratios), op.Constant(value_ints=[1, 2, 3])), to=1)
    total = op.ReduceSum(op.Mul(op.Cast(kept, to=1), worth), op.Constant(value_ints=[0]), keepdims=0)
    values = op.Add(total, op.Cast(op.Constant(value_int=shift), to=1))
    return op.Transpose(values, perm=[0, 2, 1])


@script(_domain, default_opset=op)
def StackFilters(bank: FLOAT, words: UINT8, filters: int, segments: int, bits: int) -> FLOAT:
    """Filters [O, S * D, T], each a stack of S out of a shared bank [M, D, T] (arXiv 2010.02778).

    words: a stream of O * S indices into the bank, S to a filter, ``bits`` bits each, least significant bit first.
    """
    shifts = op.Cast(op.Constant(value_ints=[0, 1, 2, 3, 4, 5, 6, 7]), to=2)
    one = op.Cast(op.Constant(value_int=1), to=2)
    last = op.Constant(value_ints=[-1])
    stream = op.Reshape(op.BitwiseAnd(op.BitShift(op.Unsqueeze(words, last), shifts, direction="RIGHT"), one), last)
    n, s, b = (
        op.Reshape(op.Constant(value_int=filters), op.Constant(value_ints=[1])),
        op.Reshape(op.Constant(value_int=segments), op.Constant(value_ints=[1])),
        op.Reshape(op.Constant(value_int=bits), op.Constant(value_ints=[1])),
    )
    used = op.Slice(stream, op.Constant(value_ints=[0]), op.Mul(op.Mul(n, s), b), op.Constant(value_ints=[0]))
    digits = op.Cast(op.Reshape(used, op.Concat(last, b, axis=0)), to=1)
    places = op.Range(op.Constant(value_int=0), op.Constant(value_int=bits), op.Constant(value_int=1))
    worth = op.Pow(op.Constant(value_float=2.0), op.Cast(places, to=1))
    indices = op.Cast(op.ReduceSum(op.Mul(digits, worth), last, keepdims=0), to=7)
    taps = op.Shape(bank, start=2, end=3)
    return op.Reshape(op.Gather(bank, indices), op.Concat(n, last, taps, axis=0))


@script(_domain, default_opset=op)
def GroupScale(scale: FLOAT, group: int, filters: int) -> FLOAT:
    """Scales [ceil(O / M)] of M neighbouring filters -> one per filter [O]."""
    last = op.Constant(value_ints=[-1])
    repeats = op.Concat(
        op.Constant(value_ints=[1]), op.Reshape(op.Constant(value_int=group), op.Constant(value_ints=[1])), axis=0
    )
    every = op.Reshape(op.Expand(op.Unsqueeze(scale, last), repeats), last)
    count = op.Reshape(op.Constant(value_int=filters), op.Constant(value_ints=[1]))
    return op.Slice(every, op.Constant(value_ints=[0]), count, op.Constant(value_ints=[0]))


@script(_domain, default_opset=op)
def Accumulator(x: FLOAT) -> FLOAT:
    """The integer sum a convolution of codes made, as float.

    The identity on integers below 2^24. The cast keeps a runtime from folding the scale that follows into the
    weights, which would round every product and lose the equality of all that run this file.
    """
    return op.Cast(op.Cast(x, to=6), to=1)


FUNCTIONS = {
    f.name: f
    for f in (
        BinarySign,
        Ternarize,
        QuantizeUnit,
        QuantizeSymmetric,
        UnpackCodes,
        StackFilters,
        GroupScale,
        Accumulator,
    )
}


def attach(model: ir.Model) -> None:
    """Add the bodies of the domain's operators that ``model`` uses, in place."""
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            function = ir.serde.deserialize_function(FUNCTIONS[node.op_type].to_function_proto())
            function.opset_imports[""] = model.opset_imports[""]  # the checker wants the model's own opset in bodies
            model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION
