"""Ternary weight networks: weights -a, 0 and +a, real activations.

Li et al., Ternary weight networks, 2016. Sharing among M filters: papers' section 3.3.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.quantizers import CodedWeight, Method, WeightQuantizer, checked_group, straight_through, sum_groups
from tvm_ops.bitplanes import TERNARY


class TernaryWeight(WeightQuantizer):
    """W~ = a T, T = sign(W) 1{|W| > Delta}, Delta = 0.7 mean |W|, a = mean |W_i| where T_i is not 0; dC/dW = g.

    A slice of zeros selects nothing: its a is 0.

    Args:
        group: M, the neighbouring filters that share Delta and a where ``per`` is "group"; the last may be fewer.
        per: "layer" has one Delta and a for all filters, as the authors' code.
    """

    def __init__(self, group: int = 1, per: Literal["layer", "group"] = "layer") -> None:
        super().__init__()
        if per not in ("layer", "group"):
            raise ValueError(f"per = '{per}': choose 'layer' or 'group'")
        if per == "layer" and checked_group(group) != 1:
            raise ValueError(f"group = {group}: twn shares one scale per layer, use group=1 or its option per='group'")
        self.group, self.per = checked_group(group), per

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, self.encode(weight).dequantize())

    def encode(self, weight: Tensor) -> CodedWeight:
        weight = weight.detach()
        group = self.group if self.per == "group" else len(weight)
        magnitude = weight.abs().flatten(1)
        sizes = sum_groups(torch.full((len(weight),), float(magnitude[0].numel()), device=weight.device), group)
        means = sum_groups(magnitude.double().sum(1), group) / sizes
        threshold = (0.7 * means).float().repeat_interleave(group)[: len(weight)]
        selected = magnitude > threshold.view(-1, 1)
        count = sum_groups(selected.double().sum(1), group)
        scale = sum_groups((magnitude.double() * selected).sum(1), group) / count.clamp(min=1)
        return CodedWeight(weight.sign() * selected.view_as(weight), scale.float(), group, TERNARY)


def share(weight: CodedWeight, group: int) -> CodedWeight:
    """``weight`` with one scale per ``group`` filters, the codes kept: a = sum_t n_t a_t / sum_t n_t.

    n_t: the nonzero codes of filter t. That is the least-squares scale; the plain mean is not, where n_t differ.
    """
    count = (weight.codes != 0).flatten(1).double().sum(1)
    scale = sum_groups(count * weight.per_filter(), checked_group(group)) / sum_groups(count, group).clamp(min=1)
    return CodedWeight(weight.codes, scale.float(), group, weight.code)


WEIGHT = TernaryWeight
METHOD = Method(
    title="TWN",
    weight="twn",
    activation="real",
    weight_levels="-a, 0, +a",
    activation_levels="real",
    weight_bits=2,
    activation_bits=32,
    operations="+, -",
    formula="a sign(W) 1{|W| > D}, D = 0.7 mean |W|, a = mean |W| of the selected",
    source="Li et al. 2016, arXiv 1605.04711",
)
