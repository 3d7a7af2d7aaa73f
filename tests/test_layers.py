"""Quantised layers against a convolution written as its definition, in NumPy (float64)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.layers import QuantConv2d, QuantLinear, constrain_


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"weight": "ternary9"}, "no quantiser 'ternary9'"),
        ({"weight": "sign"}, "'sign' quantises activations, not weights"),
        ({"activation": "bwn"}, "'bwn' quantises weights, not activations"),
        ({"group": 0}, "group = 0"),
    ],
)
def test_refusals(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        QuantConv2d(2, 4, 3, **arguments)
    with pytest.raises(ValueError, match=sentence):
        QuantLinear(2, 4, **arguments)
