"""A network as a straight line of kernel calls on tensors whose place is known: what a free-standing library is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import tvm
from tvm import relax

from pipeline import kernel, workspace
from pipeline.kernel import Part


@dataclass(eq=False)
class Tensor:
    """A tensor of a program.

    Attributes:
        kind: 'input' and 'output' are the caller's, 'constant' is in the library, 'scratch' is in the workspace.
        name: an input's or an output's, as the ONNX file has it.
        data: a constant's values.
        offset: a scratch tensor's, in bytes from the start of the workspace.
    """

    kind: Literal["input", "output", "constant", "scratch"]
    shape: tuple[int, ...]
    dtype: str
    name: str = ""
    data: np.ndarray | None = field(default=None, repr=False)
    offset: int = 0

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self) -> int:
        return self.elements * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Call:
    """One kernel, a `kernel.Kernel` or a `cuda_kernel.Kernel`, on its tensors, the temporaries last."""

    kernel: Any
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Program:
    """Run ``calls`` in order, then fill every output of ``copies`` from its source.

    Attributes:
        workspace_bytes: what the caller must lend.
        workspace_bound: bytes below which no plan for this order of calls can go.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    calls: tuple[Call, ...]
    copies: tuple[tuple[Tensor, Tensor], ...]
    workspace_bytes: int
    workspace_bound: int

    @property
    def kernels(self) -> list[Any]:
        """Every kernel once, in the order of their first calls."""
        return list(dict.fromkeys(call.kernel for call in self.calls))

    @property
    def parts(self) -> list[Part]:
        """The functions of all kernels."""
        return [part for each in self.kernels for part in each.parts]


def make(
    scheduled: tvm.IRModule, outputs: tuple[str, ...], prefix: str, target: Any, workers: int, stack_limit: int
) -> Program:
    """The program of a lowered and scheduled module.

    Args:
        outputs: names of the outputs.
        prefix, target, stack_limit: see `kernel.make`.
        workers: how many may run parts of a parallel loop at a time.

    Raises:
        ValueError: something is left in the graph that no kernel computes.
    """
    mod = straight(scheduled, target)
    return line_up(mod, outputs, kernel.make(functions(mod), prefix, target, stack_limit), workers)


def straight(scheduled: tvm.IRModule, target: Any) -> tvm.IRModule:
    """The module with ``main`` a straight line: tensors are made, kernels called on them."""
    with target:
        return tvm.transform.Sequential(
            [
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
                relax.transform.DeadCodeElimination(),
            ]
        )(scheduled)


def functions(mod: tvm.IRModule) -> dict[str, tvm.tirx.PrimFunc]:
    """The TIR functions of a module by name."""
    return {g.name_hint: f for g, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}


def calls_kernel(value: Any) -> bool:
    """Whether a Relax value is what a TIR function, which is its first argument, makes."""
    return isinstance(value, tvm.ir.Call) and value.op == tvm.ir.Op.get("relax.call_tir")


def line_up(mod: tvm.IRModule, outputs: tuple[str, ...], kernels: Mapping[str, Any], workers: int) -> Program:
    """The program of a module that is `straight`.

    Args:
        kernels: by the names of their functions, each a `kernel.Kernel` or a `cuda_kernel.Kernel`.

    Raises:
        ValueError: as `make`.
    """
    reader = _Reader()
    inputs = tuple(reader.input(parameter) for parameter in mod["main"].params)
    results = reader.read(mod["main"])
    copies = _place_outputs(results, outputs)
    return _planned(inputs, reader, kernels, results, copies, workers)


class _Reader:
    """Follows the bindings of Relax's ``main``."""

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}
        self.constants: dict[tuple[Any, ...], Tensor] = {}
        self.steps: list[tuple[str, list[Tensor]]] = []

    def input(self, parameter: relax.Var) -> Tensor:
        tensor = Tensor("input", _shape(parameter), str(parameter.ty.dtype), parameter.name)
        self.values[parameter] = tensor
        return tensor

    def read(self, main: relax.Function) -> list[Tensor]:
        """Fill ``steps``; returns the results."""
        for block in main.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self._value(binding)
        result = self._tensor(main.body.body)
        return list(result) if isinstance(result, tuple) else [result]

    def _value(self, binding: Any) -> Any:
        value = binding.value
        if not isinstance(value, tvm.ir.Call):
            return self._tensor(value)
        if isinstance(value.op, tvm.ir.GlobalVar):
            self.steps.append((value.op.name_hint, [self._tensor(argument) for argument in value.args]))
            return None
        if value.op.name == "relax.builtin.alloc_tensor":
            return Tensor("scratch", _shape(binding.var), str(binding.var.ty.dtype))
        if value.op.name in ("relax.reshape", "relax.memory.view"):
            return self._tensor(value.args[0])
        raise ValueError(
            f"{value.op.name} has no kernel, so it cannot be in a free-standing library: compile with --emit vm"
        )

    def _tensor(self, expr: Any) -> Any:
        if isinstance(expr, relax.Tuple):
            return tuple(self._tensor(each) for each in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self.values[expr.tuple_value][expr.index]
        if isinstance(expr, tvm.ir.GenericConst):
            array = np.ascontiguousarray(expr.value.numpy())
            key = (array.tobytes(), array.dtype.str)
            new = Tensor("constant", array.shape, str(array.dtype), f"constant{len(self.constants)}", array)
            return self.constants.setdefault(key, new)
        return self.values[expr]


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(int(extent) for extent in variable.ty.shape.values)


def _place_outputs(results: list[Tensor], names: tuple[str, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Make the results the caller's; those that are an input, a constant or a result twice are (output, source)."""
    copies = []
    for i, (tensor, name) in enumerate(zip(results, names, strict=True)):
        if tensor.kind == "scratch":
            tensor.kind, tensor.name = "output", name
        else:
            results[i] = Tensor("output", tensor.shape, tensor.dtype, name)
            copies.append((results[i], tensor))
    return tuple(copies)


def _planned(
    inputs: tuple[Tensor, ...],
    reader: _Reader,
    kernels: Mapping[str, Any],
    results: list[Tensor],
    copies: tuple[tuple[Tensor, Tensor], ...],
    workers: int,
) -> Program:
    """Everything in its place."""
    calls = []
    alive: dict[Tensor, tuple[int, int]] = {}
    for i, (name, tensors) in enumerate(reader.steps):
        sizes = [workspace.aligned(t.size) * workers if t.each_worker else t.size for t in kernels[name].temporaries]
        tensors = [*tensors, *(Tensor("scratch", (size,), "uint8") for size in sizes)]
        calls.append(Call(kernels[name], tuple(tensors)))
        for tensor in tensors:
            if tensor.kind == "scratch":
                alive[tensor] = (alive.get(tensor, (i, i))[0], i)
    plan = workspace.plan([workspace.Span(tensor.bytes, *steps) for tensor, steps in alive.items()])
    for tensor, offset in zip(alive, plan.offsets, strict=True):
        tensor.offset = offset
    constants = tuple(reader.constants.values())
    return Program(inputs, tuple(results), constants, tuple(calls), copies, plan.size, plan.bound)
