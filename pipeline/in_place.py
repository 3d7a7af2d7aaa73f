"""Kernels that write a map over one that they read, where nothing reads that later.

A residual block adds a sum to a map and gives a map of its size: written over the old one, a core's caches hold one map
instead of two, and the workspace of a C library is smaller.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import TensorLoad, Var
from tvm.s_tir import SBlock

from pipeline import program
from tvm_ops.tir import replaced

_DATA_PARALLEL = 0


def reuse(scheduled: tvm.IRModule) -> tvm.IRModule:
    """A module of scheduled kernels with each of them in place that can be so in all of its calls.

    Kernels that are equal then become one: those that differed in the order of their outputs.
    """
    kernels = program.functions(scheduled)
    pairs = {}
    for name, dead in _dead(scheduled["main"]).items():
        function, count = kernels[name], len(dead)
        found = (
            (read, written)
            for read, written in itertools.product(range(count), range(count, len(function.params)))
            if dead[read] and fits(function, function.params[read], function.params[written])
        )
        if pair := next(found, None):
            read, written = pair
            pairs[name] = (read, written - count)
            kernels[name] = _over(function, read, written)
    builder = relax.BlockBuilder()  # anew, for a function's variable has the type that it had
    names = {name: builder.add_func(function, name) for name, function in kernels.items()}
    mod = builder.get()
    mod["main"] = _Caller(names, pairs).visit_expr(scheduled["main"])
    return mod


def fits(function: tirx.PrimFunc, read: Any, written: Any) -> bool:
    """Whether the buffer ``written`` of a scheduled function may lie where ``read`` does: each element is stored once,
    and ``read`` is loaded nowhere but in that store, at the same place."""
    if not tvm_ffi.structural_equal(read.ty, written.ty):
        return False
    seen: Counter[str] = Counter()
    stores: list[Any] = []

    def block(each: SBlock) -> None:
        if isinstance(each.body, tirx.BufferStore) and each.body.buffer.same_as(written) and each.init is None:
            stores.extend([each.body] * all(int(v.iter_type) == _DATA_PARALLEL for v in each.iter_vars))
        seen["regions"] += sum(region.source.same_as(read) for region in each.reads)

    def store(each: tirx.BufferStore) -> None:
        seen["stores"] += each.buffer.same_as(written)

    def name(each: Var) -> None:
        seen["names"] += each.same_as(read)

    tvm_ffi.structural_walk(function.body, [(SBlock, block), (tirx.BufferStore, store), (Var, name)])
    if len(stores) != 1 or seen["stores"] != 1:
        return False

    def load(each: TensorLoad) -> None:
        same = tvm_ffi.structural_equal(list(each.indices), list(stores[0].indices))
        seen["loads"] += each.source.same_as(read) and same

    tvm_ffi.structural_walk(stores[0].value, (TensorLoad, load))
    return seen["names"] == seen["loads"] + seen["regions"]


def _over(function: tirx.PrimFunc, read: int, written: int) -> tirx.PrimFunc:
    """The function without the parameter number ``written``, which lies where number ``read`` does."""
    parameters = list(function.params)
    output = parameters.pop(written)
    body = replaced(function.body, [output], [parameters[read]])
    return tirx.PrimFunc(parameters, body, function.ret_type).with_attrs(function.attrs)


def _dead(main: relax.Function) -> dict[str, list[bool]]:
    """For every kernel and each of its arguments, whether in all of its calls that is memory which nothing else reads
    then or later."""
    found: dict[str, list[bool]] = {}
    for block in main.body.blocks:
        values = {binding.var: binding.value for binding in block.bindings}
        order = list(values)
        readers = relax.analysis.udchain(block)
        for var, value in values.items():
            if not program.calls_kernel(value):
                continue
            given = list(value.args[1].fields)
            dead = [
                _is_made(each, values, readers)
                and max(readers[each], key=order.index).same_as(var)
                and sum(map(each.same_as, given)) == 1
                for each in given
            ]
            name = value.args[0].name_hint
            found[name] = [a and b for a, b in zip(found.get(name, dead), dead, strict=True)]
    return found


def _is_made(var: Any, values: dict[Any, Any], readers: Any) -> bool:
    """Whether a variable is a kernel's output, by no other name, and all that read it are kernels."""
    if not isinstance(var, relax.DataflowVar):  # a constant, an input, or seen outside
        return False
    value = values[var]
    if isinstance(value, relax.TupleGetItem):
        names = [values[reader] for reader in readers[value.tuple_value]]
        if [getattr(each, "index", value.index) for each in names].count(value.index) != 1:
            return False
        value = values[value.tuple_value]
    return program.calls_kernel(value) and all(program.calls_kernel(values[reader]) for reader in readers[var])


@relax.expr_functor.mutator
class _Caller(relax.PyExprMutator):
    """Gives kernels in ``pairs``, of an argument's number and an output's, that argument for the output."""

    def __init__(self, names: dict[str, Any], pairs: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.names, self.pairs = names, pairs

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if not program.calls_kernel(call):
            return call
        name, (kind,) = call.args[0].name_hint, call.ty_args
        kernel = self.names[name]
        kinds = list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]
        if name not in self.pairs:
            return relax.call_tir(kernel, call.args[1], kinds)
        read, written = self.pairs[name]
        places = [read if i == written else -1 for i in range(len(kinds))]
        return relax.call_tir_inplace(kernel, call.args[1], places, kinds)
