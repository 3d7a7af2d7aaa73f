"""VGG-7 of the CIFAR-10 tables of TWN, TBN and cross-filter compression: 6 quantised layers, 12.96 M weights.

2x128C3 MP2, 2x256C3 MP2, 2x512C3 MP2, 1024FC, classes (papers' section 1.6).
"""

from __future__ import annotations

from torch import nn

from pipeline.models import ImageShape, Quantize, classifier, conv2d, first_conv2d, linear


def build(image_shape: ImageShape, classes: int, quantize: Quantize | None) -> nn.Module:
    """Float conv, 5 times BN -> sign -> conv, BN -> sign -> dense, BN -> ReLU -> linear; a max pool every 2 convs."""
    channels, height, width = image_shape
    layers: list[nn.Module] = [first_conv2d(channels, 128, 3, quantize, padding=1)]
    for c_in, c_out, pool in (
        (128, 128, True),
        (128, 256, False),
        (256, 256, True),
        (256, 512, False),
        (512, 512, True),
    ):
        layers += [nn.BatchNorm2d(c_in), conv2d(c_in, c_out, 3, quantize, padding=1)]
        layers += [nn.MaxPool2d(2)] if pool else []
    features = 512 * (height // 8) * (width // 8)
    layers += [nn.BatchNorm2d(512), nn.Flatten(), linear(features, 1024, quantize)]
    return nn.Sequential(*layers, nn.BatchNorm1d(1024), nn.ReLU(), *classifier(1024, classes, quantize))
