"""BinaryNet of Tang et al.: signs of weights without a scale, activations as two scaled signs, weights pushed to +-1.

Tang et al., How to train a compact binary neural network with high accuracy?, 2017.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.quantizers import Method, ResidualQuantizer
from pipeline.quantizers.bc import BinaryConnect


class PushedToOne(BinaryConnect):
    """W_b = sign(W) as in BinaryConnect; the loss gains strength * sum_i (1 - W_i^2), least where every |W_i| is 1.

    Args:
        strength: of that penalty. The default is ours: our notes on the paper lack its value.
    """

    def __init__(self, strength: float = 5e-7) -> None:
        super().__init__()
        if not strength >= 0:
            raise ValueError(f"strength = {strength}: a negative one would push weights to 0, give 0 or more")
        self.strength = strength

    def penalty(self, weight: Tensor) -> Tensor:
        return self.strength * (1 - weight.square()).sum()


class ResidualOfMap(ResidualQuantizer):
    """x -> b_1 H_1 + b_2 H_2, one b_j per example: the mean over all of its map."""

    order, per_window = 2, False

    def magnitude(self, x: Tensor) -> Tensor:
        return x.abs().mean(tuple(range(1, x.dim())), keepdim=True)


WEIGHT = PushedToOne
ACTIVATION = ResidualOfMap
METHOD = Method(
    title="BinaryNet",
    weight="binarynet",
    activation="binarynet",
    weight_levels="-1, +1",
    activation_levels="+-b1 +-b2",
    weight_bits=1,
    activation_bits=2,
    operations="XOR, bitcount",
    formula="sign(W), b1 sign(x) + b2 sign(x - b1 sign(x)), b_j = mean |R_j| over the example",
    source="Tang et al. 2017, AAAI",
)
