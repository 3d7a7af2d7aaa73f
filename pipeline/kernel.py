"""A scheduled TIR function as plain functions: pointers in, no runtime, temporaries from the caller.

TVM's own lowering makes functions of packed arguments that check types, allocate and may raise. Here the same passes
run but those, and what a kernel needs becomes parameters: large temporaries, and where it is parallel, the range of
the loop that one call does. A kernel with parallel loops is cut there into parts, to be run one after the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import PointerType, PrimType, TensorLoad
from tvm.tirx.buffer import BufferType

from pipeline.workspace import aligned


@dataclass(frozen=True)
class Temporary:
    """Scratch memory of a kernel: ``size`` bytes, or of each worker where it is used inside a parallel loop."""

    size: int
    each_worker: bool


@dataclass(frozen=True)
class Part:
    """A function int32 f(tensor pointers, temporary pointers[, begin, end, worker]) that returns 0.

    extent: how long its parallel loop is, of which a call does [begin, end); None: it has none.
    """

    function: tirx.PrimFunc
    extent: int | None

    @property
    def symbol(self) -> str:
        return str(self.function.attrs["global_symbol"])


@dataclass(frozen=True)
class Kernel:
    """What one scheduled function became: parts to be run in this order, all on the same pointers."""

    parts: tuple[Part, ...]
    temporaries: tuple[Temporary, ...]


def make(functions: dict[str, tirx.PrimFunc], prefix: str, target: Any, stack_limit: int) -> dict[str, Kernel]:
    """Kernels of scheduled functions by their names.

    Args:
        prefix: of every symbol.
        target: TVM's target, whose intrinsics are used.
        stack_limit: bytes up to which a temporary stays on the stack: what fits the registers must, to get there.
    """
    lowered = tirx.transform.BindTarget(target.with_host(target))(
        tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    )
    lowered = _PASSES(lowered)
    return {
        name: _cut(f"{prefix}_k{i}_" + re.sub(r"\W+", "_", name)[:40], lowered[name], target, stack_limit)
        for i, name in enumerate(sorted(functions))
    }


def module(parts: Iterable[Part]) -> tvm.IRModule:
    """The functions of parts, ready for a code generator."""
    return tirx.transform.LowerIntrin()(tvm.IRModule({part.symbol: part.function for part in parts}))


# Those of `tvm.s_tir.pipeline.default_s_tir_pipeline` that concern a CPU, up to where it makes packed functions.
_PASSES = tvm.transform.Sequential(
    [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.AnnotateIrregularLoop(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.VerifyMemory(),
        tirx.transform.SkipAssert(),
    ]
)


def _cut(symbol: str, function: tirx.PrimFunc, target: Any, stack_limit: int) -> Kernel:
    pointers, declarations = [], []
    for parameter in function.params:
        assert isinstance(parameter.ty, BufferType)
        pointer = tirx.Var(f"{parameter.name}_data", PointerType(PrimType(str(parameter.ty.dtype))))
        pointers.append(pointer)
        declarations.append(tirx.DeclBuffer(parameter, data=pointer))
    worker = tirx.Var("worker", "int32")
    body, temporaries = _hoist(function.body, worker, stack_limit)
    pointers += [pointer for pointer, _ in temporaries]
    attributes = {"tirx.noalias": True, "target": target}

    def made(statements: list[Any], more: list[Any], name: str) -> tirx.PrimFunc:
        done = tirx.Return(tirx.IntImm("int32", 0))
        whole = tirx.PrimFunc(pointers + more, tirx.SeqStmt([*declarations, *statements, done]), PrimType("int32"))
        return whole.with_attrs({**attributes, "global_symbol": name})

    statements = sequence(body)
    if not any(map(_is_parallel, statements)):
        parts = [Part(made([_serial(s) for s in statements], [], symbol), None)]
        return Kernel(tuple(parts), tuple(temporary for _, temporary in temporaries))
    begin, end = tirx.Var("begin", "int32"), tirx.Var("end", "int32")
    names: list[Any] = []  # what earlier statements declare is declared in every part
    parts = []
    for statement in statements:
        name = f"{symbol}_{len(parts)}"
        if isinstance(statement, tirx.DeclBuffer | tirx.Bind):
            assert not (isinstance(statement, tirx.Bind) and _loads(statement.value)), "its value may change"
            names.append(statement)
        elif _is_parallel(statement):
            loop, kind = statement, tirx.ForKind.SERIAL
            some = tirx.For(loop.loop_var, begin + loop.min, end - begin, kind, _serial(loop.body), None, {}, None)
            parts.append(Part(made([*names, some], [begin, end, worker], name), int(loop.extent)))
        else:
            parts.append(Part(made([*names, _serial(statement)], [], name), None))
    return Kernel(tuple(parts), tuple(temporary for _, temporary in temporaries))


def sequence(statement: Any) -> list[Any]:
    """A statement, or those that it is a sequence of."""
    if isinstance(statement, tirx.SeqStmt):
        return [inner for outer in statement.seq for inner in sequence(outer)]
    return [statement]


def _loads(value: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(value, (TensorLoad, found.append))
    return bool(found)


def _is_parallel(statement: Any) -> bool:
    return isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.PARALLEL


def _serial(statement: Any) -> Any:
    """Without parallel loops."""

    def serial(loop: tirx.For) -> tirx.For:
        if not _is_parallel(loop):
            return loop
        kind = tirx.ForKind.SERIAL
        return tirx.For(loop.loop_var, loop.min, loop.extent, kind, loop.body, None, loop.annotations, loop.step)

    return tvm_ffi.structural_map(statement, (tirx.For, serial))


def _hoist(body: Any, worker: Any, stack_limit: int) -> tuple[Any, list[tuple[Any, Temporary]]]:
    """A body that is given its temporaries: the large ones, those that several parts share, and those whose memory
    serves as two types, which C allows in the workspace and not in an array."""
    inside: list[Any] = []

    def look(loop: tirx.For) -> None:
        if _is_parallel(loop):
            tvm_ffi.structural_walk(loop.body, (tirx.AllocBuffer, lambda a: inside.append(a.buffer)))

    tvm_ffi.structural_walk(body, (tirx.For, look))
    statements = sequence(body)
    split = any(map(_is_parallel, statements))
    shared = [s.buffer for s in statements if split and isinstance(s, tirx.AllocBuffer)]

    def view(declared: tirx.DeclBuffer) -> None:
        of = declared.data.args[0] if getattr(declared.data, "args", ()) else declared.data
        if isinstance(of.ty, BufferType) and scalar(of.ty.dtype) != scalar(declared.buffer.ty.dtype):
            shared.append(of)

    tvm_ffi.structural_walk(body, (tirx.DeclBuffer, view))
    found: list[tuple[Any, Temporary]] = []

    def hoist(allocation: tirx.AllocBuffer) -> Any:
        buffer = allocation.buffer
        size = buffer_bytes(buffer)
        if size <= stack_limit and not any(buffer.same_as(b) for b in shared):
            return allocation
        pointer = tirx.Var(f"{buffer.name}_data", PointerType(PrimType(str(buffer.ty.dtype))))
        each_worker = any(buffer.same_as(b) for b in inside)
        found.append((pointer, Temporary(size, each_worker)))
        data = tirx.handle_add_byte_offset(pointer, worker * aligned(size)) if each_worker else pointer
        return tirx.DeclBuffer(buffer, data=data)

    return tvm_ffi.structural_map(body, (tirx.AllocBuffer, hoist)), found


def scalar(dtype: Any) -> str:
    """The type of a vector's lane: 'uint32x8' -> 'uint32'."""
    return str(tvm.DataType(str(dtype)).with_lanes(1))


def buffer_bytes(buffer: Any) -> int:
    """What a buffer of known extents takes."""
    dtype = tvm.DataType(str(buffer.ty.dtype))
    return -(-dtype.bits * dtype.lanes // 8) * math.prod(map(int, buffer.ty.shape))
