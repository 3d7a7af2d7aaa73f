"""VGG-16 as CIFAR papers use it: 13 convolutions, the inner 12 quantised, and one linear layer.

Simonyan and Zisserman, 2015; a batch norm before every convolution but the first.
"""

from __future__ import annotations

from torch import nn

from pipeline.models import GlobalAverage, ImageShape, Quantize, classifier, conv2d, first_conv2d

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def build(image_shape: ImageShape, classes: int, quantize: Quantize | None) -> nn.Module:
    """Float conv, 12 times BN -> sign -> conv, a max pool behind each stage, BN -> ReLU -> average -> linear.

    Raises:
        ValueError: an image that has not the 5 halves of the pools.
    """
    channels, height, width = image_shape
    if min(height, width) < 32:
        raise ValueError(f"vgg16 needs sides of at least 32, not images of {image_shape}")
    layers: list[nn.Module] = []
    for stage in _STAGES:
        for c_out in stage:
            if not layers:
                layers += [first_conv2d(channels, c_out, 3, quantize, padding=1)]
            else:
                layers += [nn.BatchNorm2d(channels), conv2d(channels, c_out, 3, quantize, padding=1)]
            channels = c_out
        layers += [nn.MaxPool2d(2)]
    head = [nn.BatchNorm2d(channels), nn.ReLU(), GlobalAverage(), *classifier(channels, classes, quantize)]
    return nn.Sequential(*layers, *head)
