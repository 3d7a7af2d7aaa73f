"""The quantisers by name: this folder is the registry, a file without a leading underscore is a member.

A member defines ``QUANTIZER``, a subclass of `WeightQuantizer` or `ActivationQuantizer`.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Method:
    """What a quantiser does to a tensor, for tables: see ``crossbit methods``."""

    operand: Literal["weight", "activation"]
    bits: int
    levels: str
    formula: str
    source: str


@dataclass(frozen=True)
class BitWeight:
    """A weight as it is deployed: one +-1 plane and one scale per group of neighbouring filters.

    signs: float32 +-1, the shape of the weight. scale: float32 [ceil(filters / group)].
    """

    signs: Tensor
    scale: Tensor
    group: int

    def per_filter(self) -> Tensor:
        """The scale of every filter, float32 [filters]."""
        return self.scale.repeat_interleave(self.group)[: self.signs.shape[0]]

    def dequantize(self) -> Tensor:
        """scale * signs, float32, the shape of the weight."""
        return self.signs * self.per_filter().view(-1, *[1] * (self.signs.dim() - 1))


class WeightQuantizer(nn.Module):
    """forward: latent weight -> quantised weight of the same shape, differentiable (straight-through)."""

    method: ClassVar[Method]

    def encode(self, weight: Tensor) -> BitWeight:
        """The deployed form of ``weight``: ``encode(w).dequantize()`` equals ``forward(w)``."""
        raise NotImplementedError

    def constrain_(self, weight: Tensor) -> None:
        """What the method does to the latent weight in place after every optimiser step. Default: nothing."""


class ActivationQuantizer(nn.Module):
    """forward: real activations -> codes of the same shape, differentiable (straight-through)."""

    method: ClassVar[Method]


def sign(x: Tensor) -> Tensor:
    """+-1 with sign(0) = +1, so that one bit stores it; a NaN is -1 (no comparison with it holds)."""
    return torch.where(x >= 0, 1.0, -1.0)


def names() -> list[str]:
    """Every quantiser of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(name: str) -> type[WeightQuantizer] | type[ActivationQuantizer]:
    """The quantiser class called ``name``.

    Raises:
        ValueError: there is no such quantiser.
    """
    if name not in names():
        raise ValueError(f"there is no quantiser '{name}': choose one of {', '.join(names())}")
    return import_module(f"{__name__}.{name}").QUANTIZER
