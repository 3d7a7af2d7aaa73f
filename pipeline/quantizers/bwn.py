"""Binary weights with one scale per M neighbouring filters: BWN (M = 1) and its cross-filter form, BW-CF / XNOR-CF.

Rastegari et al., XNOR-Net, 2016; Lyu et al., Cross-filter compression for CNN inference acceleration, arXiv 2005.09034.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.quantizers import CodedWeight, Method, WeightQuantizer, checked_group, sign, sum_groups

Gradient = Literal["published", "exact"]


def _weights_in_group(weight: Tensor, group: int) -> Tensor:
    """N_s of every group: the number of weights that share its scale, float32 [ceil(O / group)]."""
    return sum_groups(torch.full((len(weight),), float(weight[0].numel())), group).to(weight.device)


class _CrossFilter(torch.autograd.Function):
    """W -> alpha_g sign(W), with either gradient of papers' section 1.5."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: int, gradient: Gradient) -> Tensor:
        coded = encode(weight, group)
        ctx.save_for_backward(weight, coded.codes, coded.per_filter())
        ctx.group, ctx.gradient = group, gradient
        return coded.dequantize()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        weight, signs, alpha = ctx.saved_tensors
        column = (-1, *[1] * (weight.dim() - 1))

        def spread(per_group: Tensor) -> Tensor:
            return per_group.repeat_interleave(ctx.group)[: len(weight)].view(column)

        through = alpha.view(column) * g * (weight.abs() <= 1)
        n_s = _weights_in_group(weight, ctx.group)
        if ctx.gradient == "published":
            return g / spread(n_s) + through, None, None
        shared = sum_groups((g * signs).flatten(1).sum(1), ctx.group) / n_s
        return signs * spread(shared) + through, None, None


def encode(weight: Tensor, group: int) -> CodedWeight:
    """B = sign(W), alpha_g = mean |W| over the slice of ``group`` filters (CF eq 6 and 8)."""
    magnitudes = weight.detach().abs().flatten(1).double().sum(1)
    scale = sum_groups(magnitudes, group) / _weights_in_group(weight, group).double()
    return CodedWeight(sign(weight.detach()), scale.float(), group)


class CrossFilterBinary(WeightQuantizer):
    """W~ = alpha_g B, B = sign(W), alpha_g = ||W_g||_1 / N_s, N_s = M c k_h k_w (CF eq 3-8; BWN is M = 1).

    Gradient, g = dC/dW~ (papers' section 1.5):
        published  dC/dW_i = g_i (1 / N_s + alpha_g 1{|W_i| <= 1})                       XNOR-Net's rule, slice size N_s
        exact      dC/dW_i = sign(W_i) / N_s sum_j g_j sign(W_j) + alpha_g g_i 1{|W_i| <= 1}    the chain rule

    Args:
        group: M, the number of neighbouring filters that share a scale; the last group may be smaller.
        gradient: which of the two rules.
    """

    def __init__(self, group: int = 1, gradient: Gradient = "published") -> None:
        super().__init__()
        if gradient not in ("published", "exact"):
            raise ValueError(f"gradient = '{gradient}': choose 'published' or 'exact'")
        self.group, self.gradient = checked_group(group), gradient

    def forward(self, weight: Tensor) -> Tensor:
        return _CrossFilter.apply(weight, self.group, self.gradient)

    def encode(self, weight: Tensor) -> CodedWeight:
        return encode(weight, self.group)

    @torch.no_grad()
    def constrain_(self, weight: Tensor) -> None:
        """As XNOR-Net's published code: centre over the input channels, then clamp to [-1, 1]."""
        if weight.shape[1] > 1:  # with one input channel the centred weight would be zero
            weight.sub_(weight.mean(dim=1, keepdim=True))
        weight.clamp_(-1, 1)


WEIGHT = CrossFilterBinary
METHOD = Method(
    title="BWN / BW-CF",
    weight="bwn",
    activation="real",
    weight_levels="-a, +a",
    activation_levels="real",
    weight_bits=1,
    activation_bits=32,
    operations="+, -",
    formula="a_g sign(W), a_g = mean |W| over M filters (BWN: M = 1)",
    source="Rastegari et al. 2016, arXiv 1603.05279; Lyu et al. 2020, arXiv 2005.09034",
)
