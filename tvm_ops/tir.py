"""TIR taken apart, to blocks and expressions that take other values, and put together, by conditions and loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm_ffi


def replaced(expression: Any, variables: Sequence[Any], values: Sequence[Any]) -> Any:
    """An expression with values for its variables."""
    from tvm.ir import Var

    def look(variable: Any) -> Any:
        return next((v for name, v in zip(variables, values, strict=True) if variable.same_as(name)), variable)

    return tvm_ffi.structural_map(expression, (Var, look))


def loads(expression: Any, buffer: Any, value: Any) -> Any:
    """An expression whose loads from ``buffer`` are ``value``."""
    from tvm.ir import TensorLoad

    return tvm_ffi.structural_map(expression, (TensorLoad, lambda load: value if load.source.same_as(buffer) else load))


def replaced_load(expression: Any, found: Any, value: Any) -> Any:
    """An expression where ``value`` stands for a load."""
    from tvm.ir import TensorLoad

    return tvm_ffi.structural_map(expression, (TensorLoad, lambda load: value if load.same_as(found) else load))


class Block:
    """A TIR block that stores one value a point: its extents, and the value at a point."""

    def __init__(self, block: Any) -> None:
        self.name = str(block.name_hint)
        self.annotations = block.annotations
        self.buffer = block.body.buffer
        self.extents = [int(v.dom.extent) for v in block.iter_vars]
        self._variables = [v.var for v in block.iter_vars]
        self.stored = block.body.value
        self._indices = list(block.body.indices)

    def value(self, *at: Any) -> Any:
        return replaced(self.stored, self._variables, at)

    def indices(self, *at: Any) -> list[Any]:
        return [replaced(index, self._variables, at) for index in self._indices]


def blocks(func: Any) -> dict[str, Block]:
    """The blocks of a function by name."""
    from tvm.s_tir import SBlock

    found: list[Any] = []
    tvm_ffi.structural_walk(func.body, (SBlock, lambda b: found.append(b) if len(b.iter_vars) else None))
    return {str(b.name_hint): Block(b) for b in found}


def unravel(index: Any, extents: Sequence[int]) -> list[Any]:
    """A row-major number as indices."""
    from tvm import tirx

    found = []
    for extent in reversed(extents[1:]):
        found.append(tirx.floormod(index, extent))
        index = tirx.floordiv(index, extent)
    return [index, *reversed(found)]


def with_body(func: Any, body: Any) -> Any:
    """The function with another body, in a block as TVM's passes expect it."""
    from tvm import tirx
    from tvm.s_tir import SBlock, SBlockRealize

    return func.with_body(SBlockRealize([], tirx.const(True, "bool"), SBlock([], [], [], "root", body)))


@contextmanager
def if_(condition: Any) -> Iterator[None]:
    from tvm.script.ir_builder import tirx as T

    with T.If(condition), T.Then():
        yield


@contextmanager
def loop(extent: int) -> Iterator[Any]:
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    if extent == 1:
        yield tirx.const(0, "int32")
    else:
        with T.serial(0, extent) as step:
            yield step
