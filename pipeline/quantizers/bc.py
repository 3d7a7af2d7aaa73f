"""BinaryConnect: signs of weights without a scale, real activations.

Courbariaux et al., BinaryConnect, 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantizers import CodedWeight, Method, WeightQuantizer, sign, straight_through


class BinaryConnect(WeightQuantizer):
    """W_b = sign(W), sign(0) = +1; dC/dW = g, and W is clipped to [-1, 1] after every step.

    Args:
        stochastic: while training, W_b = +1 with p = clip((W + 1) / 2, 0, 1), else -1.
    """

    def __init__(self, stochastic: bool = False) -> None:
        super().__init__()
        self.stochastic = stochastic

    def forward(self, weight: Tensor) -> Tensor:
        if self.stochastic and self.training:
            return straight_through(weight, 2 * torch.bernoulli(((weight.detach() + 1) / 2).clamp(0, 1)) - 1)
        return straight_through(weight, sign(weight))

    def encode(self, weight: Tensor) -> CodedWeight:
        return CodedWeight(sign(weight.detach()), torch.ones(1, device=weight.device), len(weight))

    @torch.no_grad()
    def constrain_(self, weight: Tensor) -> None:
        weight.clamp_(-1, 1)


WEIGHT = BinaryConnect
METHOD = Method(
    title="BinaryConnect",
    weight="bc",
    activation="real",
    weight_levels="-1, +1",
    activation_levels="real",
    weight_bits=1,
    activation_bits=32,
    operations="+, -",
    formula="sign(W)",
    source="Courbariaux et al. 2015, arXiv 1511.00363",
)
