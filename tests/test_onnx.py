"""The file between the halves: what export writes, what inspection says of it, and every file that is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from networks import dyadic, randomise
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import targets
from pipeline import importer, inspection, onnx_file
from pipeline.deploy import deploy
from pipeline.export import export
from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.packaging import oracle
from tvm_ops import opset
from tvm_ops.bitplanes import BINARY, TERNARY, encode, odd, pack, unsigned

# What is exported --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def binary_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three quantised layers and nothing else that has parameters, but for a float stem."""
    path = tmp_path_factory.mktemp("binary") / "model.onnx"
    network = nn.Sequential(
        nn.Conv2d(2, 64, 3, 2, 1),
        QuantConv2d(64, 128, 3, stride=(2, 1), padding=(1, 0, 1, 2), group=16),
        QuantConv2d(128, 64, 1, group=1000),
        nn.MaxPool2d(2),
        nn.Flatten(),
        QuantLinear(64 * 8, 72, group=5),
    )
    export(network, (2, 16, 16), path)
    return path


def test_the_checker_and_the_versions(binary_file: Path) -> None:
    proto = onnx.load(binary_file)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == 10
    assert {o.domain: o.version for o in proto.opset_import} == {"": 20, "ai.crossbit": 2}
    assert (proto.producer_name, proto.producer_version) == ("crossbit", "")
    used = {n.op_type for n in proto.graph.node if n.domain == opset.DOMAIN}
    assert used == {"BinarySign", "UnpackCodes", "GroupScale", "Accumulator"}
    assert {(f.domain, f.name) for f in proto.functions} == {(opset.DOMAIN, name) for name in used}
    assert {n.domain for f in proto.functions for n in f.node} == {""}


def test_weights_are_stored_one_bit_each(binary_file: Path) -> None:
    proto = onnx.load(binary_file)
    stored = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    formula = sum(
        n * c * k * k / 8 + 4 * -(-n // m) for n, c, k, m in ((128, 64, 3, 16), (64, 128, 1, 1000), (72, 512, 1, 5))
    )
    assert sum(a.nbytes for name, a in stored.items() if re.search(r"\.(words|scale)$", name)) == formula
    total = sum(a.nbytes for name, a in stored.items() if not name.startswith("0."))
    assert total == pytest.approx(formula, rel=0.01)
    assert {name for name in stored if name[0].isdigit()} == {
        "0.weight",
        "0.bias",
        *(f"{layer}.weight.{part}" for layer in (1, 2, 5) for part in ("words", "scale")),
    }
    assert stored["1.weight.words"].shape == (1, 128, 9, 8)
    assert stored["1.weight.words"].dtype == np.uint8
    assert stored["1.weight.scale"].shape == (8,)
    assert binary_file.stat().st_size < formula + stored["0.weight"].nbytes + 12_000  # bodies, names and shapes


def test_words_are_the_signs_of_the_latent_weights(rng: np.random.Generator, tmp_path: Path) -> None:
    layer = QuantLinear(13, 5, group=2)
    layer.weight.data[0, 0] = 0
    export(layer, (13,), tmp_path / "model.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    latent = layer.weight.detach().numpy()
    np.testing.assert_array_equal(stored["weight.words"][0, :, 0], pack(np.where(latent >= 0, 1, -1), "u1"))
    means = [np.abs(latent[i : i + 2]).mean(dtype=np.float64) for i in (0, 2, 4)]
    np.testing.assert_allclose(stored["weight.scale"], means, rtol=1e-6)


def test_the_batch_is_open(binary_file: Path, rng: np.random.Generator) -> None:
    (graph_input,) = onnx.load(binary_file).graph.input
    assert graph_input.name == "x"
    assert graph_input.type.tensor_type.shape.dim[0].dim_param
    session, x = oracle(binary_file), dyadic(rng, (3, 2, 16, 16))
    (together,) = session.run(["y"], {"x": x})
    single = [session.run(["y"], {"x": x[i : i + 1]})[0] for i in range(3)]
    np.testing.assert_array_equal(together, np.concatenate(single))


def test_exporting_leaves_the_network_as_it_was_and_is_repeatable(tmp_path: Path) -> None:
    network = nn.Sequential(nn.BatchNorm2d(8), QuantConv2d(8, 8, 3), nn.Dropout()).train()
    before = copy.deepcopy(network.state_dict())
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for file in files:
        export(network, (8, 5, 5), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert [type(m) for m in network] == [nn.BatchNorm2d, QuantConv2d, nn.Dropout]
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(Exception, match="export"):
        export(nn.Sequential(QuantConv2d(8, 8, 3)), (7, 5, 5), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_deployed_network_is_the_trained_one(rng: np.random.Generator) -> None:
    """Up to the rounding of the batch norm's scale and shift."""
    network = nn.Sequential(
        QuantConv2d(9, 20, 3, 2, (1, 0, 2, 1), group=3, bias=True, input_scale=True),
        nn.BatchNorm2d(20),
        nn.Flatten(),
        QuantLinear(80, 12, group=5, bias=True, input_scale=True),
        nn.BatchNorm1d(12),
        nn.Dropout(),
    )
    randomise(network, rng)
    deployed = deploy(network)
    names = [type(m).__name__ for m in deployed]
    assert names == ["BitConv2d", "ChannelAffine", "Flatten", "BitLinear", "ChannelAffine", "Identity"]
    assert type(deploy(network[0])).__name__ == "BitConv2d"
    for layers, shape in ((slice(0, 2), (4, 9, 4, 5)), (slice(3, 6), (4, 80))):  # a sign may flip between the two
        x = torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32))
        with torch.no_grad():
            torch.testing.assert_close(deployed[layers](x), network[layers](x), rtol=1e-5, atol=1e-5)  # type: ignore


def test_a_batch_norm_without_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use track_running_stats=True"):
        export(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), (3, 4, 4), tmp_path / "model.onnx")


# Inspection --------------------------------------------------------------------------------------------------------


def test_inspection(binary_file: Path) -> None:
    found = inspection.inspect(binary_file)
    assert found.file_bytes == binary_file.stat().st_size
    stem = found.layers[0]
    assert [(layer.name, layer.operator, layer.method) for layer in found.layers] == [
        ("0", "Conv", "float"),
        ("1", "Conv", "1w1a/16"),
        ("2", "Conv", "1w1a/64"),  # a group is no larger than the layer
        ("5", "Gemm", "1w1a/5"),
    ]
    assert stem.why_float == "weights are float"
    assert not any(layer.why_float for layer in found.layers[1:])
    # the stem gives 8x8; the first layer with strides (2, 1) and pads (1, 0, 1, 2) gives 4x8; the pool 2x4
    assert [layer.float_macs for layer in found.layers] == [64 * 2 * 9 * 8 * 8, 0, 0, 0]
    assert [layer.binary_macs for layer in found.layers] == [0, 128 * 64 * 9 * 4 * 8, 64 * 128 * 4 * 8, 72 * 512]
    assert [layer.stored_bytes for layer in found.layers] == [
        4 * 64 * 2 * 9,
        128 * 64 * 9 // 8 + 4 * 8,
        64 * 128 // 8 + 4,
        72 * 512 // 8 + 4 * 15,
    ]
    for layer, weights in zip(found.layers, (64 * 2 * 9, 128 * 64 * 9, 64 * 128, 72 * 512), strict=True):
        assert layer.float_bytes == 4 * weights
        assert layer.bits_per_weight == pytest.approx(8 * layer.stored_bytes / weights)
    parameters = 4 * (64 * 2 * 9 + 64 + 128 * 64 * 9 + 64 * 128 + 72 * 512)
    assert found.float_bytes == pytest.approx(parameters, rel=1e-3)  # scales count as parameters too


def test_inspection_of_a_network(small_model: Path) -> None:
    layers = inspection.inspect(small_model).layers
    assert [layer.method for layer in layers] == ["float", "1w1a/16", "1w1a/16", "float"]
    assert [layer.operator for layer in layers] == ["Conv", "Conv", "Conv", "Gemm"]
    assert [layer.binary_macs for layer in layers] == [0, 64 * 16 * 9 * 64, 40 * 64 * 9 * 16, 0]


# Files written by hand ---------------------------------------------------------------------------------------------


Inputs = Sequence[tuple[str, int, Sequence[int | str]]]
X: Inputs = [("x", TensorProto.FLOAT, ["batch", 4, 6, 6])]


def node(op_type: str, inputs: list[str], output: str, /, **attributes: Any) -> onnx.NodeProto:
    domain = opset.DOMAIN if op_type in opset.FUNCTIONS else ""
    name = f"the {op_type}" if output == "y" else f"{output} {op_type}"
    return helper.make_node(op_type, inputs, output.split(","), name=name, domain=domain, **attributes)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray] | None = None,
    inputs: Inputs = X,
    version: int = opset.VERSION,
) -> Path:
    """A file with output ``y``; our operators keep their bodies."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", "c", "d"])],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid(opset.DOMAIN, version)]
    functions = [
        opset.FUNCTIONS[name].to_function_proto() for name in sorted({n.op_type for n in nodes} & set(opset.FUNCTIONS))
    ]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10, functions=functions)
    onnx.save(model, path)
    return path


def test_why_a_layer_is_float(tmp_path: Path) -> None:
    """Four convolutions, of which the last two differ in one operand from a binary one."""
    words, weight = np.zeros((1, 8, 9, 1), np.uint8), np.ones((8, 4, 3, 3), np.float32)
    unpacked = [
        node("UnpackCodes", ["words"], "flat signs", channels=4, ratios=[2], shift=-1),
        node("Reshape", ["flat signs", "shape"], "signs"),
    ]
    shape = np.array([8, 4, 3, 3])
    cases: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], str]] = {
        "weights": ([node("Conv", ["x", "weight"], "y")], {"weight": weight}, "weights are float"),
        "signs": (
            [node("BinarySign", ["x"], "s"), node("Conv", ["s", "weight"], "y")],
            {"weight": weight},
            "weights are float, activations have 1 bit(s)",
        ),
        "activations": (
            [*unpacked, node("Conv", ["x", "signs"], "y")],
            {"words": words, "shape": shape},
            "activations are float",
        ),
        "computed": (
            [node("Abs", ["weight"], "w"), node("Conv", ["x", "w"], "y")],
            {"weight": weight},
            "weights are computed",
        ),
        "neither": (
            [*unpacked, node("BinarySign", ["x"], "s"), node("Conv", ["s", "signs"], "y")],
            {"words": words, "shape": shape},
            "",
        ),
    }
    for name, (nodes, constants, why) in cases.items():
        (layer,) = inspection.inspect(save(tmp_path / f"{name}.onnx", nodes, constants)).layers
        assert layer.why_float == why, name
        packed = "1w32a" if name == "activations" else "float"
        assert layer.method == (packed if why else "1w1a"), name
        assert (layer.binary_macs, layer.float_macs) == ((0, 8 * 4 * 9 * 16) if why else (8 * 4 * 9 * 16, 0)), name


def binary_conv(**attributes: Any) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """sign(x) * signs, 4 -> 8 channels, 3x3 (of 2 channels where there are 2 groups)."""
    channels = 4 // int(attributes.get("group", 1))
    nodes = [
        node("BinarySign", ["x"], "s"),
        node("UnpackCodes", ["words"], "flat signs", channels=channels, ratios=[2], shift=-1),
        node("Reshape", ["flat signs", "shape"], "signs"),
        node("Conv", ["s", "signs"], "y", **attributes),
    ]
    return nodes, {"words": np.zeros((1, 8, 9, 1), np.uint8), "shape": np.array([8, channels, 3, 3])}


WEIGHT = {"weight": np.ones((8, 4, 3, 3), np.float32)}
ROWS = {"rows": np.ones((4, 5), np.float32)}
FLAT: Inputs = [("x", TensorProto.FLOAT, ["batch", 4])]

# name -> (nodes, constants, inputs, what the sentence says)
REFUSED: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], Inputs, str]] = {
    "operator": (
        [node("Sin", ["x"], "y")],
        {},
        X,
        "node 'the Sin' (Sin): operator Sin is not supported; the supported",
    ),
    "second output": (
        [node("MaxPool", ["x"], "y,indices", kernel_shape=[2, 2])],
        {},
        X,
        "node 'y,indices MaxPool': MaxPool with 2 outputs is not supported",
    ),
    "int64 input": (
        [node("Cast", ["x"], "y", to=1)],
        {},
        [("x", TensorProto.INT64, ["batch", 4, 6, 6])],
        "input 'x' is not float32, the one input type supported so far",
    ),
    "fixed batch": (
        [node("Relu", ["x"], "y")],
        {},
        [("x", TensorProto.FLOAT, [3, 4, 6, 6])],
        "input 'x' has a fixed batch of 3, asked for 1",
    ),
    "no batch": (
        [node("Relu", ["x"], "y")],
        {},
        [("x", TensorProto.FLOAT, [])],
        "input 'x' has a fixed batch of no dimension, asked for 1",
    ),
    "open height": (
        [node("Relu", ["x"], "y")],
        {},
        [("x", TensorProto.FLOAT, ["batch", 4, "h", 6])],
        "'x' has the open shape|export with fixed height and width",
    ),
    "grouped binary convolution": (
        *binary_conv(group=2),
        X,
        "node 'the Conv' (Conv): a convolution of codes with group = 2 is not supported: use group = 1",
    ),
    "auto_pad": (
        *binary_conv(auto_pad="SAME_UPPER"),
        X,
        "node 'the Conv' (Conv): auto_pad and ceil_mode are not supported: export with explicit pads",
    ),
    "float auto_pad": (
        [node("Conv", ["x", "weight"], "y", auto_pad="SAME_LOWER")],
        WEIGHT,
        X,
        "node 'the Conv' (Conv): auto_pad and ceil_mode are not supported",
    ),
    "ceil_mode": (
        [node("MaxPool", ["x"], "y", kernel_shape=[4, 4], ceil_mode=1)],
        {},
        X,
        "node 'the MaxPool' (MaxPool): auto_pad and ceil_mode are not supported",
    ),
    "Accumulator of a float": (
        [node("Conv", ["x", "weight"], "sums"), node("Accumulator", ["sums"], "y")],
        WEIGHT,
        X,
        "(ai.crossbit::Accumulator): it marks the integer sum of codes and coded weights, and its input is none",
    ),
    "Accumulator of the input": (
        [node("Accumulator", ["x"], "y")],
        {},
        X,
        "node 'the Accumulator' (ai.crossbit::Accumulator): it marks the integer sum",
    ),
    "sign of rank 3": (
        [node("BinarySign", ["x"], "y")],
        {},
        [("x", TensorProto.FLOAT, ["batch", 4, 6])],
        "codes of a tensor of rank 3: flatten it to [N, C] or use [N, C, H, W]",
    ),
    "1-d convolution": (
        [node("Conv", ["x", "weight"], "y")],
        {"weight": np.ones((8, 4, 3), np.float32)},
        [("x", TensorProto.FLOAT, ["batch", 4, 6])],
        "node 'the Conv' (Conv): only 2-d convolutions with constant weights are supported",
    ),
    "computed weights": (
        [node("Conv", ["x", "x"], "y")],
        {},
        [("x", TensorProto.FLOAT, ["batch", 1, 3, 3])],
        "node 'the Conv' (Conv): only 2-d convolutions with constant weights are supported",
    ),
    "alpha": (
        [node("Gemm", ["x", "rows"], "y", alpha=0.5)],
        ROWS,
        FLAT,
        "node 'the Gemm' (Gemm): alpha, beta and transA are not supported: fold them into the weights",
    ),
    "product of activations": (
        [node("MatMul", ["x", "x"], "y")],
        {},
        X,
        "node 'the MatMul' (MatMul): only matrix products of [N, C] activations with constant weights are supported",
    ),
    "average without the padding": (
        [node("AveragePool", ["x"], "y", kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
        {},
        X,
        "(AveragePool): padding with count_include_pad = 0 is not supported: use count_include_pad=True",
    ),
    "ranks": (
        [node("Sub", ["one", "x"], "y")],
        {"one": np.ones((), np.float32)},
        X,
        "node 'the Sub' (Sub): shapes [] and [1, 4, 6, 6]: only equal ranks are supported",
    ),
    "mean over channels": (
        [node("ReduceMean", ["x", "axes"], "y", keepdims=0)],
        {"axes": np.array([1])},
        X,
        "(ReduceMean): the mean over axes [1] without keepdims is not supported: use keepdims, or axes 2 and 3",
    ),
    "reflection": (
        [node("Pad", ["x", "pads"], "y", mode="reflect")],
        {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
        X,
        "node 'the Pad' (Pad): only padding with a constant is supported",
    ),
    "cropping": (
        [node("Pad", ["x", "pads"], "y")],
        {"pads": np.array([0, 0, -1, 0, 0, 0, 0, 0])},
        X,
        "node 'the Pad' (Pad): only padding with a constant is supported",
    ),
}


def load(path: Path) -> Any:
    return importer.load(path, 1, targets.host())


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_importer_refuses(case: str, tmp_path: Path) -> None:
    nodes, constants, inputs, sentences = REFUSED[case]
    path = save(tmp_path / "model.onnx", nodes, constants, inputs)
    for sentence in sentences.split("|"):
        with pytest.raises(ValueError, match=re.escape(sentence)) as refusal:
            load(path)
        assert "\n" not in str(refusal.value)


def test_what_is_supported_is_not_refused(tmp_path: Path) -> None:
    """The frame of the refusals itself is fine."""
    nodes, constants = binary_conv()
    assert load(save(tmp_path / "model.onnx", nodes, constants))["main"] is not None


@pytest.mark.parametrize("read", [load, inspection.inspect], ids=["importer", "inspection"])
def test_a_newer_domain_is_refused(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", [node("BinarySign", ["x"], "y")], version=3)
    with pytest.raises(ValueError, match=r"model\.onnx: ai\.crossbit version 3; this crossbit reads version 2"):
        read(path)


@pytest.mark.parametrize("read", [load, inspection.inspect], ids=["importer", "inspection"])
@pytest.mark.parametrize("content", ["none", "empty", "text", "half", "zeros", "folder"])
def test_what_is_no_model_is_refused(
    content: str, read: Callable[[Path], Any], small_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    if content == "folder":
        path.mkdir()
    elif content != "none":
        whole = small_model.read_bytes()
        path.write_bytes(
            {"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2], "zeros": bytes(99)}[content]
        )
    sentence = "there is no such file" if content in ("none", "folder") else "not a valid ONNX model"
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {sentence}"):
        read(path)


@pytest.mark.parametrize("batch", [1, 7])
def test_the_batch_that_is_asked_for(batch: int, small_model: Path) -> None:
    model = onnx_file.read(small_model, batch)
    assert [onnx_file.shape(v) for v in model.graph.inputs] == [(batch, 1, 8, 8)]
    assert [onnx_file.shape(v) for v in model.graph.outputs] == [(batch, 10)]
    assert {n.op_type for n in model.graph if n.domain == opset.DOMAIN} == {
        "BinarySign",
        "UnpackCodes",
        "GroupScale",
        "Accumulator",
    }


def test_a_function_of_another_domain_is_inlined(tmp_path: Path) -> None:
    doubled = helper.make_function(
        "their.domain",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 20)],
    )
    path = save(tmp_path / "model.onnx", [helper.make_node("Twice", ["x"], ["y"], domain="their.domain")])
    proto = onnx.load(path)
    proto.functions.append(doubled)
    proto.opset_import.append(helper.make_opsetid("their.domain", 1))
    onnx.save(proto, path)
    assert [n.op_type for n in onnx_file.read(path, 1).graph] == ["Add"]


# The domain --------------------------------------------------------------------------------------------------------


def test_bodies_of_our_operators(rng: np.random.Generator, tmp_path: Path) -> None:
    """By ONNX Runtime: the sign of zeros and NaN, bits in their order, groups, and the integer behind a float."""
    x = rng.choice(np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45, 2.0], np.float32), (1, 4, 6, 6))
    path = save(tmp_path / "sign.onnx", [node("BinarySign", ["x"], "y")])
    np.testing.assert_array_equal(oracle(path).run(None, {"x": x})[0], np.where(x >= 0, 1, -1))

    for code in (BINARY, TERNARY, odd(3), unsigned(2)):
        values = rng.choice(np.array(code.values), (3, 5, 13))  # [O, T, C]
        attributes = {"channels": 13, "ratios": list(code.ratios), "shift": code.shift}
        nodes = [node("UnpackCodes", ["words"], "u", **attributes), node("Add", ["x", "u"], "y")]
        words = pack(encode(values, code), "u1")
        path = save(tmp_path / "unpack.onnx", nodes, {"words": words}, [("x", TensorProto.FLOAT, [1])])
        found = oracle(path).run(None, {"x": np.zeros(1, np.float32)})[0]
        np.testing.assert_array_equal(found, values.transpose(0, 2, 1))

    scale = rng.random(3).astype(np.float32)
    nodes = [node("GroupScale", ["scale"], "s", group=4, filters=10), node("Add", ["x", "s"], "y")]
    path = save(tmp_path / "scale.onnx", nodes, {"scale": scale}, [("x", TensorProto.FLOAT, [1])])
    result = oracle(path).run(None, {"x": np.zeros(1, np.float32)})[0]
    np.testing.assert_array_equal(result, np.repeat(scale, 4)[:10])

    sums = rng.integers(-(1 << 24) + 1, 1 << 24, (1, 4, 6, 6)).astype(np.float32)
    path = save(tmp_path / "sum.onnx", [node("Accumulator", ["x"], "y")])
    np.testing.assert_array_equal(oracle(path).run(None, {"x": sums})[0], sums)
