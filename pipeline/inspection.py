"""What an ONNX file holds, layer by layer: operator, method, bits, operations, and why a layer is float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pipeline import onnx_file
from pipeline.artifact import Layer
from tvm_ops import opset


@dataclass(frozen=True)
class Inspection:
    """A file: its size, that of its parameters in float32, and its layers."""

    file_bytes: int
    float_bytes: int
    layers: tuple[Layer, ...]


def inspect(path: Path, batch: int = 1) -> Inspection:
    """Read and describe an ONNX file; ``batch`` is the one that it is fixed to, if it is.

    Raises:
        ValueError: as `onnx_file.read`.
    """
    model = onnx_file.read(path, batch)
    layers = tuple(map(_layer, _products(model)))
    floats = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT
    )
    packed = sum(layer.float_bytes for layer in layers if layer.method != "float")
    return Inspection(path.stat().st_size, floats + packed, layers)


_MOVES = ("Pad", "Reshape", "Flatten", "MaxPool", "Transpose", "Slice", "Concat")
_BITS: dict[str, Callable[[ir.Node], int]] = {
    "BinarySign": lambda node: 1,
    "Ternarize": lambda node: 2,
    "QuantizeUnit": lambda node: int(node.attributes["bits"].value),
    "QuantizeSymmetric": lambda node: int(node.attributes["bits"].value),
}


def _products(model: ir.Model) -> list[list[ir.Node]]:
    """The products of activations and weights; those of the same packed weights (planes of a residual) together."""
    found: dict[int, list[ir.Node]] = {}
    for node in model.graph:
        if node.domain == "" and node.op_type in ("Conv", "Gemm", "MatMul"):
            packed = _packed(node)
            found.setdefault(id(packed[0].inputs[0] if packed else node), []).append(node)
    return list(found.values())


def _packed(node: ir.Node) -> list[ir.Node]:
    """The nodes of our domain that a product's weights are made by, the one that unpacks them first; often none."""
    found: list[ir.Node] = []
    values = [node.inputs[1]]
    while values:
        value = values.pop()
        producer = None if value is None else value.producer()
        if producer is not None:
            found += [producer] if producer.domain == opset.DOMAIN else []
            values += producer.inputs
    return (
        sorted(found, key=lambda n: n.op_type != "UnpackCodes") if "UnpackCodes" in {n.op_type for n in found} else []
    )


def _layer(nodes: list[ir.Node]) -> Layer:
    node = nodes[0]
    packed = list({id(made): made for n in nodes for made in _packed(n)}.values())
    weight = node.inputs[1]
    assert weight is not None
    weights = int(np.prod(onnx_file.shape(weight)))
    output = onnx_file.shape(node.outputs[0])
    filters = output[1]
    macs = len(nodes) * (weights // filters) * int(np.prod(output[1:]))
    codes = {id(made): made for n in nodes if (made := _made_by(n.inputs[0], tuple(_BITS), _MOVES)) is not None}
    activation_bits = sum(_BITS[made.op_type](made) for made in codes.values()) or 32
    method, stored, parameter = "float", 4 * weights, weight
    if packed:
        stacks = [made for made in packed if made.op_type == "StackFilters"]
        weights *= max(1, len(stacks))  # one for all segments, or one each
        behind = (scale for n in nodes for scale in _scales(n))
        scales = {id(s): s for s in (*packed, *behind) if s.op_type == "GroupScale"}
        constants = {id(v): v for made in (*packed, *scales.values()) for v in made.inputs if v is not None}
        stored = sum(_bytes(v) for v in constants.values() if v.const_value is not None)
        parameter = packed[0].inputs[0]
        method = f"{_stack(stacks, parameter) or onnx_file.shape(parameter)[0]}w{activation_bits}a"
        if scales:
            method += f"/{min(min(int(s.attributes['group'].value) for s in scales.values()), filters)}"
    why = _why(weight, bool(packed), activation_bits)
    return Layer(
        name=_name(node, parameter),
        operator=node.op_type,
        method=method,
        bits_per_weight=8 * stored / weights,
        stored_bytes=stored,
        float_bytes=4 * weights,
        binary_macs=0 if why else macs,
        float_macs=macs if why else 0,
        why_float=why,
    )


def _stack(stacks: list[ir.Node], bank: ir.Value | None) -> str:
    """'slbf-S-RHO' for filters that are stacked of S segments, RHO times as many as the bank has; '' for others."""
    if not stacks:
        return ""
    assert bank is not None
    filters, size = int(stacks[0].attributes["filters"].value), onnx_file.shape(bank)[1]
    segments = sum(int(made.attributes["segments"].value) for made in stacks)
    return f"slbf-{segments}-{filters / size:g}"


def _name(node: ir.Node, parameter: ir.Value | None) -> str:
    """The layer's name in torch, which its weights carry; else the node's."""
    if parameter is not None and parameter.const_value is not None and "." in str(parameter.name):
        return str(parameter.name).removesuffix(".words").removesuffix(".weight").removesuffix(".bank")
    return node.name or node.outputs[0].name or node.op_type


def _bytes(value: ir.Value | None) -> int:
    assert value is not None and value.const_value is not None
    return int(value.const_value.nbytes)


def _why(weight: ir.Value, packed: bool, activation_bits: int) -> str:
    if packed:
        return "activations are float" if activation_bits == 32 else ""
    what = "weights are float" if weight.const_value is not None else "weights are computed"
    return what if activation_bits == 32 else f"{what}, activations have {activation_bits} bit(s)"


def _made_by(value: ir.Value | None, op_types: tuple[str, ...], through: tuple[str, ...]) -> ir.Node | None:
    """The node of our domain that made a value, looking through operators that only move elements."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in through and node.domain == "" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.domain == opset.DOMAIN and node.op_type in op_types else None


def _scales(node: ir.Node) -> list[ir.Node]:
    """The GroupScales that multiply a layer's sums."""
    sums = [node.outputs[0], *(n.outputs[0] for n in node.outputs[0].consumers() if n.op_type == "Accumulator")]
    products = [n for value in sums for n in value.consumers() if n.op_type == "Mul"]
    found = [_made_by(factor, ("GroupScale",), ("Reshape",)) for n in products for factor in n.inputs]
    return [scale for scale in found if scale is not None]
