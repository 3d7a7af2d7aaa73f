"""Binary activations: the sign with a clipped straight-through gradient.

Courbariaux et al., Binarized Neural Networks, 2016; Rastegari et al., XNOR-Net, 2016.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.quantizers import ActivationQuantizer, Method, sign


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1)


class Sign(ActivationQuantizer):
    """x_b = sign(x), sign(0) = +1; dC/dx = dC/dx_b 1{|x| < 1} (XNOR-Net; CF eq 13)."""

    method = Method("activation", 1, "-1, +1", "sign(x)", "BNN 2016; XNOR-Net 2016")

    def forward(self, x: Tensor) -> Tensor:
        return _Sign.apply(x)


QUANTIZER = Sign
