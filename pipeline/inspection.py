"""What an ONNX file holds, layer by layer: operator, method, bits, operations, and why a layer is float."""

from __future__ import annotations

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
    layers = tuple(_layer(n) for n in model.graph if n.domain == "" and n.op_type in ("Conv", "Gemm", "MatMul"))
    floats = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT
    )
    binary = sum(layer.float_bytes for layer in layers if layer.method != "float")
    return Inspection(path.stat().st_size, floats + binary, layers)


def _layer(node: ir.Node) -> Layer:
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None
    weights = int(np.prod(onnx_file.shape(weight)))
    output = onnx_file.shape(node.outputs[0])
    filters = output[1]
    macs = weights // filters * int(np.prod(output[1:]))
    unpack = _made_by(weight, "UnpackSigns", through=("Reshape", "Transpose"))
    sign = _made_by(x, "BinarySign", through=("Pad", "Reshape", "Flatten", "MaxPool"))
    if unpack is None or sign is None:
        method, stored, why = "float", 4 * weights, _why(weight, unpack is not None, sign is not None)
    else:
        method, stored, why = "1w1a", _bytes(unpack.inputs[0]), ""
        if (scale := _scale_of(node)) is not None:
            stored += _bytes(scale.inputs[0])
            method += f"/{min(int(scale.attributes['group'].value), filters)}"
    return Layer(
        name=_name(node, unpack.inputs[0] if unpack is not None else weight),
        operator=node.op_type,
        method=method,
        bits_per_weight=8 * stored / weights,
        stored_bytes=stored,
        float_bytes=4 * weights,
        binary_macs=0 if why else macs,
        float_macs=macs if why else 0,
        why_float=why,
    )


def _name(node: ir.Node, parameter: ir.Value | None) -> str:
    """The layer's name in torch, which its weights carry; else the node's."""
    if parameter is not None and parameter.const_value is not None and "." in str(parameter.name):
        return str(parameter.name).removesuffix(".words").removesuffix(".weight")
    return node.name or node.outputs[0].name or node.op_type


def _bytes(value: ir.Value | None) -> int:
    assert value is not None and value.const_value is not None
    return int(value.const_value.nbytes)


def _why(weight: ir.Value, packed: bool, signed: bool) -> str:
    if packed:
        return "activations are float"
    what = "weights are float" if weight.const_value is not None else "weights are computed"
    return f"{what}, activations are binary" if signed else what


def _made_by(value: ir.Value, op_type: str, through: tuple[str, ...]) -> ir.Node | None:
    """The node of our domain that made a value, looking through operators that only move elements."""
    node = value.producer()
    while node is not None and node.op_type in through and node.domain == "" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and (node.domain, node.op_type) == (opset.DOMAIN, op_type) else None


def _scale_of(node: ir.Node) -> ir.Node | None:
    """The GroupScale that multiplies a layer's sums."""
    for accumulator in node.outputs[0].consumers():
        if accumulator.op_type != "Accumulator":
            continue
        for product in accumulator.outputs[0].consumers():
            for factor in product.inputs:
                if factor is not None and (scale := _made_by(factor, "GroupScale", ("Reshape",))) is not None:
                    return scale
    return None
