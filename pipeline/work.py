"""What every kernel of a network has to do, whatever its schedule: multiply-accumulates, and bytes that come and go."""

from __future__ import annotations

import math
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import TensorLoad
from tvm.s_tir import SBlock

from pipeline import program
from pipeline.artifact import Call, Kind

_REDUCTION = 2


def calls(lowered: tvm.IRModule) -> tuple[Call, ...]:
    """The calls of a module that `compiler.lower` made, in their order. What only renames a tensor is none."""
    functions = program.functions(lowered)
    values = [binding.value for block in lowered["main"].body.blocks for binding in block.bindings]
    found = []
    for value in values:
        if not program.calls_kernel(value):
            continue
        name = value.args[0].name_hint
        kind, macs = products(functions[name])
        tensors = {id(each): each for each in value.args[1].fields}.values()  # what is read twice comes once
        moved = sum(_bytes(each.ty) for each in tensors) + _bytes(value.ty_args[0])
        found.append(Call(kernel=name, kind=kind, macs=macs, bytes=moved))
    return tuple(found)


def products(function: tirx.PrimFunc) -> tuple[Kind, int]:
    """Kind and number of the multiply-accumulates of a function without a schedule; ('', 0) where there are none.

    Kinds: 'binary', a bit of two words whose ones are counted, be it a bit that fills up a word; 'float'; 'integer'.
    """
    found: dict[Kind, int] = {}

    def look(block: Any) -> None:
        if not any(int(variable.iter_type) == _REDUCTION for variable in block.iter_vars):
            return
        times = math.prod(int(variable.dom.extent) for variable in block.iter_vars)

        def popcount(call: Any) -> None:
            if call.op == tvm.ir.Op.get("tirx.popcount") and _loads(call.args[0]) > 1:
                found["binary"] = found.get("binary", 0) + times * tvm.DataType(str(call.args[0].ty.dtype)).bits

        def product(mul: Any) -> None:
            if _loads(mul.a) and _loads(mul.b):
                kind: Kind = "float" if str(mul.ty.dtype).startswith("float") else "integer"
                found[kind] = found.get(kind, 0) + times

        tvm_ffi.structural_walk(block.body, [(tvm.ir.Call, popcount), (tirx.Mul, product)])

    tvm_ffi.structural_walk(function.body, (SBlock, look))
    return max(found.items(), key=lambda item: item[1], default=("", 0))


def _loads(expr: Any) -> int:
    found: list[Any] = []
    tvm_ffi.structural_walk(expr, (TensorLoad, found.append))
    return len(found)


def _bytes(kind: Any) -> int:
    if isinstance(kind, relax.TupleType):
        return sum(map(_bytes, kind.fields))
    bits = tvm.DataType(str(kind.dtype)).bits
    return math.prod(int(extent) for extent in kind.shape) * bits // 8
