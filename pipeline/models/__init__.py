"""The networks by name: this folder is the registry, a file without a leading underscore is a member.

A member defines ``build(image_shape, classes, quantize, *, ...) -> nn.Module``. Its keyword-only arguments, each with a
default, are the options of a recipe's ``[model]``. The first and the last layer are always float.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.quantizers.bwn import Gradient

ImageShape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class Quantize:
    """How the inner layers are quantised: the arguments of `pipeline.layers.QuantConv2d`. None: the float twin.

    Raises:
        ValueError: what a layer would refuse.
    """

    weight: str = "bwn"
    activation: str = "sign"
    group: int = 16
    input_scale: bool = False
    gradient: Gradient = "published"

    def __post_init__(self) -> None:
        with torch.device("meta"):  # so that the layer made for its refusals draws no random numbers
            QuantLinear(1, 1, **asdict(self))


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
    """sign -> convolution of bits; in the float twin ReLU -> convolution."""
    if quantize is None:
        return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False))
    return QuantConv2d(c_in, c_out, kernel, stride, padding, **asdict(quantize))


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
