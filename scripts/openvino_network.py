"""Networks in OpenVINO's CPU plugin: our ONNX files of binary convolutions by its own operators, others as they are.

OpenVINO's BinaryConvolution multiplies bits that a FakeQuantize of two levels packs. What stands between is left to its
compiler, which folds norms into those levels, and scales and residual sums into the convolutions. An exact 0 is -1 to a
FakeQuantize and +1 to us, which norms of random numbers do not make. A stem of binary weights is left to its float
convolution: with 8-bit weights its scores are off by a tenth, probably because 127.5 is no zero point of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
from openvino import opset1

from pipeline.timer import timer


def compiled(model: ov.Model, threads: int) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[int], float]]:
    """run(x), and seconds(calls) of a call on the last x."""
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    return lambda x: request.infer([x])[0].copy(), timer(request.infer)


def read(path: Path, shape: tuple[int, ...]) -> ov.Model:
    """An ONNX file of standard operators, with inputs of ``shape``."""
    model = ov.Core().read_model(path)
    model.reshape(list(shape))
    return model


def binary(path: Path, shape: tuple[int, ...]) -> ov.Model:
    """A binary ResNet-18 that `pipeline.export` wrote.

    Raises:
        ValueError: an operator that it does not have.
    """
    graph = onnx.load(path).graph
    values: dict[str, Any] = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    image = values[graph.input[0].name] = opset1.parameter(list(shape), np.float32)
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        values[node.output[0]] = _made(node.op_type, [values[name] for name in node.input], attributes)
    return ov.Model([values[graph.output[0].name]], [image])


def _made(operator: str, inputs: list[Any], a: dict[str, Any]) -> Any:
    """What a node gives: an array where it is constant (weights: booleans, +1 where True), else OpenVINO's node."""
    x, *rest = inputs
    match operator:
        case "UnpackCodes":
            unpacked = np.unpackbits(x[0], axis=-1, bitorder="little")[..., : a["channels"]]
            return unpacked.transpose(0, 2, 1).astype(bool)
        case "Reshape":
            return x.reshape(rest[0])
        case "GroupScale":
            return x.repeat(a["group"])[: a["filters"]]
        case "BinarySign":
            return levels(x, (0, 0), (0, 1), 2)  # outputs of (-1, 1) would be packed by a slow reordering
        case "QuantizeSymmetric":
            most = 2 ** a["bits"] - 1
            return levels(x, (-1, 1), (-most, most), most + 1)
        case "Accumulator":
            return x
        case "Conv" if rest[0].dtype == bool and x.get_type_name() == "FakeQuantize" and x.get_levels() == 2:
            return opset1.binary_convolution(x, bits(rest[0]), *_window(a), [1, 1], "xnor-popcount", 0.0)
        case "Conv":
            weights = np.where(rest[0], 1, -1) if rest[0].dtype == bool else rest[0]
            return opset1.convolution(x, _node(weights), *_window(a), [1, 1])
        case "MaxPool":
            return opset1.max_pool(x, *_window(a), a["kernel_shape"])
        case "AveragePool":
            return opset1.avg_pool(x, *_window(a), a["kernel_shape"], False)
        case "Mul":
            return opset1.multiply(x, _node(rest[0]))
        case "Add":
            return opset1.add(x, _node(rest[0]))
        case "Relu":
            return opset1.relu(x)
        case "ReduceMean":
            return opset1.reduce_mean(x, opset1.constant(rest[0]), False)
        case "Gemm":
            return opset1.add(opset1.matmul(x, _node(rest[0]), False, True), _node(rest[1]))
    raise ValueError(f"{operator}: no operator of OpenVINO stands for it here")


def _window(a: dict[str, Any]) -> tuple[Any, Any, Any]:
    return a["strides"], a["pads"][:2], a["pads"][2:]


def _node(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return opset1.constant(value.astype(np.float32)[None] if value.ndim == 3 else value.astype(np.float32))


def levels(x: Any, inputs: tuple[float, float], outputs: tuple[float, float], count: int) -> Any:
    """A node that rounds what lies between ``inputs`` to so many levels between ``outputs``."""
    ends = [opset1.constant(np.full((1, 1, 1, 1), end, np.float32)) for end in (*inputs, *outputs)]
    return opset1.fake_quantize(x, *ends, count)


def bits(signs: np.ndarray) -> Any:
    """A constant of bits, which has no NumPy type: its bytes are written into OpenVINO's own memory."""
    tensor = ov.Tensor(ov.Type.u1, ov.Shape(list(signs.shape)))
    tensor.data[:] = np.packbits(signs.reshape(-1), bitorder="little")
    return ov.op.Constant(tensor)
