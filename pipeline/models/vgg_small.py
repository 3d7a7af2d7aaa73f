"""A plain chain of 3x3 convolutions: the smallest network in which bits can stay bits between layers."""

from __future__ import annotations

from torch import nn

from pipeline.models import GlobalAverage, ImageShape, Quantize, classifier, conv2d, first_conv2d


def build(
    image_shape: ImageShape,
    classes: int,
    quantize: Quantize | None,
    *,
    widths: tuple[int, ...] = (64, 64, 128),
    pool_after: tuple[int, ...] = (1, 2),
) -> nn.Module:
    """Float conv, then BN -> sign -> conv [-> max pool] for each further width, then BN -> ReLU -> average -> linear.

    There is no ReLU between two binary convolutions, so BN and sign fold into one threshold per channel.

    Args:
        widths: output channels of each convolution, the float first one included.
        pool_after: positions in ``widths`` after which a 2x2 max pool halves the image.

    Raises:
        ValueError: a pool after a convolution that does not exist, or more pools than the image has halves.
    """
    if not set(pool_after) <= set(range(len(widths))):
        raise ValueError(f"pool_after = {pool_after}: positions in widths run from 0 to {len(widths) - 1}")
    if min(image_shape[1:]) < 2 ** len(pool_after):
        raise ValueError(f"pool_after = {pool_after}: too many pools for images of {image_shape}, give fewer")
    layers: list[nn.Module] = []
    for i, (c_in, c_out) in enumerate(zip((image_shape[0], *widths), widths, strict=False)):
        if i == 0:
            layers += [first_conv2d(c_in, c_out, 3, quantize, padding=1)]
        else:
            layers += [nn.BatchNorm2d(c_in), conv2d(c_in, c_out, 3, quantize, padding=1)]
        if i in pool_after:
            layers += [nn.MaxPool2d(2)]
    head = [nn.BatchNorm2d(widths[-1]), nn.ReLU(), GlobalAverage(), *classifier(widths[-1], classes, quantize)]
    return nn.Sequential(*layers, *head)
