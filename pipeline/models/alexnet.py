"""AlexNet as cross-filter compression trains it on ImageNet: one tower, batch norms, 6 quantised layers.

Lyu et al., arXiv 2005.09034, section 5 (details: papers' section 1.6): 96C11/4 MP, 256C5 MP, 2x(384C3), 256C3 MP,
2x(4096), classes; MP is 3x3 of stride 2; images of 227x227. Left out: the ReLU that the paper's code base has behind a
quantised layer, and its dropout between the sign and the weights of the second dense layer, where a zero is no sign.
"""

from __future__ import annotations

from torch import nn

from pipeline.models import ImageShape, Quantize, classifier, conv2d, first_conv2d, linear


def _side(pixels: int) -> int:
    """Of the last convolution's output."""
    side = (pixels - 11) // 4 + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return side


def build(image_shape: ImageShape, classes: int, quantize: Quantize | None, *, dropout: float = 0.5) -> nn.Module:
    """Float conv -> BN -> ReLU, 4 times BN -> sign -> conv, twice BN -> sign -> dense, BN -> ReLU -> dropout -> linear.

    Args:
        dropout: the share of the last layer's inputs that is dropped while training.

    Raises:
        ValueError: an image of which the pools leave nothing.
    """
    channels, height, width = image_shape
    if min(height, width) < 67:
        raise ValueError(f"alexnet needs sides of at least 67, not images of {image_shape}")
    features = 256 * _side(height) * _side(width)
    return nn.Sequential(
        first_conv2d(channels, 96, 11, quantize, stride=4, bias=True),
        nn.BatchNorm2d(96),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.BatchNorm2d(96),
        conv2d(96, 256, 5, quantize, padding=2),
        nn.MaxPool2d(3, 2),
        nn.BatchNorm2d(256),
        conv2d(256, 384, 3, quantize, padding=1),
        nn.BatchNorm2d(384),
        conv2d(384, 384, 3, quantize, padding=1),
        nn.BatchNorm2d(384),
        conv2d(384, 256, 3, quantize, padding=1),
        nn.MaxPool2d(3, 2),
        nn.BatchNorm2d(256),
        nn.Flatten(),
        linear(features, 4096, quantize),
        nn.BatchNorm1d(4096),
        linear(4096, 4096, quantize),
        nn.BatchNorm1d(4096),
        nn.ReLU(),
        nn.Dropout(dropout),
        *classifier(4096, classes, quantize),
    )
