"""DoReFa-Net: weights, activations and gradients of a few bits each.

Zhou et al., DoReFa-Net, 2016. quantize_k(r) = round((2^k - 1) r) / (2^k - 1) for r in [0, 1], its gradient 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.quantizers import (
    ActivationQuantizer,
    CodedWeight,
    Method,
    WeightQuantizer,
    checked_integer,
    sign,
    straight_through,
)
from tvm_ops.bitplanes import odd, unsigned


class DoReFaWeight(WeightQuantizer):
    """One scale for the layer.

        bits = 1   E sign(W), E = mean |W|                                            dC/dW = g
        bits > 1   2 quantize_k(t / (2 max |t|) + 1/2) - 1, t = tanh(W)               the chain rule, max included

    Args:
        bits: k, 1 to 8.
    """

    def __init__(self, bits: int = 1) -> None:
        super().__init__()
        self.bits = checked_integer("bits", bits)

    def _unit(self, weight: Tensor) -> Tensor:
        """tanh(W) / (2 max |tanh W|) + 1/2, in [0, 1]; where every weight is 0, 1/2."""
        t = weight.tanh()
        return t / (2 * t.abs().max().clamp(min=torch.finfo(t.dtype).eps)) + 0.5

    def forward(self, weight: Tensor) -> Tensor:
        real = weight if self.bits == 1 else 2 * self._unit(weight)
        return straight_through(real, self.encode(weight).dequantize())

    def encode(self, weight: Tensor) -> CodedWeight:
        weight = weight.detach()
        if self.bits == 1:
            return CodedWeight(sign(weight), weight.abs().double().mean().float().view(1), len(weight))
        most = 2**self.bits - 1
        codes = 2 * (most * self._unit(weight)).round() - most
        return CodedWeight(codes, torch.full((1,), 1 / most, device=weight.device), len(weight), odd(self.bits))


class DoReFaActivation(ActivationQuantizer):
    """x -> quantize_k(clip(x, 0, 1)), ties to even, a NaN is 0; dC/dx = g 1{0 <= x <= 1}.

    Args:
        bits: k, 1 to 8.
    """

    operator = "QuantizeUnit"

    def __init__(self, bits: int = 1) -> None:
        super().__init__()
        self.bits = checked_integer("bits", bits)
        self.code = unsigned(bits)
        self.scale = 1 / (2**bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x, self.codes(x) * self.scale, (x >= 0) & (x <= 1))

    def operands(self) -> tuple[tuple[Tensor, ...], dict[str, int]]:
        return (), {"bits": self.bits}

    def codes(self, x: Tensor) -> Tensor:
        return (torch.where(x >= 0, x, 0.0).clamp(max=1) * (2**self.bits - 1)).round()


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bits: int) -> Tensor:
        ctx.most = 2**bits - 1
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        largest = g.abs().amax(tuple(range(1, g.dim())), keepdim=True)
        noise = (torch.rand_like(g) - 0.5) / ctx.most
        unit = (g / (2 * largest.clamp(min=torch.finfo(g.dtype).tiny)) + 0.5 + noise).clamp(0, 1)
        return 2 * largest * ((unit * ctx.most).round() / ctx.most - 0.5), None


def quantize_gradient(y: Tensor, bits: int) -> Tensor:
    """y, whose gradient is rounded to ``bits`` bits at random, without bias: [N, ...], N examples.

    backward: 2 max|g| (quantize_k(g / (2 max|g|) + 1/2 + u / (2^k - 1)) - 1/2), u ~ U(-1/2, 1/2), max over an example.
    """
    return _Gradient.apply(y, bits)


WEIGHT = DoReFaWeight
ACTIVATION = DoReFaActivation
METHOD = Method(
    title="DoReFa-Net",
    weight="dorefa",
    activation="dorefa",
    weight_levels="-E, +E",
    activation_levels="0, 1",
    weight_bits=1,
    activation_bits=1,
    operations="AND, bitcount",
    formula="E sign(W), E = mean |W| of the layer; round(clip(x, 0, 1)); 1 to 8 bits each",
    source="Zhou et al. 2016, arXiv 1606.06160",
)
