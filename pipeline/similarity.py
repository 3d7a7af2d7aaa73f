"""How alike the scales of a layer's filters are, and what sharing them costs: CF section 6.1, Fig. 5 in closed form.

Lyu et al., Cross-filter compression, arXiv 2005.09034. A filter-wise binary layer W_i ~ alpha_i B_i, B_i = +-1 of
q = c k_h k_w weights, alpha_i = mean |W_i|, has the error J = ||W||^2 - q sum_i alpha_i^2. Sharing keeps every B_i and
replaces alpha_i by the mean over its M neighbours (eq 15-16), and J grows by exactly q sum_i (alpha_i - mean)^2. So the
price is known from the scales alone: a stored network needs no float parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LayerScales:
    """The filter-wise scales of one layer.

    name: the layer's in the network. weights: q, of one filter. scales: float64 [n].
    """

    name: str
    weights: int
    scales: NDArray[Any]

    @property
    def spread(self) -> float:
        """Standard deviation over mean: its square over (1 + its square) is the price of M = n."""
        return float(self.scales.std() / self.scales.mean())

    def shared(self, group: int) -> NDArray[Any]:
        """alpha_g, the means over ``group`` neighbours; the last group may be smaller. float64 [ceil(n / M)].

        Raises:
            ValueError: a group of no filter.
        """
        if group < 1:
            raise ValueError(f"group = {group}: a scale is shared by at least one filter, give 1 or more")
        starts = np.arange(0, len(self.scales), group)
        return np.add.reduceat(self.scales, starts) / np.diff([*starts, len(self.scales)])

    def price(self, group: int) -> float:
        """What sharing adds to the squared error of the weights: q sum_i (alpha_i - alpha_g)^2."""
        spread = self.scales - self.shared(group).repeat(group)[: len(self.scales)]
        return float(self.weights * (spread**2).sum())

    def relative_price(self, group: int) -> float:
        """The price over q sum_i alpha_i^2 = ||W~||^2, what the filter-wise layer keeps of the float weights.

        Of the candidates for a unit this is the one that a stored network knows: ||W||^2 and J need the float parent.
        0 where the scales of every group are equal, 1 at most.
        """
        kept = self.weights * float((self.scales**2).sum())
        return self.price(group) / kept if kept else 0.0

    def groups(self) -> list[int]:
        """The choices of M: 1, 2, 4, ... and n. Each partition refines the next, so prices never fall along it."""
        n = len(self.scales)
        return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]

    def largest_group(self, budget: float) -> int:
        """The largest of `groups` whose relative price is at most ``budget``.

        Raises:
            ValueError: a budget that is no share.
        """
        if not 0 <= budget <= 1:
            raise ValueError(f"budget = {budget}: it is a share of the weights' energy, give 0 to 1")
        return max(m for m in self.groups() if self.relative_price(m) <= budget)

    def summary(self) -> dict[str, Any]:
        """For JSON: prices by M."""
        return {
            "name": self.name,
            "filters": len(self.scales),
            "weights_per_filter": self.weights,
            "mean": float(self.scales.mean()),
            "spread": self.spread,
            "price": {m: self.price(m) for m in self.groups()},
            "relative_price": {m: self.relative_price(m) for m in self.groups()},
        }


def pick(layers: Sequence[LayerScales], group: int | None, budget: float | None) -> dict[str, int]:
    """M of every layer by name: ``group`` everywhere, or the largest within ``budget`` each.

    Raises:
        ValueError: neither or both are given.
    """
    if group is not None and budget is None:
        return {layer.name: group for layer in layers}
    if budget is not None and group is None:
        return {layer.name: layer.largest_group(budget) for layer in layers}
    raise ValueError("give --group, one M for all layers, or --budget, a share of the weights' energy: one of them")
