"""Binarized neural networks: signs of weights and activations, no scales.

Courbariaux et al., Binarized Neural Networks, 2016.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.quantizers import ActivationQuantizer, Method, straight_through


class HardTanhSign(ActivationQuantizer):
    """x_b = sign(x), sign(0) = +1; dC/dx = g 1{|x| <= 1}, the gradient of the hard tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x, self.codes(x), x.abs() <= 1)


ACTIVATION = HardTanhSign
METHOD = Method(
    title="BNN",
    weight="bc",
    activation="bnn",
    weight_levels="-1, +1",
    activation_levels="-1, +1",
    weight_bits=1,
    activation_bits=1,
    operations="XOR, bitcount",
    formula="sign(W), sign(x)",
    source="Courbariaux et al. 2016, arXiv 1602.02830",
)
