"""Ternary-binary network: ternary activations, binary weights with a scale.

Wan et al., TBN: Convolutional neural network with ternary inputs and binary weights, 2018.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.quantizers import ActivationQuantizer, Method, straight_through
from tvm_ops.bitplanes import TERNARY


def _ternary(x: Tensor, threshold: Tensor) -> Tensor:
    """+1 where x >= threshold, else -1 where x <= -threshold, else 0: a NaN is 0."""
    return torch.where(x >= threshold, 1.0, torch.where(x <= -threshold, -1.0, 0.0))


class Ternary(ActivationQuantizer):
    """x -> +1 where x >= Delta, -1 where x <= -Delta, else 0; Delta = delta mean |x|; dC/dx = g 1{|x| <= 1}.

    The mean is the batch's own while training and a running one in evaluation, as in batch normalisation.

    Args:
        delta: of the threshold; the paper's 0.4.
        momentum: the share of a batch in the running mean.
    """

    code = TERNARY
    operator = "Ternarize"
    running_mean: Tensor

    def __init__(self, delta: float = 0.4, momentum: float = 0.1) -> None:
        super().__init__()
        if not 0 <= delta < math.inf:
            raise ValueError(f"delta = {delta}: give 0 or more")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum = {momentum}: give more than 0, at most 1")
        self.delta, self.momentum = delta, momentum
        # before any batch: mean |x| of a standard normal, which is what a batch normalisation before this gives
        self.register_buffer("running_mean", torch.full((1,), math.sqrt(2 / math.pi)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return straight_through(x, self.codes(x), x.abs() <= 1)
        mean = x.detach().abs().mean()
        self.running_mean.lerp_(mean, self.momentum)
        return straight_through(x, _ternary(x, self.delta * mean), x.abs() <= 1)

    def operands(self) -> tuple[tuple[Tensor, ...], dict[str, int]]:
        return (self.delta * self.running_mean,), {}

    def codes(self, x: Tensor) -> Tensor:
        return _ternary(x, self.delta * self.running_mean)


ACTIVATION = Ternary
METHOD = Method(
    title="TBN",
    weight="bwn",
    activation="tbn",
    weight_levels="-a, +a",
    activation_levels="-1, 0, +1",
    weight_bits=1,
    activation_bits=2,
    operations="AND, XOR, bitcount",
    formula="sign(x) 1{|x| >= D}, D = 0.4 mean |x|",
    source="Wan et al. 2018, ECCV",
)
