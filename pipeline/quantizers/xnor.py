"""XNOR-Net: binary weights with a scale, binary activations; with one scale per M filters, XNOR-CF.

Rastegari et al., XNOR-Net, 2016; Lyu et al., Cross-filter compression for CNN inference acceleration, arXiv 2005.09034.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.quantizers import ActivationQuantizer, Method, straight_through


class Sign(ActivationQuantizer):
    """x_b = sign(x), sign(0) = +1; dC/dx = g 1{|x| < 1} (XNOR-Net's code; CF eq 13)."""

    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x, self.codes(x), x.abs() < 1)


ACTIVATION = Sign
METHOD = Method(
    title="XNOR-Net / XNOR-CF",
    weight="bwn",
    activation="xnor",
    weight_levels="-a, +a",
    activation_levels="-1, +1",
    weight_bits=1,
    activation_bits=1,
    operations="XOR, bitcount",
    formula="sign(x), times mean |x| of the window with input_scale",
    source="Rastegari et al. 2016, arXiv 1603.05279; Lyu et al. 2020, arXiv 2005.09034",
)
