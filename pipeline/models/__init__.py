"""The networks by name: this folder is the registry, a file without a leading underscore is a member.

A member defines ``build(image_shape, classes, quantize, *, ...) -> nn.Module``. Its keyword-only arguments, each with a
default, are the options of a recipe's ``[model]``. The first and the last layer are float unless `Quantize` says so.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.quantizers import ResidualQuantizer
from pipeline.stacked import Scale, StackedConv2d

ImageShape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class Stacked:
    """``[quantize.stacked]``: the arguments of `pipeline.stacked.StackedConv2d` that hold for every size of layer.

    Attributes:
        segments: s.
        bank_ratio: rho = n / m, filters of a layer per filter that they share; m is rounded up.
        scale: what a real scale belongs to.
        warmup: epochs in which selections are trained.
    """

    segments: int
    bank_ratio: int
    scale: Scale = "filter"
    warmup: int = 10

    def __post_init__(self) -> None:
        if self.bank_ratio < 1:
            raise ValueError(
                f"bank_ratio = {self.bank_ratio}: a layer shares no more filters than it has, give 1 or more"
            )


@dataclass(frozen=True)
class Quantize:
    """How a network is quantised: the arguments of `pipeline.layers.QuantConv2d`. None: the float twin.

    Attributes:
        first: quantise the first layer too (CF section 6.3); images come as 8-bit integers unless activations are real.
        last: quantise the last layer too.
        stacked: stack binary filters in the inner convolutions instead of quantising their weights with ``weight``.

    Raises:
        ValueError: what a layer would refuse.
    """

    weight: str = "bwn"
    activation: str = "xnor"
    group: int = 1
    weight_options: dict[str, Any] = field(default_factory=dict)
    activation_options: dict[str, Any] = field(default_factory=dict)
    input_scale: bool = False
    gradient_bits: int = 32
    first: bool = False
    last: bool = False
    stacked: Stacked | None = None

    def __post_init__(self) -> None:
        self._example()
        if self.stacked is not None:
            if self.input_scale or self.gradient_bits != 32:
                raise ValueError("stacked filters know neither input_scale nor gradient_bits: leave them out")
            with torch.device("meta"):
                self.conv2d(self.stacked.segments, 2 * self.stacked.bank_ratio, 3)

    def _example(self) -> QuantLinear:
        with torch.device("meta"):  # a layer made for its refusals or its bits draws no random numbers
            return QuantLinear(1, 1, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """What a layer takes."""
        return {name: value for name, value in asdict(self).items() if name not in ("first", "last", "stacked")}

    def conv2d(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = False
    ) -> QuantConv2d | StackedConv2d:
        """An inner convolution."""
        if self.stacked is None:
            return QuantConv2d(c_in, c_out, kernel, stride, padding, bias=bias, **self.arguments())
        return StackedConv2d(
            *(c_in, c_out, kernel, stride, padding),
            bias=bias,
            segments=self.stacked.segments,
            bank=-(-c_out // self.stacked.bank_ratio),
            scale=self.stacked.scale,
            group=self.group,
            activation=self.activation,
            activation_options=self.activation_options,
        )

    @property
    def real(self) -> bool:
        """Whether activations stay real, so that a nonlinearity has to come before a layer."""
        return self._example().activation_quantizer.code is None

    @property
    def label(self) -> str:
        """Bits of weights and activations, and M where filters share a scale: '1w1a/16'; stacked 'slbf-4-2w1a'."""
        layer = self._example()
        weight, activation = layer.weight_quantizer, layer.activation_quantizer
        bits = activation.code.bits if activation.code is not None else 32
        bits *= activation.order if isinstance(activation, ResidualQuantizer) else 1
        shared = f"/{self.group}" if self.group > 1 else ""
        stacked = self.stacked and f"slbf-{self.stacked.segments}-{self.stacked.bank_ratio}"
        return f"{stacked or weight.encode(layer.weight).code.bits}w{bits}a{shared}"


class GlobalAverage(nn.Module):
    """[N, C, H, W] -> [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def conv2d(
    c_in: int,
    c_out: int,
    kernel: int,
    quantize: Quantize | None,
    *,
    stride: int = 1,
    padding: int = 0,
) -> nn.Module:
    """Quantised activations -> convolution; where they are real, and in the float twin, ReLU -> convolution."""
    if quantize is None:
        return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False))
    conv = quantize.conv2d(c_in, c_out, kernel, stride, padding)
    return nn.Sequential(nn.ReLU(), conv) if quantize.real else conv


def linear(c_in: int, c_out: int, quantize: Quantize | None) -> nn.Module:
    """`conv2d`, dense."""
    if quantize is None:
        return nn.Sequential(nn.ReLU(), nn.Linear(c_in, c_out, bias=False))
    dense = QuantLinear(c_in, c_out, **quantize.arguments())
    return nn.Sequential(nn.ReLU(), dense) if quantize.real else dense


def first_conv2d(
    c_in: int,
    c_out: int,
    kernel: int,
    quantize: Quantize | None,
    *,
    stride: int = 1,
    padding: int = 0,
    bias: bool = False,
) -> nn.Module:
    """A convolution of images: float, or with ``Quantize.first`` quantised."""
    if quantize is None or not quantize.first:
        return nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=bias)
    images = replace(quantize, activation_options={}, input_scale=False)
    images = images if quantize.real else replace(images, activation="pixels")
    return QuantConv2d(c_in, c_out, kernel, stride, padding, bias=bias, **images.arguments())


def classifier(features: int, classes: int, quantize: Quantize | None) -> list[nn.Module]:
    """BN -> linear over [N, features] that come from a ReLU; float, the linear layer alone.

    The sign of what a ReLU gives is always +1: a batch norm centres it for a quantised layer.
    """
    if quantize is None or not quantize.last:
        return [nn.Linear(features, classes)]
    return [nn.BatchNorm1d(features), QuantLinear(features, classes, bias=True, **quantize.arguments())]


def names() -> list[str]:
    """Every network of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(name: str) -> Callable[..., nn.Module]:
    """The ``build`` of the network called ``name``.

    Raises:
        ValueError: there is no such network.
    """
    if name not in names():
        raise ValueError(f"there is no network '{name}': choose one of {', '.join(names())}")
    return import_module(f"{__name__}.{name}").build


def build(name: str, image_shape: ImageShape, classes: int, quantize: Quantize | None, **options: Any) -> nn.Module:
    """A new network for float32 images [N, *image_shape] -> logits [N, classes]; ``quantize`` None: its float twin."""
    return load(name)(image_shape, classes, quantize, **options)
