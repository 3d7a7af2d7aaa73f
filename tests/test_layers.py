"""Quantised layers against a convolution written as its definition, in NumPy (float64)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import quantizers
from pipeline.layers import QuantConv2d, QuantLinear, constrain_, pad, penalty, taps_first, unfold


def signs(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, -1.0)


def shared_scale(weight: np.ndarray, group: int) -> np.ndarray:
    return np.array([np.abs(weight[i // group * group :][:group]).mean() for i in range(len(weight))])


def convolve(
    x: np.ndarray, weight: np.ndarray, stride: tuple[int, int], pads: tuple[int, ...], dilation: tuple[int, int]
) -> np.ndarray:
    """[N, C, H, W] by [O, C, KH, KW]; pads is (top, left, bottom, right)."""
    x = np.pad(x, [(0, 0), (0, 0), pads[::2], pads[1::2]])
    (n, _, h, w), (o, _, kh, kw) = x.shape, weight.shape
    oh = (h - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (w - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = np.zeros((n, o, oh, ow))
    for i, j, a, b in itertools.product(range(oh), range(ow), range(kh), range(kw)):
        pixel = x[:, :, i * stride[0] + a * dilation[0], j * stride[1] + b * dilation[1]]
        y[:, :, i, j] += pixel @ weight[:, :, a, b].T
    return y


@pytest.mark.parametrize("input_scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), 0, (1, 1)),
        ((3, 3), (1, 1), 1, (1, 1)),
        ((3, 2), (2, 1), (1, 0, 2, 1), (1, 1)),
        ((2, 3), (1, 3), (0, 3, 1, 0), (1, 1)),
        ((3, 2), (2, 1), (2, 1, 0, 3), (1, 2)),
    ],
)
def test_conv2d(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: int | tuple[int, int, int, int],
    dilation: tuple[int, int],
    group: int,
    bias: bool,
    input_scale: bool,
    rng: np.random.Generator,
) -> None:
    layer = QuantConv2d(3, 5, kernel, stride, padding, dilation, bias, group=group, input_scale=input_scale)
    x = rng.normal(size=(2, 3, 7, 8)).astype(np.float32)
    if input_scale and dilation != (1, 1):
        with pytest.raises(ValueError, match="input_scale with dilation is not supported"):
            layer(torch.from_numpy(x))
        return
    weight = layer.weight.detach().double().numpy()
    pads = (padding,) * 4 if isinstance(padding, int) else padding
    expected = convolve(signs(x), signs(weight), stride, pads, dilation)
    expected *= shared_scale(weight, group)[:, None, None]
    if input_scale:
        window = np.full((1, 1, *kernel), 1 / (kernel[0] * kernel[1]))
        expected *= convolve(np.abs(x).mean(1, keepdims=True), window, stride, pads, dilation)
    if layer.bias is not None:
        expected += layer.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("input_scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_linear(group: int, bias: bool, input_scale: bool, rng: np.random.Generator) -> None:
    layer = QuantLinear(33, 7, bias, group=group, input_scale=input_scale)
    x = rng.normal(size=(4, 33)).astype(np.float32)
    weight = layer.weight.detach().double().numpy()
    expected = signs(x) @ signs(weight).T * shared_scale(weight, group)
    if input_scale:
        expected *= np.abs(x).mean(1, keepdims=True)
    if layer.bias is not None:
        expected += layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter_and_the_input(rng: np.random.Generator) -> None:
    model = nn.Sequential(QuantConv2d(2, 4, 3, bias=True, group=2), nn.Flatten(), QuantLinear(4, 3, bias=True))
    x = torch.from_numpy(rng.normal(0, 0.5, (5, 2, 3, 3)).astype(np.float32)).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_constrain_reaches_nested_layers() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sequential(QuantConv2d(2, 4, 3), QuantLinear(4, 3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100)
    before = model[0].weight.clone()
    constrain_(model)
    assert torch.equal(model[0].weight, before)
    assert all(p.abs().max() <= 1 for p in model[1].parameters())


def test_penalty_sums_over_layers() -> None:
    layers = QuantConv2d(2, 4, 3, weight="binarynet"), QuantLinear(4, 3, weight="binarynet"), QuantLinear(4, 3)
    expected = sum((1 - layer.weight.square()).sum() for layer in layers[:2]) * 5e-7
    torch.testing.assert_close(penalty(nn.Sequential(*layers)), expected)
    assert penalty(layers[2]) == 0


@pytest.mark.parametrize("activation", quantizers.activations())
@pytest.mark.parametrize("weight", quantizers.weights())
def test_every_pair_trains(weight: str, activation: str, seed: int) -> None:
    chosen: dict[str, Any] = {"weight": weight, "activation": activation, "gradient_bits": 8}
    model = nn.Sequential(
        QuantConv2d(2, 6, 3, padding=1, **chosen), nn.BatchNorm2d(6), nn.Flatten(), QuantLinear(150, 3, **chosen)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = (torch.randn(4, 2, 5, 5) / 2).requires_grad_()
    loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])) + penalty(model)
    loss.backward()
    optimizer.step()
    constrain_(model)
    assert loss.isfinite()
    for parameter in (x, *model.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0
        assert parameter.isfinite().all()
    assert model.eval()(x).isfinite().all()


GEOMETRIES = [
    ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    ((3, 2), (2, 1), (1, 0, 2, 1), (1, 1)),
    ((2, 3), (1, 3), (0, 3, 1, 0), (2, 2)),
    ((3, 2), (3, 2), (1, 1, 1, 1), (1, 3)),
]


@pytest.mark.parametrize(("kernel", "stride", "pads", "dilation"), GEOMETRIES)
def test_unfold(
    kernel: tuple[int, int], stride: tuple[int, int], pads: tuple[int, ...], dilation: tuple[int, int], seed: int
) -> None:
    x = pad(torch.randn(2, 3, 9, 8), pads)
    found, expected = unfold(x, kernel, stride, dilation), nn.functional.unfold(x, kernel, dilation, 0, stride)
    taps = kernel[0] * kernel[1]
    assert torch.equal(found.flatten(2), expected.view(2, 3, taps, -1).transpose(1, 2).flatten(1, 2))
    weight = torch.randn(5, 3, *kernel)
    direct = nn.functional.conv2d(x, weight, None, stride, 0, dilation)
    torch.testing.assert_close(nn.functional.conv2d(found, taps_first(weight)), direct, rtol=1e-4, atol=1e-4)


def test_unfold_is_slices_and_a_concatenation_in_onnx() -> None:
    class Windows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return unfold(x, (3, 2), (2, 1), (1, 1))

    program = torch.onnx.export(Windows().eval(), (torch.zeros(1, 2, 7, 6),), dynamo=True, verbose=False)
    assert program is not None
    assert {node.op_type for node in program.model.graph} <= {"Slice", "Concat", "Constant"}


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize(("kernel", "stride", "pads", "dilation"), GEOMETRIES)
def test_every_window_is_quantised_on_its_own(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilation: tuple[int, int],
    order: int,
    rng: np.random.Generator,
) -> None:
    """y = a_t sum_j b_j <H_j, B_t> with b_j and H_j of the window (HORQ), zeros around the image included."""
    horq: dict[str, Any] = {"activation": "horq", "activation_options": {"order": order}, "group": 2}
    layer = QuantConv2d(3, 5, kernel, stride, pads, dilation, True, **horq)
    x = rng.normal(size=(2, 3, 9, 8)).astype(np.float32)
    weight, padded = layer.weight.detach().double().numpy(), np.pad(x, [(0, 0), (0, 0), pads[::2], pads[1::2]])
    y = layer(torch.from_numpy(x)).detach().numpy()
    for i, j in itertools.product(range(y.shape[2]), range(y.shape[3])):
        top, left = i * stride[0], j * stride[1]
        rows = slice(top, top + (kernel[0] - 1) * dilation[0] + 1, dilation[0])
        columns = slice(left, left + (kernel[1] - 1) * dilation[1] + 1, dilation[1])
        window = padded[:, :, rows, columns].astype(np.float64)
        rest, sure = window, np.ones(2, bool)
        for plane in range(order):
            # what a plane leaves of a padded tap can be 0, whose sign float32 may find otherwise
            sure &= plane == 0 or (np.abs(rest) > 1e-6).all((1, 2, 3))
            rest = rest - np.abs(rest).mean((1, 2, 3), keepdims=True) * signs(rest)
        expected = np.einsum("nchw,ochw->no", window - rest, signs(weight)) * shared_scale(weight, 2)
        expected += layer.bias.detach().numpy()
        np.testing.assert_allclose(y[sure, :, i, j], expected[sure], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["tbn", "dorefa", "pixels", "binarynet", "real"])
@pytest.mark.parametrize(("kernel", "stride", "pads", "dilation"), GEOMETRIES)
def test_zeros_lie_around_the_codes(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilation: tuple[int, int],
    activation: str,
    rng: np.random.Generator,
) -> None:
    layer = QuantConv2d(3, 5, kernel, stride, pads, dilation, weight="twn", activation=activation).eval()
    x = torch.from_numpy(rng.normal(size=(2, 3, 9, 8)).astype(np.float32))
    codes, weight = layer.activation_quantizer(x), layer.weight_quantizer.encode(layer.weight).dequantize()
    expected = convolve(codes.double().numpy(), weight.double().numpy(), stride, pads, dilation)
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 32])
def test_gradient_bits(bits: int, seed: int) -> None:
    layer = QuantLinear(6, 4, True, activation="real", gradient_bits=bits)
    g = torch.randn(3, 4)
    layer(torch.randn(3, 6)).backward(g)
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, g.sum(0)) == (bits == 32)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"weight": "ternary9"}, "no weight quantiser 'ternary9': choose one of bc, binarynet, bwn"),
        ({"weight": "xnor"}, "no weight quantiser 'xnor'"),
        ({"activation": "bwn"}, "no activation quantiser 'bwn': choose one of binarynet, bnn"),
        ({"group": 0}, "group = 0"),
        ({"weight": "bc", "group": 4}, "group = 4: weight 'bc' has no scale per filter to share, use group=1"),
        ({"weight": "twn", "group": 4}, "group = 4: twn shares one scale per layer"),
        ({"weight_options": {"bits": 2}}, "weight 'bwn' has no option 'bits': choose from gradient"),
        ({"weight_options": {"group": 2}}, "weight 'bwn' has no option 'group': choose from gradient"),
        ({"activation_options": {"bits": 2}}, "activation 'xnor' has no option 'bits': it has none, leave it out"),
        ({"weight": "dorefa", "weight_options": {"bits": 9}}, "bits = 9: give an integer from 1 to 8"),
        ({"activation": "horq", "input_scale": True}, "input_scale is the scale of signs, and activation is 'horq'"),
        ({"activation": "real", "input_scale": True}, "use 'xnor' or 'bnn'"),
        ({"gradient_bits": 33}, "gradient_bits = 33: give an integer from 1 to 32"),
    ],
)
def test_refusals(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        QuantConv2d(2, 4, 3, **arguments)
    with pytest.raises(ValueError, match=sentence):
        QuantLinear(2, 4, **arguments)
