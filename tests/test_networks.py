"""Networks that are no chains: residuals, two outputs, float tails, and every operator that the importer knows.

Exact wherever floats are summed in no order (dyadic weights and inputs: every partial sum is a float32 number); where
they are, TOLERANCE of the largest output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from networks import assert_identical, compiled, dyadic, outputs, randomise
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import targets
from pipeline import compiler, importer, models, program
from pipeline.deploy import _binary_sign, deploy
from pipeline.export import export
from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.models import GlobalAverage, Quantize
from pipeline.packaging import oracle

TOLERANCE = 1e-5


def assert_close(results: list[np.ndarray], tolerance: float = TOLERANCE) -> None:
    """All like the first, to ``tolerance`` of its largest value; and not all of them constant."""
    reference = results[0]
    assert reference.std() > 0
    for other in results[1:]:
        np.testing.assert_allclose(other, reference, rtol=0, atol=tolerance * np.abs(reference).max())


def dyadic_floats(model: nn.Module, rng: np.random.Generator) -> nn.Module:
    """Float weights whose products with dyadic inputs sum exactly in any order."""
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.weight.data = torch.from_numpy(dyadic(rng, tuple(module.weight.shape)))
    return randomise(model, rng)


# Residuals -------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Every sum is read by a sign and by the next sum; one sign is read by two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.convs = nn.ModuleList(
            QuantConv2d(channels, channels, 3, padding=1, group=group, bias=group == 2) for group in (1, 2, 16)
        )
        self.side = QuantConv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            normed = norm(x)
            x = x + conv(normed)
            if i == 1:
                x = x - self.side(normed)
        return F.relu(x)


@pytest.mark.parametrize(("channels", "batch"), [(33, 1), (32, 5)])
def test_residual_sums_feed_a_sign_and_the_next_sum(
    channels: int, batch: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = dyadic_floats(Residual(channels), rng)
    model.stem.bias.data = torch.from_numpy(dyadic(rng, (channels,)))  # type: ignore[union-attr, operator]
    assert_identical(model, dyadic(rng, (batch, 3, 6, 7)), tmp_path, threads=1 + batch % 2)


def test_resnet_blocks(rng: np.random.Generator, tmp_path: Path) -> None:
    """Exact up to the float convolution of a shortcut, whose norm ONNX Runtime folds into its weights."""
    from pipeline.models.resnet18 import Block

    body = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        *(Block(16, 16, 1, Quantize(group=group)) for group in (16, 4)),
    )
    x = dyadic(rng, (1, 3, 8, 8))
    assert_identical(dyadic_floats(body, rng), x, tmp_path)
    tail = Block(16, 32, 2, Quantize(group=16)), nn.BatchNorm2d(32), nn.ReLU(), GlobalAverage(), nn.Linear(32, 10)
    assert_close(list(outputs(nn.Sequential(body, randomise(nn.Sequential(*tail), rng)).eval(), x, tmp_path)))


def test_small_vgg(rng: np.random.Generator, tmp_path: Path) -> None:
    """Whose bits stay bits between layers, up to the float tail."""
    model = models.build("vgg_small", (1, 8, 8), 10, Quantize(group=16), widths=(24, 33, 64), pool_after=(0, 2))
    assert_close(list(outputs(dyadic_floats(model, rng), dyadic(rng, (5, 1, 8, 8)), tmp_path)))


@pytest.mark.parametrize("activation", ["bnn", "tbn", "dorefa"])
@pytest.mark.parametrize("target", ["x86-avx2", "x86-avx512bw"])
def test_filters_in_whole_blocks_of_bytes(
    target: str, activation: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Through Relax, whose indices have 64 bits: bits, ternary codes and two bits, to bits and to floats."""
    if missing := targets.load(target).missing_features():
        pytest.skip(f"this CPU lacks {missing}")
    options = {"activation_options": {"bits": 2}} if activation == "dorefa" else {}
    convs = [QuantConv2d(64, 64, width, padding=width // 2, activation=activation, **options) for width in (3, 1)]
    model = nn.Sequential(
        nn.BatchNorm2d(64), convs[0], nn.BatchNorm2d(64), QuantConv2d(64, 64, 3), nn.BatchNorm2d(64), convs[1]
    )
    assert_identical(randomise(model, rng), dyadic(rng, (2, 64, 5, 7)), tmp_path, target=target)


# Between quantised layers and floats -----------------------------------------------------------------------------


def test_dense_only(rng: np.random.Generator, tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(70),
        QuantLinear(70, 100, group=16, bias=True),
        nn.BatchNorm1d(100),
        nn.Hardtanh(),
        QuantLinear(100, 33),
        nn.ReLU(),
        nn.BatchNorm1d(33),
        QuantLinear(33, 10, group=3, bias=True),
    )
    assert_identical(randomise(model, rng), dyadic(rng, (5, 70)), tmp_path)


@pytest.mark.parametrize(
    "between",
    [
        [nn.MaxPool2d(3, 2, 1), nn.ReLU()],
        [nn.Hardtanh(-2, 3), nn.BatchNorm2d(20), nn.ReLU6()],
        [nn.BatchNorm2d(20), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten()],
    ],
    ids=lambda modules: " ".join(type(m).__name__ for m in modules),
)
def test_what_stands_before_a_float_output(between: list[nn.Module], rng: np.random.Generator, tmp_path: Path) -> None:
    model = nn.Sequential(QuantConv2d(33, 20, 3, padding=1, group=8), *between)
    x = dyadic(rng, (2, 33, 6, 8))
    x[0, 0, 0, 0] = np.nan
    assert_identical(randomise(model, rng), x, tmp_path)


def test_signs_of_a_float_layer_and_a_float_layer_of_signs(rng: np.random.Generator, tmp_path: Path) -> None:
    """Bits are not kept as bits where a layer's weights are float; what is flattened keeps the file's order."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.binary = nn.BatchNorm2d(5), QuantConv2d(5, 34, 3)
            self.head = QuantLinear(34 * 4 * 2, 10, bias=True)
            self.beside = nn.Conv2d(5, 6, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            signs = _binary_sign(normed)
            return torch.cat((self.head(self.binary(normed).flatten(1)), self.beside(signs).flatten(1)), 1)

    model = dyadic_floats(Mixed(), rng)
    assert_identical(model, dyadic(rng, (3, 5, 6, 4)), tmp_path)


@pytest.mark.parametrize("case", ["convolution", "dense"])
def test_input_scale(case: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """K is a float mean, in whatever order: to TOLERANCE."""
    layer = {
        "convolution": QuantConv2d(33, 20, 3, (2, 1), (1, 0, 2, 1), group=4, bias=True, input_scale=True),
        "dense": QuantLinear(100, 10, group=2, bias=True, input_scale=True),
    }[case]
    channels = layer.weight.shape[1]
    x = rng.normal(0, 1, (3, channels) if case == "dense" else (3, channels, 7, 6)).astype(np.float32)
    results = outputs(layer.eval(), x, tmp_path)
    assert_close(list(results))
    without = layer
    without.input_scale = False
    with torch.no_grad():
        assert not np.allclose(deploy(without)(torch.from_numpy(x)), results[0])


def test_float_stem_with_dyadic_weights(rng: np.random.Generator, tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 40, 5, stride=2, padding=2, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(40),
        QuantConv2d(40, 33, 3, padding=1, group=16),
        nn.BatchNorm2d(33),
        nn.Flatten(),
        QuantLinear(33 * 9, 10),
    )
    assert_identical(dyadic_floats(model, rng), dyadic(rng, (5, 3, 12, 12)), tmp_path)


@pytest.mark.parametrize("threads", [1, 2])
def test_float_stem_whose_sums_are_pooled_in_strips(threads: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """On CPUs with AVX-512. With a norm between, or without; a pool read by a sign, and by a sum."""
    between = [nn.BatchNorm2d(32), nn.ReLU()] if threads == 2 else []
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), *between, nn.MaxPool2d(3, 2, 1))

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.conv = stem, nn.BatchNorm2d(32), QuantConv2d(32, 32, 3, padding=1, group=16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.conv(self.norm(x)) + x

    x = dyadic(rng, (2, 3, 80, 72))
    assert_identical(dyadic_floats(Pooled(), rng), x, tmp_path, threads=threads)
    for name, expected in {"x86-avx512vnni": True, "x86-avx2": False, "cortex-a72": False}.items():
        lowered = compiler.lower(importer.load(tmp_path / "model.onnx", 2, targets.load(name)))
        assert any("pooled_conv2d" in name for name in program.functions(lowered)) == expected


def test_global_average_and_float_tail(rng: np.random.Generator, tmp_path: Path) -> None:
    model = nn.Sequential(
        QuantConv2d(16, 48, 3, group=16),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
        nn.Softmax(1),
    )
    assert_close(list(outputs(randomise(model, rng), dyadic(rng, (5, 16, 6, 5)), tmp_path)))


def test_two_outputs(rng: np.random.Generator, tmp_path: Path) -> None:
    """One of them read by what makes the other."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = QuantConv2d(8, 40, 3, group=8), nn.BatchNorm2d(40)
            self.second = QuantConv2d(40, 10, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.norm(self.first(x))
            return features, self.second(features).flatten(1)

    path, x = tmp_path / "model.onnx", dyadic(rng, (2, 8, 7, 6))
    deployed = export(randomise(Two(), rng), x.shape[1:], path)
    with torch.no_grad():
        by_torch = [y.numpy() for y in deployed(torch.from_numpy(x))]
    by_runtime, by_library = oracle(path).run(None, {"x": x}), compiled(path, [x])
    assert [y.shape for y in by_library] == [(2, 40, 5, 4), (2, 60)]
    for expected, other, result in zip(by_torch, by_runtime, by_library, strict=True):
        np.testing.assert_array_equal(expected, other)
        np.testing.assert_array_equal(expected, result)


def test_a_batch_norm_that_torch_exported_itself(rng: np.random.Generator, tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 9, 3), nn.BatchNorm2d(9), nn.Sigmoid())
    randomise(model, rng)
    path = tmp_path / "model.onnx"
    x = rng.normal(0, 1, (2, 4, 6, 6)).astype(np.float32)
    torch.onnx.export(model, (torch.from_numpy(x),), path, dynamo=True, optimize=False, verbose=False)
    proto = onnx.load(path)
    assert "BatchNormalization" in {node.op_type for node in proto.graph.node}
    with torch.no_grad():
        by_torch = model(torch.from_numpy(x)).numpy()
    (by_runtime,) = oracle(path).run(None, {proto.graph.input[0].name: x})
    assert_close([by_torch, by_runtime, *compiled(path, [x])])


# Every operator --------------------------------------------------------------------------------------------------

# case -> (operator, its other inputs (names are constants of CONSTANTS, 'x' is the input), attributes)
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "Abs": ("Abs", ["x"], {}),
    "Add a channel": ("Add", ["x", "channel"], {}),
    "Add from the left": ("Add", ["channel", "x"], {}),
    "Add a scalar": ("Add", ["x", "scalar"], {}),
    "Add a row": ("Add", ["x", "row"], {}),
    "Add itself": ("Add", ["x", "x"], {}),
    "AveragePool": ("AveragePool", ["x"], {"kernel_shape": [3, 2], "strides": [2, 1]}),
    "AveragePool padded": (
        "AveragePool",
        ["x"],
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    ),
    "BatchNormalization": ("BatchNormalization", ["x", "gamma", "beta", "beta", "variance"], {"epsilon": 1e-3}),
    "Clip": ("Clip", ["x", "zero", "scalar"], {}),
    "Clip above": ("Clip", ["x", "", "scalar"], {}),
    "Clip below": ("Clip", ["x", "zero"], {}),
    "Concat channels": ("Concat", ["x", "x", "map"], {"axis": 1}),
    "Slice": ("Slice", ["x", "starts", "ends", "axes", "by"], {}),
    "Slice from the end": ("Slice", ["x", "minus two", "minus one", "second last"], {}),
    "Concat columns": ("Concat", ["x", "x"], {"axis": -1}),
    "Conv": ("Conv", ["x", "weight", "beta"], {"pads": [0, 1, 2, 1], "strides": [2, 1], "dilations": [1, 2]}),
    "Conv grouped": ("Conv", ["x", "weight of groups"], {"group": 3}),
    "Conv depthwise": ("Conv", ["x", "weight of channels"], {"group": 6, "pads": [1, 1, 1, 1]}),
    "Div": ("Div", ["x", "channel"], {}),
    "Div two tensors": ("Div", ["map", "x"], {}),
    "Dropout": ("Dropout", ["x"], {}),
    "Flatten": ("Flatten", ["x"], {}),
    "Flatten from an axis": ("Flatten", ["x"], {"axis": 2}),
    "Gemm": ("Gemm", ["flat", "matrix", "beta"], {}),
    "Gemm transposed": ("Gemm", ["flat", "rows"], {"transB": 1}),
    "GlobalAveragePool": ("GlobalAveragePool", ["x"], {}),
    "Identity": ("Identity", ["x"], {}),
    "MatMul": ("MatMul", ["flat", "matrix"], {}),
    "MaxPool": ("MaxPool", ["x"], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
    "Mul": ("Mul", ["x", "channel"], {}),
    "Mul two tensors": ("Mul", ["x", "x"], {}),
    "Mul squeezed": ("Mul", ["x", "map of channels"], {}),
    "Pad": ("Pad", ["x", "pads of all axes", "scalar"], {}),
    "Pad with zeros": ("Pad", ["x", "pads of two axes", "", "spatial axes"], {"mode": "constant"}),
    "Pad a row": ("Pad", ["flat", "pads of two axes"], {}),
    "ReduceMean": ("ReduceMean", ["x", "spatial axes"], {"keepdims": 1}),
    "ReduceMean without keeping": ("ReduceMean", ["x", "spatial axes"], {"keepdims": 0}),
    "ReduceMean of channels": ("ReduceMean", ["x", "channel axis"], {"keepdims": 1}),
    "Relu": ("Relu", ["x"], {}),
    "Reshape": ("Reshape", ["x", "shape"], {}),
    "Reshape to a map": ("Reshape", ["flat", "shape of a map"], {}),
    "Sigmoid": ("Sigmoid", ["x"], {}),
    "Softmax": ("Softmax", ["flat"], {"axis": 1}),
    "Softmax of channels": ("Softmax", ["x"], {"axis": 1}),
    "Sub": ("Sub", ["x", "channel"], {}),
    "Sub two tensors": ("Sub", ["map", "x"], {}),
    "Tanh": ("Tanh", ["x"], {}),
}
SHAPE = (2, 6, 5, 4)


def constants(rng: np.random.Generator) -> dict[str, np.ndarray]:
    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 1, shape).astype(np.float32)

    return {
        "channel": (1 + rng.random((6, 1, 1))).astype(np.float32),
        "starts": np.array([1, -3]),
        "ends": np.array([2**31 - 1, 100]),
        "axes": np.array([-1, 1]),
        "by": np.array([2, 1]),
        "minus two": np.array([-2]),
        "minus one": np.array([-1]),
        "second last": np.array([2]),
        "scalar": np.float32(1.5) * np.ones((), np.float32),
        "zero": np.zeros((), np.float32),
        "row": normal(1, 1, 5, 1),
        "map": (1 + rng.random(SHAPE)).astype(np.float32),
        "map of channels": normal(2, 6, 1, 1),
        "gamma": normal(6),
        "beta": normal(6),
        "variance": (0.5 + rng.random(6)).astype(np.float32),
        "weight": normal(6, 6, 3, 2),
        "weight of groups": normal(9, 2, 3, 3),
        "weight of channels": normal(6, 1, 3, 3),
        "matrix": normal(20, 6),
        "rows": normal(7, 20),
        "pads of all axes": np.array([0, 1, 2, 0, 1, 0, 0, 3]),
        "pads of two axes": np.array([1, 0, 0, 2]),
        "spatial axes": np.array([2, 3]),
        "channel axis": np.array([1]),
        "shape": np.array([0, -1]),
        "shape of a map": np.array([0, 5, 2, 2]),
    }


def one_node(case: str, rng: np.random.Generator, path: Path) -> np.ndarray:
    """Write the ONNX file of a case; returns an input for it."""
    op_type, inputs, attributes = CASES[case]
    shape = (2, 20) if "flat" in inputs else SHAPE
    names = ["x" if name == "flat" else name for name in inputs]
    node = helper.make_node(op_type, names, ["y"], name=f"the {op_type}", **attributes)
    used = {k: v for k, v in constants(rng).items() if k in names}
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in used.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, data_prop=True), path)
    return rng.normal(0, 2, shape).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_every_operator_does_what_onnx_runtime_does(case: str, rng: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    x = one_node(case, rng, path)
    (expected,) = oracle(path).run(None, {"x": x})
    (result,) = compiled(path, [x])
    assert result.shape == expected.shape
    assert_close([expected, result])


def test_no_operator_is_left_out() -> None:
    """Those of our domain are in every other test of this file."""
    assert {case[0] for case in CASES.values()} == {name for name in importer.OPERATORS if "::" not in name}
