"""Trained ternary quantisation: weights -Wn, 0 and +Wp with two learned scales per layer, real activations.

Zhu et al., Trained ternary quantization, 2017.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.quantizers import CodedWeight, Method, WeightQuantizer
from tvm_ops.bitplanes import TERNARY

_LEAST = 1e-6  # a scale that reached 0 would pass its weights no gradient


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, positive: Tensor, negative: Tensor, coded: CodedWeight) -> Tensor:
        ctx.save_for_backward(coded.codes, positive, negative)
        return coded.dequantize()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        codes, positive, negative = ctx.saved_tensors
        above, below = codes > 0, codes < 0
        slope = torch.where(above, positive, torch.where(below, negative, 1.0))
        return g * slope, (g * above).sum().view(1), -(g * below).sum().view(1), None


class TrainedTernary(WeightQuantizer):
    """W~ = +Wp where W > Delta, -Wn where W < -Delta, else 0; Delta = threshold max |W|.

        dC/dWp = sum_{W > Delta} g,  dC/dWn = -sum_{W < -Delta} g,  dC/dW = g (Wp, Wn or 1, where W~ is +Wp, -Wn or 0)

    Wp and Wn start at 1 and stay above 0. The paper's normalisation W / max |W| only scales Delta, and its gradient is
    left out, as there.

    Args:
        threshold: the paper's t.
    """

    def __init__(self, threshold: float = 0.05) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold = {threshold}: give a share of the largest weight, from 0 to below 1")
        self.threshold = threshold
        self.positive, self.negative = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, weight: Tensor) -> Tensor:
        return _Ternary.apply(weight, self.positive, self.negative, self.encode(weight))

    def encode(self, weight: Tensor) -> CodedWeight:
        weight = weight.detach()
        codes = weight.sign() * (weight.abs() > self.threshold * weight.abs().max())
        positive, negative = self.positive.detach().clone(), self.negative.detach().clone()
        return CodedWeight(codes, positive, len(weight), TERNARY, negative)

    @torch.no_grad()
    def constrain_(self, weight: Tensor) -> None:
        self.positive.clamp_(min=_LEAST)
        self.negative.clamp_(min=_LEAST)


WEIGHT = TrainedTernary
METHOD = Method(
    title="TTQ",
    weight="ttq",
    activation="real",
    weight_levels="-Wn, 0, +Wp",
    activation_levels="real",
    weight_bits=2,
    activation_bits=32,
    operations="+, -",
    formula="+Wp where W > D, -Wn where W < -D, else 0, D = 0.05 max |W|",
    source="Zhu et al. 2017, arXiv 1612.01064",
)
