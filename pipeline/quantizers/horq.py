"""High-order residual quantisation: activations as a sum of scaled signs, every receptive field on its own.

Li et al., Performance guaranteed network acceleration via high-order residual quantization, 2017.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.quantizers import Method, ResidualQuantizer, checked_integer


class ResidualOfWindow(ResidualQuantizer):
    """x -> sum_j b_j H_j, b_j = mean |R_j| over dimension 1: x is [N, C], or windows unfolded to [N, T C, OH, OW].

    ||x - sum_j b_j H_j||^2 = ||x||^2 - K sum_j b_j^2 for the K entries of a window.

    Args:
        order: the number of planes, 1 to 8.
    """

    per_window = True

    def __init__(self, order: int = 2) -> None:
        super().__init__()
        self.order = checked_integer("order", order)

    def magnitude(self, x: Tensor) -> Tensor:
        return x.abs().mean(1, keepdim=True)


ACTIVATION = ResidualOfWindow
METHOD = Method(
    title="HORQ",
    weight="bwn",
    activation="horq",
    weight_levels="-a, +a",
    activation_levels="+-b1 +-b2",
    weight_bits=1,
    activation_bits=2,
    operations="XOR, bitcount",
    formula="b1 sign(x) + b2 sign(x - b1 sign(x)), b_j = mean |R_j| over the window",
    source="Li et al. 2017, arXiv 1708.08687",
)
