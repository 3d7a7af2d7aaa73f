"""The contract: torch == ONNX Runtime == compiled code, bit for bit, on shapes that hurt."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from networks import assert_identical, assert_optimiser_keeps, dyadic, randomise
from torch import Tensor, nn

from pipeline.deploy import _binary_sign
from pipeline.layers import QuantConv2d, QuantLinear

CHANNELS = (1, 3, 31, 32, 33, 64, 100)
KERNELS = (1, 3, 5, 7)
GROUPS = (1, 2, 3, 4, 16, 1000)


@pytest.mark.parametrize("case", range(21))
def test_float_output_of_one_layer(case: int, rng: np.random.Generator, tmp_path: Path) -> None:
    kernel = KERNELS[case % 4]
    batch, height, width = (1, 5)[case % 2], int(rng.integers(kernel, 12)), int(rng.integers(kernel, 12))
    channels, filters = CHANNELS[case % 7], int(rng.choice(CHANNELS))
    dilation = int(rng.integers(1, 3)) if kernel <= 3 else 1
    layer = QuantConv2d(
        channels,
        filters,
        kernel,
        stride=(int(rng.integers(1, 3)), int(rng.integers(1, 3))),
        padding=tuple(int(p) for p in rng.integers(0, kernel + 1, 4) + dilation - 1),  # type: ignore[arg-type]
        dilation=dilation,
        bias=bool(rng.integers(2)),
        group=int(rng.choice(GROUPS)),
    )
    x = dyadic(rng, (batch, channels, height, width))
    x[0, 0, 0, 0] = np.nan
    print(layer, x.shape)
    assert_identical(layer.eval(), x, tmp_path)


class Chain(nn.Module):
    """Layers whose integers never become floats between them, and pooling before the sign."""

    def __init__(self, rng: np.random.Generator, case: int) -> None:
        super().__init__()
        widths = [int(w) for w in rng.choice(CHANNELS, 4)]
        layers: list[nn.Module] = [nn.BatchNorm2d(widths[0])]
        for i, (a, b) in enumerate(pairwise(widths)):
            kernel = int(rng.choice((1, 3, 5)))
            layers.append(
                QuantConv2d(
                    a,
                    b,
                    kernel,
                    stride=int(rng.integers(1, 3)) if i else 1,
                    padding=tuple(int(p) for p in rng.integers(0, 3, 4) + kernel // 2),  # type: ignore[arg-type]
                    bias=bool(rng.integers(2)),
                    group=int(rng.choice(GROUPS)),
                )
            )
            if (case + i) % 3 == 0:
                layers.append(nn.MaxPool2d(3, 2, 1) if i else nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(b), (nn.Identity, nn.ReLU, nn.Hardtanh)[int(rng.integers(3))]()]
        self.features = nn.Sequential(*layers)
        self.head = QuantLinear(widths[-1], 10, group=3, bias=True)
        self.input_shape = (widths[0], 9, 11)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.head(F.max_pool2d(y, y.shape[2:]).flatten(1))


@pytest.mark.parametrize("case", range(12))
def test_chains_of_binary_layers(case: int, rng: np.random.Generator, tmp_path: Path) -> None:
    model = Chain(rng, case)
    print(model)
    x = dyadic(rng, ((1, 5)[case % 2], *model.input_shape))
    assert_identical(randomise(model, rng), x, tmp_path, threads=1 + case % 2)


class PooledSigns(nn.Module):
    """Signs that are pooled and flattened before the layer that takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = QuantConv2d(33, 64, 3, padding=1, group=4)
        self.norm = nn.BatchNorm2d(64)
        self.second = QuantLinear(64 * 3 * 4, 10, group=4)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(_binary_sign(self.norm(self.first(x))), 3, 2, 1)
        return self.second(pooled.flatten(1))


def test_signs_that_are_pooled_and_flattened(rng: np.random.Generator, tmp_path: Path) -> None:
    model = randomise(PooledSigns(), rng)
    assert_identical(model, dyadic(rng, (2, 33, 6, 7)), tmp_path)


def test_the_optimiser_of_onnx_runtime_keeps_every_bit(rng: np.random.Generator, tmp_path: Path) -> None:
    model = Chain(rng, 1)
    assert_optimiser_keeps(randomise(model, rng), dyadic(rng, (2, *model.input_shape)), tmp_path)
