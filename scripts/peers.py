"""Other runtimes on the four 3x3 convolutions of `bench_kernels.py`: built, checked against NumPy, ready to be timed.

Each function takes floats [1, C, H, W] in [-1, 1] and signs [C, C, 3, 3] and gives {name: seconds(calls)}, or nothing
where its package is not installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np

from pipeline.timer import timer

Timers = dict[str, Callable[[int], float]]


def all_of(x: np.ndarray, signs: np.ndarray) -> Timers:
    """Every peer that is installed."""
    return openvino_binary(x, signs) | onnxruntime_float(x, signs) | onnxruntime_int8(x, signs)


def _sums(x: np.ndarray, weights: np.ndarray, beside: float) -> np.ndarray:
    """A 3x3 convolution with ``beside`` around the image."""
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=beside)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weights, optimize=True)


def _check(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.allclose(found, expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max()):
        raise SystemExit(f"{name} differs from NumPy by up to {np.abs(found - expected).max()}, so nothing is timed")


def openvino_binary(x: np.ndarray, signs: np.ndarray) -> Timers:
    """opset1's BinaryConvolution behind a FakeQuantize to bits: all of it, and its kernel alone by the profile.

    With outputs (0, 1) FakeQuantize packs at once; with (-1, 1) a slow reordering follows.
    """
    if importlib.util.find_spec("openvino") is None:
        return {}
    import openvino as ov
    from openvino import opset1
    from openvino_network import bits, levels

    image = opset1.parameter(list(x.shape), np.float32)
    weights, window = bits(signs > 0), [[1, 1]] * 4
    sums = opset1.binary_convolution(levels(image, (0, 0), (0, 1), 2), weights, *window, "xnor-popcount", -1.0)
    model = ov.Model([opset1.relu(sums)], [image])  # a reader, so that the sums are floats in its own layout
    compiled = ov.Core().compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": 1, "PERF_COUNT": True, "PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()
    expected = np.maximum(_sums(np.where(x > 0, 1, -1).astype(np.float32), signs.astype(np.float32), -1), 0)
    _check("OpenVINO", request.infer([x])[0], expected)

    def kernel(calls: int) -> float:
        times = []
        for _ in range(calls):
            request.infer()
            (node,) = (n for n in request.profiling_info if n.node_type == "BinaryConvolution")
            times.append(node.real_time.total_seconds())
        return float(np.mean(times))

    return {"OpenVINO binary": timer(request.infer), "OpenVINO binary, kernel": kernel}


def _onnxruntime(nodes: list[object], constants: dict[str, np.ndarray], x: np.ndarray, shape: tuple[int, ...]):
    """A session on one thread and its input."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", kind, list(x.shape))],
        [helper.make_tensor_value_info("y", kind if kind == TensorProto.FLOAT else TensorProto.UINT8, list(shape))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def onnxruntime_float(x: np.ndarray, signs: np.ndarray) -> Timers:
    """Conv in float32."""
    from onnx import helper

    weights = signs.astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    session = _onnxruntime([node], {"w": weights}, x, x.shape)
    _check("ONNX Runtime fp32", session.run(None, {"x": x})[0], _sums(x, weights, 0))
    return {"ONNX Runtime fp32": timer(lambda: session.run(None, {"x": x}))}


def onnxruntime_int8(x: np.ndarray, signs: np.ndarray) -> Timers:
    """QLinearConv of uint8 and int8, the fast pair on x86."""
    from onnx import helper

    pixels, weights = np.round((x + 1) * 127).astype(np.uint8), signs.astype(np.int8)
    expected = _sums(pixels.astype(np.float32) - 127, signs.astype(np.float32), 0)
    scale = np.float32(max(np.abs(expected).max() / 127, 1))
    names = ["x", "one", "middle", "w", "one", "zero", "scale", "out_middle"]
    constants = {
        "one": np.float32(1),
        "middle": np.uint8(127),
        "zero": np.int8(0),
        "scale": scale,
        "out_middle": np.uint8(128),
        "w": weights,
    }
    session = _onnxruntime(
        [helper.make_node("QLinearConv", names, ["y"], pads=[1, 1, 1, 1])], constants, pixels, pixels.shape
    )
    (found,) = session.run(None, {"x": pixels})
    if np.abs(np.clip(np.round(expected / scale) + 128, 0, 255) - found).max() > 1:
        raise SystemExit("ONNX Runtime int8 differs from NumPy by more than one step, so nothing is timed")
    return {"ONNX Runtime int8": timer(lambda: session.run(None, {"x": pixels}))}
