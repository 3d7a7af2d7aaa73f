"""Real activations: the input side of methods that quantise weights alone."""

from __future__ import annotations

from torch import Tensor

from pipeline.quantizers import ActivationQuantizer


class Real(ActivationQuantizer):
    """x -> x."""

    code = None

    def forward(self, x: Tensor) -> Tensor:
        return x


ACTIVATION = Real
