"""Our ONNX domain: four small operators, each with a body of standard operators.

Any runtime that knows local functions runs the files we write, and is the oracle of what we compile. Quantising and
unpacking are operators of their own, followed by a standard Conv or Gemm: n + m operators serve n x m methods.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import FLOAT, UINT8, script
from onnxscript import opset20 as op
from onnxscript.values import Opset

DOMAIN = "ai.crossbit"
VERSION = 1
OPSET = 20
IR_VERSION = 10

_domain = Opset(DOMAIN, VERSION)


@script(_domain, default_opset=op)
def BinarySign(x: FLOAT) -> FLOAT:
    """+1 where x >= 0, else -1 (also for NaN)."""
    zero = op.Constant(value_float=0.0)
    return op.Where(op.GreaterOrEqual(x, zero), op.Constant(value_float=1.0), op.Constant(value_float=-1.0))


@script(_domain, default_opset=op)
def UnpackSigns(words: UINT8, channels: int) -> FLOAT:
    """Words [O, T, ceil(C / 8)], least significant bit first, 1 = +1 -> +-1 [O, C, T]."""
    shifts = op.Cast(op.Constant(value_ints=[0, 1, 2, 3, 4, 5, 6, 7]), to=2)
    one = op.Cast(op.Constant(value_int=1), to=2)
    last = op.Constant(value_ints=[-1])
    bits = op.BitwiseAnd(op.BitShift(op.Unsqueeze(words, last), shifts, direction="RIGHT"), one)
    padded = op.Reshape(bits, op.Constant(value_ints=[0, 0, -1]))
    count = op.Reshape(op.Constant(value_int=channels), op.Constant(value_ints=[1]))
    kept = op.Slice(padded, op.Constant(value_ints=[0]), count, op.Constant(value_ints=[2]))
    signs = op.Sub(op.Mul(op.Cast(kept, to=1), op.Constant(value_float=2.0)), op.Constant(value_float=1.0))
    return op.Transpose(signs, perm=[0, 2, 1])


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


FUNCTIONS = {f.name: f for f in (BinarySign, UnpackSigns, GroupScale, Accumulator)}


def attach(model: ir.Model) -> None:
    """Add the bodies of the domain's operators that ``model`` uses, in place."""
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            function = ir.serde.deserialize_function(FUNCTIONS[node.op_type].to_function_proto())
            function.opset_imports[""] = model.opset_imports[""]  # the checker wants the model's own opset in bodies
            model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION
