"""ResNet-18 with a shortcut around every convolution, so that each binary one adds to a float stream.

He et al., 2016; Liu et al., Bi-Real Net, 2018. CF quantises the same 16 convolutions and leaves the shortcuts float.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from pipeline.models import GlobalAverage, ImageShape, Quantize, classifier, conv2d, first_conv2d


class Block(nn.Module):
    """x + conv(sign(BN(x))); where the image is halved, the shortcut is average pool -> float 1x1 conv -> BN."""

    def __init__(self, c_in: int, c_out: int, stride: int, quantize: Quantize | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(c_in)
        self.conv = conv2d(c_in, c_out, 3, quantize, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride == 2:
            conv = nn.Conv2d(c_in, c_out, 1, bias=False)
            self.shortcut = nn.Sequential(nn.AvgPool2d(2), conv, nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv(self.norm(x))


def build(
    image_shape: ImageShape,
    classes: int,
    quantize: Quantize | None,
    *,
    width: int = 64,
    stem: Literal["cifar", "imagenet"] = "cifar",
) -> nn.Module:
    """Stem, 4 stages of 4 blocks, BN -> ReLU -> average -> linear.

    Args:
        width: channels of the first stage; each later stage doubles them and halves the image.
        stem: 'cifar' is a 3x3 convolution, 'imagenet' a 7x7 of stride 2 and a 3x3 max pool of stride 2.

    Raises:
        ValueError: an image that cannot be halved as often as the network does.
    """
    least = 8 if stem == "cifar" else 32
    if image_shape[1] % least or image_shape[2] % least:
        raise ValueError(f"resnet18 with the {stem} stem needs sides divisible by {least}, not images of {image_shape}")
    layers = [first_conv2d(image_shape[0], width, 3, quantize, padding=1)]
    if stem == "imagenet":
        layers = [first_conv2d(image_shape[0], width, 7, quantize, stride=2, padding=3), nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage in range(4):
        for block in range(4):
            stride = 2 if stage > 0 and block == 0 else 1
            layers += [Block(channels, channels * stride, stride, quantize)]
            channels *= stride
    head = [nn.BatchNorm2d(channels), nn.ReLU(), GlobalAverage(), *classifier(channels, classes, quantize)]
    return nn.Sequential(*layers, *head)
