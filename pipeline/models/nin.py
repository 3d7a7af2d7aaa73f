"""Network in Network as cross-filter compression trains it on CIFAR-10: 9 convolutions, the inner 7 quantised.

Lyu et al., arXiv 2005.09034, section 5 (details: papers' section 1.6): 192-C5 160-C1 96-C1 MP, 192-C5 2x(192-C1) AP,
192-C3 192-C1 10-C1 and the average of the whole image. Left out: the dropout between sign and convolution that the
paper's code base has before the second 5x5 and before the 3x3, which its text does not mention.
"""

from __future__ import annotations

from torch import nn

from pipeline.layers import QuantConv2d
from pipeline.models import GlobalAverage, ImageShape, Quantize, first_conv2d


def _block(c_in: int, c_out: int, kernel: int, quantize: Quantize | None) -> list[nn.Module]:
    pad = kernel // 2
    if quantize is None:
        return [nn.Conv2d(c_in, c_out, kernel, padding=pad), nn.BatchNorm2d(c_out, 1e-4), nn.ReLU()]
    return [nn.BatchNorm2d(c_in, 1e-4), quantize.conv2d(c_in, c_out, kernel, padding=pad, bias=True), nn.ReLU()]


def build(image_shape: ImageShape, classes: int, quantize: Quantize | None) -> nn.Module:
    """conv -> BN -> ReLU, 7 blocks BN -> sign -> conv -> ReLU (float twin: conv -> BN -> ReLU), BN -> conv -> ReLU."""
    last: nn.Module = nn.Conv2d(192, classes, 1)
    if quantize is not None and quantize.last:
        last = QuantConv2d(192, classes, 1, bias=True, **quantize.arguments())
    return nn.Sequential(
        first_conv2d(image_shape[0], 192, 5, quantize, padding=2, bias=True),
        nn.BatchNorm2d(192, 1e-4, affine=False),
        nn.ReLU(),
        *_block(192, 160, 1, quantize),
        *_block(160, 96, 1, quantize),
        nn.MaxPool2d(3, 2, 1),
        *_block(96, 192, 5, quantize),
        *_block(192, 192, 1, quantize),
        *_block(192, 192, 1, quantize),
        nn.AvgPool2d(3, 2, 1),
        *_block(192, 192, 3, quantize),
        *_block(192, 192, 1, quantize),
        nn.BatchNorm2d(192, 1e-4, affine=False),
        last,
        nn.ReLU(),
        GlobalAverage(),
    )
