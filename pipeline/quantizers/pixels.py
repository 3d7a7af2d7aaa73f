"""Images as the integers that they are, so that a first layer can be quantised: 2 u - 255 for a byte u.

Ours; the planes of a byte are how Courbariaux et al., Binarized Neural Networks, 2016, compute their first layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantizers import ActivationQuantizer, checked_integer, straight_through
from tvm_ops.bitplanes import odd


class Pixels(ActivationQuantizer):
    """x in [-1, 1] -> the nearest odd integer of [-m, m] over m, m = 2^bits - 1; dC/dx = g 1{|x| <= 1}.

    codes = 2 round((clip(x, -1, 1) + 1) m / 2) - m, ties to even, a NaN is -m. Exact with 8 bits on u / 127.5 - 1,
    u = 0 to 255, which is how `pipeline.data.to_float` gives images.

    Args:
        bits: of a pixel, 1 to 8.
    """

    operator = "QuantizeSymmetric"

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.bits = checked_integer("bits", bits)
        self.code = odd(bits)
        self.scale = 1 / (2**bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x, self.codes(x) * self.scale, x.abs() <= 1)

    def operands(self) -> tuple[tuple[Tensor, ...], dict[str, int]]:
        return (), {"bits": self.bits}

    def codes(self, x: Tensor) -> Tensor:
        most = 2**self.bits - 1
        clipped = torch.where(x >= -1, x, -1.0).clamp(max=1)
        return 2 * ((clipped + 1) * (most / 2)).round() - most


ACTIVATION = Pixels
